"""`ProofSchedule`: when each tenant, and the host (None), is proven next after changes that were told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LEAST: Final = 1.0
"""Seconds from one proof of a tenant to the next one."""
MOST: Final = 30.0
"""The same while changes do not end."""


@dataclass
class _Turn:
    due: float | None = None
    last: float = float("-inf")
    pause: float = LEAST


class ProofSchedule:
    """A proof is due at once when a change is told, but not before a pause after the last one. The pause doubles with
    each proof that follows soon after another, and is the least one again after some calm. Times are seconds of any
    clock."""

    def __init__(self) -> None:
        self._turns: dict[str | None, _Turn] = {}

    def changed(self, tenant: str | None, now: float) -> None:
        """Note a change. Many have one proof."""
        turn = self._turns.setdefault(tenant, _Turn())
        if turn.due is None:
            turn.due = max(now, turn.last + turn.pause)

    def due(self) -> float | None:
        """Return when the next proof is due; None if nothing has changed."""
        return min((turn.due for turn in self._turns.values() if turn.due is not None), default=None)

    def take(self, now: float) -> Sequence[str | None]:
        """Return who is to be proven now."""
        taken = [tenant for tenant, turn in self._turns.items() if turn.due is not None and turn.due <= now]
        for tenant in taken:
            turn = self._turns[tenant]
            busy = now - turn.last < 2 * turn.pause
            turn.due, turn.last, turn.pause = None, now, min(2 * turn.pause, MOST) if busy else LEAST
        return taken

    def forget(self, tenant: str) -> None:
        """Forget a tenant that was removed."""
        self._turns.pop(tenant, None)
