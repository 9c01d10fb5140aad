"""`Terminals`: raises kernel.pty.max, the number of pseudoterminals that the whole host shares (pty(7)).

An instance has at most `spec.TERMINALS`, by the option `max` of its devpts. One with `--nesting` may mount more devpts,
but a tenant has at most `uncharged.TERMINALS` (if the kernel can count them). While the host's limit is above the sum
of these limits, no tenant takes a terminal from another. So it is raised as instances are added. It is never lowered
while Insula runs; `insula down` restores the original value.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from insula.control.instances.drivers.uncharged import TERMINALS

log = logging.getLogger("insula.control")

_LIMIT = Path("/proc/sys/kernel/pty/max")
_RESERVE = Path("/proc/sys/kernel/pty/reserve")  # of the limit, for devpts of the host's first mount namespace only
_MOST = 1 << 20  # NR_UNIX98_PTY_MAX
_OTHERS = 1024  # the host's own
_STEP = 16  # instances


class Terminals:
    """The host's limit. `record` is a file with the original limit and the one that was set."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._room = 0  # the number of instances that the limit is known to allow

    def make_room(self, instances: int) -> None:
        """Raise the limit if this number of instances needs it. A failure is logged."""
        if instances <= self._room:
            return
        self._room = instances + _STEP - instances % _STEP
        try:
            now = int(_LIMIT.read_text())
            needed = min(int(_RESERVE.read_text()) + _OTHERS + self._room * TERMINALS, _MOST)
            if now < needed:
                before = self._before(now)
                self._record.write_text(f"{before} {needed}")
                _LIMIT.write_text(str(needed))
        except (OSError, ValueError) as error:
            log.warning("kernel.pty.max can't be raised for %d instances: %s", instances, error)

    def restore(self) -> None:
        """Restore the original limit, unless another program has changed it since. OSError."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            before, ours = self._record.read_text().split()
            if _LIMIT.read_text().strip() == ours:
                _LIMIT.write_text(before)
        self._record.unlink(missing_ok=True)

    def _before(self, now: int) -> int:
        """The original limit: `now`, or the recorded one if `now` was set by Insula."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            before, ours = map(int, self._record.read_text().split())
            if now == ours:
                return before
        return now
