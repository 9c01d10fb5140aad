"""The channel to the host: frames that arrive, and frames that wait to be sent.

While the machine is held still, for a snapshot, frames of programs are kept back: what has been sent has arrived, and
nothing is on its way. So the channel of a machine that goes on from the snapshot begins between two frames.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque

from insula.machine import protocol
from insula.model.cpython import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_READ = 64 << 10


class Channel:
    """Frames over the port `fd`, which does not block. `on_full` is called when it takes no more: `flush` again when it
    does."""

    def __init__(self, fd: int, coding: protocol.Coding | None = None) -> None:
        self.fd = fd
        self.on_full: Callable[[], object] = lambda: None
        self._coding = coding or protocol.PlainCoding()
        self._waiting: deque[bytes] = deque()
        self._sent = 0  # of the first that waits
        self._held: list[bytes] | None = None

    def send(self, session: int, kind: int, payload: bytes = b"") -> None:
        """Send a frame, or queue it behind others."""
        frame = self._coding.encode(session, kind, payload)
        if self._held is None:
            self._waiting.append(frame)
            self.flush()
        else:
            self._held.append(frame)

    def send_json(self, session: int, kind: int, value: dict[str, Any]) -> None:
        self.send(session, kind, dumps(value).encode())

    def answer(self, session: int, kind: int, value: dict[str, Any]) -> None:
        """Send the answer to a request, also while frames are held."""
        self._waiting.append(self._coding.encode(session, kind, dumps(value).encode()))
        self.flush()

    # -- standing still --------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Keep all frames but answers back, until `release`."""
        self._held = self._held or []

    def drain(self, seconds: float) -> None:
        """Return when what waits has been sent. TimeoutError."""
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while self._waiting:
            if time.monotonic() > end:
                raise TimeoutError("the host does not read")
            poll.poll(100)
            self.flush()

    def release(self, *, forget: bool = False) -> None:
        """Send what was kept back, or `forget` it: it was for another host."""
        held, self._held = self._held or [], None
        if not forget:
            self._waiting.extend(held)
        self.flush()

    def flush(self) -> None:
        """Send until the port takes no more."""
        while self._waiting:
            first = self._waiting[0]
            try:
                self._sent += os.write(self.fd, first[self._sent :])
            except BlockingIOError:
                self.on_full()
                return
            if self._sent >= len(first):
                self._waiting.popleft()
                self._sent = 0

    @property
    def is_held(self) -> bool:
        """Whether frames are kept back."""
        return self._held is not None

    @property
    def is_full(self) -> bool:
        """Whether frames wait to be sent."""
        return bool(self._waiting) or self.is_held

    def receive(self) -> Iterator[tuple[int, int, bytes]]:
        """Read what has arrived, and iterate over the frames. Without a host at the other end there is nothing."""
        try:
            data = os.read(self.fd, _READ)
        except BlockingIOError:
            return
        yield from self._coding.feed(data)
