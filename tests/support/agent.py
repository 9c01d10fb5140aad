"""A seccomp agent as in the runtime-spec: receives a listener over its socket, and answers one call."""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.wait import patiently

ANSWER = 77
"""The errno that calls are answered with: EBADFD, which nobody else would say."""

_SECCOMP_IOCTL_NOTIF_RECV = 0xC0502100
_SECCOMP_IOCTL_NOTIF_SEND = 0xC0182101


class Agent:
    """An agent as the runtime-spec has it: takes a listener over its socket, and answers calls with an errno."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server.bind(str(path))
        self.server.listen(1)
        self.server.settimeout(patiently(20))
        self.received: dict[str, Any] = {}
        self.asked: list[int] = []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        connection, _ = self.server.accept()
        with connection:
            data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(4))
            while more := connection.recv(1 << 16):
                data += more
        self.received = json.loads(data)
        (_, _, rights), *_ = ancillary
        (listener,) = array.array("i", rights)
        notification = bytearray(80)
        try:
            fcntl.ioctl(listener, _SECCOMP_IOCTL_NOTIF_RECV, notification)
        except FileNotFoundError:  # the container ended, and asked nothing
            os.close(listener)
            return
        identity, number = struct.unpack_from("=Q8xi", notification)
        self.asked.append(number)
        fcntl.ioctl(listener, _SECCOMP_IOCTL_NOTIF_SEND, bytearray(struct.pack("=QqiI", identity, 0, -ANSWER, 0)))
        os.close(listener)

    def close(self) -> None:
        self.server.close()
        self.thread.join(patiently(20))


@contextmanager
def agent(path: Path) -> Iterator[Agent]:
    listening = Agent(path)
    try:
        yield listening
    finally:
        listening.close()
