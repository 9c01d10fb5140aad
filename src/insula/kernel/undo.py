"""What has to be undone if a later step fails: contextlib.ExitStack in small, for commands that live for milliseconds.

    with Undo() as undo:
        fd = undo.hold(os.open(…))
        undo.callback(os.rmdir, made)
        …
        undo.keep()        # all went well: nothing is undone

The module `contextlib` has all of this and more, but its import takes 4 ms.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any


class Undo:
    """Functions that are called in reverse order when the block ends, however it ends."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def callback(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have `function` called with `arguments`."""
        self._steps.append((function, arguments))

    def hold(self, fd: int) -> int:
        """Have the descriptor `fd` closed; returns it."""
        self.callback(os.close, fd)
        return fd

    def keep(self) -> None:
        """Forget all functions: what they would undo shall stay."""
        self._steps.clear()

    def close(self) -> None:
        """Call all functions; if one fails the others are called all the same, and then its error is raised."""
        failure: BaseException | None = None
        while self._steps:
            function, arguments = self._steps.pop()
            try:
                function(*arguments)
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
