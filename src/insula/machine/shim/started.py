"""What insulad asks of programs that `exec` starts: whether each is executed, or why not."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.machine.shim.connection import ShimConnection

_MOST = 64
"""Answers that are kept until they are asked for; the oldest is dropped: an insulad that was killed does not ask."""


class StartedPrograms:
    """Programs by the names that insulad has chosen, and it asks once for each."""

    def __init__(self) -> None:
        self._asked: dict[str, ShimConnection] = {}
        self._known: dict[str, dict[str, Any]] = {}

    def ask(self, name: str, connection: ShimConnection) -> None:
        """Answer now, or when it is known."""
        if name in self._known:
            connection.reply(self._known.pop(name))
        else:
            self._asked[name] = connection

    def tell(self, name: str, answer: dict[str, Any]) -> None:
        """Answer who asks, now or later. It is told once for each program."""
        if connection := self._asked.pop(name, None):
            connection.reply(answer)
            return
        self._known[name] = answer
        if len(self._known) > _MOST:
            del self._known[next(iter(self._known))]

    def forget(self, connection: ShimConnection) -> None:
        """Take note that who asked is gone."""
        self._asked = {name: each for name, each in self._asked.items() if each is not connection}
