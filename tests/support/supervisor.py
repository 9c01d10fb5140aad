"""Both ends of sd_notify(3): the supervisor's socket, and a sender in the root file system of a container."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.wait import patiently

SEND = """
import array, os, socket, sys
root, uid, path, *messages = sys.argv[1:]
opened = os.open("/etc/hostname", os.O_RDONLY)
os.chroot(root)
os.setuid(int(uid))
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.connect(path)
for message in messages:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [opened]))]
    sock.sendmsg([message.encode()], rights)
"""


class Supervisor:
    """The socket of systemd, at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(patiently(20))

    def receive(self) -> tuple[str, list[int]]:
        data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 4)
        return data.decode(), descriptors

    def hears(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def close(self) -> None:
        self.socket.close()


def send(pid: int, path: str, *messages: str, uid: int = 0) -> subprocess.CompletedProcess[str]:
    """Send each message, with a descriptor, as user `uid` in the root of process `pid`; busybox can't."""
    command = [sys.executable, "-c", SEND, f"/proc/{pid}/root", str(uid), path, *messages]
    return subprocess.run(command, capture_output=True, text=True, timeout=patiently(30))
