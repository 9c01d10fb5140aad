"""One more program in the guest: it is executed in the container, and stands for the program.

Its streams are the program's: it gives them to the shim, and only waits. Signals go to the program, and it ends with
the program's status. What to execute comes as the arguments behind `exec`: `process` of the OCI runtime-spec, as JSON,
and the name by which insulad asks the shim whether it is executed.
"""

from __future__ import annotations

import os
import struct
import sys

from insula.machine.shim.common import FORWARDED, NAME, RESIZED, say, status_of
from insula.model.cpython import dumps, loads, signal, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def main() -> NoReturn:
    """Have a program run in the guest, and end as it does."""
    process = loads(sys.argv[2])
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    connection.connect(NAME)
    for number in (*FORWARDED, RESIZED):
        signal.signal(number, lambda number, _: _send(connection, {"signal": number}))
    stdio = [0] if process.get("terminal") else [0, 1, 2]
    rights = struct.pack(f"{len(stdio)}i", *stdio)
    request = dumps({"process": process, "name": sys.argv[3] if len(sys.argv) > 3 else ""}).encode()
    connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    data = connection.recv(1 << 16)
    if not data:
        os._exit(137)
    end: dict[str, Any] = loads(data.decode())
    say(end)
    os._exit(status_of(end))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.send(dumps(message).encode())
