"""What QEMU says on its standard error: warnings about a command line that is Insula's, or why it ends.

It is no output of the guest's program, whose streams are those of the container. So it is kept here, its end at least,
and told only if QEMU ends with an error.
"""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.kernel.event_loop import EventLoop

_KEPT = 4096  # bytes


class LastWords:
    """Keeps the last bytes that come from a pipe."""

    def __init__(self, pipe: int, loop: EventLoop) -> None:
        self._pipe, self._loop = pipe, loop
        self._text = b""
        os.set_blocking(pipe, False)
        loop.watch(pipe, lambda _: self._read())

    def _read(self) -> bool:
        """Read what has come; False if there is nothing more."""
        try:
            data = os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._loop.unwatch(self._pipe)
        self._text = (self._text + data)[-_KEPT:]
        return bool(data)

    def tell(self) -> None:
        """Write them to the standard error of this process."""
        while self._read():
            pass
        with contextlib.suppress(OSError):
            os.write(2, self._text)
