"""The channel to the host: frames that arrive, and frames that wait to be sent."""

from __future__ import annotations

import os
from collections import deque

from insula.machine import protocol
from insula.model.cpython import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_READ = 64 << 10


class Channel:
    """Frames over the port `fd`, which does not block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._decoder = protocol.FrameDecoder()
        self._waiting: deque[bytes] = deque()
        self._sent = 0  # of the first that waits

    def send(self, session: int, kind: int, payload: bytes = b"") -> None:
        """Send a frame, or queue it behind others."""
        self._waiting.append(protocol.encode(session, kind, payload))
        self.flush()

    def send_json(self, session: int, kind: int, value: dict[str, Any]) -> None:
        self.send(session, kind, dumps(value).encode())

    def flush(self) -> None:
        """Send until the port takes no more."""
        while self._waiting:
            first = self._waiting[0]
            try:
                self._sent += os.write(self.fd, first[self._sent :])
            except BlockingIOError:
                return
            if self._sent >= len(first):
                self._waiting.popleft()
                self._sent = 0

    @property
    def is_full(self) -> bool:
        """Whether frames wait to be sent."""
        return bool(self._waiting)

    def receive(self) -> Iterator[tuple[int, int, bytes]]:
        """Read what has arrived, and iterate over the frames. Without a host at the other end there is nothing."""
        try:
            data = os.read(self.fd, _READ)
        except BlockingIOError:
            return
        yield from self._decoder.feed(data)
