"""A stack of cleanup functions that undo finished steps if a later one fails, like contextlib.ExitStack.

    with Rollback() as undo:
        fd = undo.hold(os.open(…))
        undo.callback(os.rmdir, made)
        …
        undo.keep()        # success: nothing is undone

It replaces contextlib.ExitStack in `insula-oci`, where importing `contextlib` takes 2.7 ms of processor time.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any


class Rollback:
    """Cleanup functions, called in reverse order when the block ends with or without an exception."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def callback(self, function: Callable[..., object], *arguments: Any) -> None:
        """Register `function` to be called with `arguments`."""
        self._steps.append((function, arguments))

    def hold(self, fd: int) -> int:
        """Register the descriptor `fd` to be closed, and return it."""
        self.callback(os.close, fd)
        return fd

    def keep(self) -> None:
        """Drop all functions without calling them."""
        self._steps.clear()

    def close(self) -> None:
        """Call all functions. If one fails, the others are called too, and then its error is raised."""
        failure: BaseException | None = None
        while self._steps:
            function, arguments = self._steps.pop()
            try:
                function(*arguments)
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

    def __enter__(self) -> Rollback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
