"""What insulad asks the shim of a machine, over its socket in the network namespace of the machine's container.

Only the shim, QEMU and the host can reach that socket. What answers may be in the hands of the guest: an answer is a
small piece of JSON, is waited for without holding anything up, and counts only if it has the random number that was
given to this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Sequence
from typing import Any, Final

from insula.container.service.failures import explain
from insula.control.instances.drivers.container.hints import hint
from insula.kernel.netns import call_in
from insula.machine.shim.common import NAME
from insula.model.errors import Failed, NotFound

_MOST: Final = 4 << 10  # bytes of an answer
_SHOWN: Final = 500  # characters of each part of an error


def failure(told: Any) -> Failed:
    """The error for what a machine tells of a program that was not executed, which should be the message of a
    `StepError`, and may be anything."""
    found = told if isinstance(told, dict) else {}
    words = {name: str(found.get(name) or "")[:_SHOWN] for name in ("step", "object", "error", "path")}
    number = found.get("errno")
    return explain({**words, "errno": number if isinstance(number, int) else 0}, hint)


async def ask(
    netns: int, question: dict[str, Any], descriptors: Sequence[int] = (), most: int = _MOST
) -> dict[str, Any] | None:
    """The answer of the shim whose container has this network namespace, of so many bytes at `most`; None if it has
    ended, or does not listen yet. `netns` is closed; the shim gets copies of `descriptors`."""
    try:
        sock = await connected(netns)
    except OSError:
        return None
    with sock:
        try:
            socket.send_fds(sock, [json.dumps(question).encode()], list(descriptors))
            answer = json.loads(await asyncio.get_running_loop().sock_recv(sock, most) or b"null")
        except (OSError, ValueError, RecursionError):
            return None
    return answer if isinstance(answer, dict) else None


class Conversation:
    """A question with several answers, and words in between. `what` is what is not done if it fails."""

    def __init__(self, sock: socket.socket, what: str) -> None:
        self._socket, self._what = sock, what

    @classmethod
    async def begin(cls, netns: int, question: dict[str, Any], descriptors: Sequence[int], what: str) -> Conversation:
        """Ask; `netns` is closed, the shim gets copies of `descriptors`. NotFound if the machine has ended."""
        try:
            sock = await connected(netns)
            socket.send_fds(sock, [json.dumps(question).encode()], list(descriptors))
        except OSError:
            raise NotFound("the machine has ended", "start it again") from None
        return cls(sock, what)

    def tell(self, word: str) -> None:
        with contextlib.suppress(OSError):  # the machine has ended, which the next answer tells
            self._socket.send(json.dumps({word: True}).encode())

    async def told(self, what: str, seconds: float | None) -> Any:
        """Wait for an answer, as long as it takes if `seconds` is None, and return what is in it. Failed, NotFound if
        the machine ends; TimeoutError."""
        try:
            async with asyncio.timeout(seconds):
                data = await asyncio.get_running_loop().sock_recv(self._socket, _MOST)
            message = json.loads(data or b"null")
        except TimeoutError:
            raise
        except (OSError, ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise NotFound("the machine ended meanwhile", "try again")
        if "error" in message:
            raise Failed(f"{self._what}: {str(message['error'])[:_SHOWN]}", "try again; the machine goes on")
        if what not in message:
            raise Failed("the machine answers with what is no answer")
        return message[what]

    def close(self) -> None:
        self._socket.close()


async def connected(netns: int) -> socket.socket:
    """A connection to the shim whose container has this network namespace. `netns` is closed. OSError."""
    # to its end even if the caller is cancelled: a descriptor that is closed may mean something else soon
    return await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(_connect_in, netns)))


def _connect_in(netns: int) -> socket.socket:
    try:
        return call_in(netns, _connect)
    finally:
        os.close(netns)


def _connect() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)  # the queue of a shim that doesn't accept may be full: EAGAIN
        sock.connect(NAME)
    except OSError:
        sock.close()
        raise
    return sock
