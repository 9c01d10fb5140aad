"""The messages between insulad, lessor and gate: JSON, each after its length in four bytes.

The lessor trusts what insulad says, and nothing of what the gate says: messages of the gate are short, typed, and
checked against the rules.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final

import msgspec

from insula.network.names.rules import EgressRules

VERSION: Final = 1
"""Of these messages: processes with another version are replaced."""
_LENGTH: Final = struct.Struct("!I")
FROM_GATE: Final = 1 << 17  # bytes; an answer of DNS has at most 64 KiB
LONGEST: Final = 1 << 26


class GrantRequest(msgspec.Struct, tag="grant", forbid_unknown_fields=True):
    """From the gate: lease these addresses to the instance at `source`, for the first name and its aliases."""

    id: int
    source: str
    names: list[str]
    addresses: list[str]
    ttl: int


class CheckRequest(msgspec.Struct, tag="check", forbid_unknown_fields=True):
    """From the gate: whether the instance at `source` may connect to a name at this address and TCP port."""

    id: int
    source: str
    address: str
    port: int
    name: str


class NamesRequest(msgspec.Struct, tag="names", forbid_unknown_fields=True):
    """From the gate: for which names an address is leased to the instance at `source`."""

    id: int
    source: str
    address: str


class RulesInForce(msgspec.Struct, tag="in-force", forbid_unknown_fields=True):
    """From the gate: new rules are in force, and connections that they forbid are cut. `id` is that of `NewRules`."""

    id: int


class LessorReply(msgspec.Struct, tag="reply", forbid_unknown_fields=True):
    """To the gate: the answer to a request."""

    id: int
    allowed: bool
    names: list[str] = []


class NewRules(msgspec.Struct, tag="rules", forbid_unknown_fields=True):
    """To the gate: use these rules."""

    id: int
    rules: EgressRules


class SetRules(msgspec.Struct, tag="set-rules", forbid_unknown_fields=True):
    """From insulad: use these rules. The answer comes when they are in force."""

    rules: EgressRules


class ListLeases(msgspec.Struct, tag="list-leases", forbid_unknown_fields=True):
    """From insulad: list the leases."""


class LeaseListed(msgspec.Struct, forbid_unknown_fields=True):
    """A lease: instance, address, names, and the seconds that are left."""

    instance: str
    address: str
    names: list[str]
    seconds: float


class ControlReply(msgspec.Struct, tag="control-reply", forbid_unknown_fields=True):
    """To insulad: the answer. `error` is empty if all is well."""

    version: int = VERSION
    error: str = ""
    leases: list[LeaseListed] = []
    counters: dict[str, int] = {}


FromGate = GrantRequest | CheckRequest | NamesRequest | RulesInForce
ToGate = LessorReply | NewRules
FromInsulad = SetRules | ListLeases


def encode(message: msgspec.Struct) -> bytes:
    """Return a message with its length."""
    packed = msgspec.json.encode(message)
    return _LENGTH.pack(len(packed)) + packed


class MessageChannel:
    """A connected stream socket in the event loop: whole messages are passed to `receive`.

    `closed` is called once, when the other side has ended or sends a message that is longer than `limit`.
    """

    def __init__(
        self, sock: socket.socket, receive: Callable[[bytes], None], closed: Callable[[], None], limit: int = LONGEST
    ) -> None:
        sock.setblocking(False)
        self._socket, self._receive, self._closed, self._limit = sock, receive, closed, limit
        self._loop = asyncio.get_running_loop()
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._open = True
        self._loop.add_reader(sock.fileno(), self._read)

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, or keep it until the other side reads."""
        if not self._open:
            return
        data = encode(message)
        if not self._outgoing:
            with contextlib.suppress(BlockingIOError):
                sent = self._send(data)
                data = data[sent:]
            if data:
                self._loop.add_writer(self._socket.fileno(), self._write)
        self._outgoing += data

    def close(self) -> None:
        """Close the socket; `closed` is not called."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            raise
        except OSError:
            self._end()
            return len(data)

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._outgoing[: self._send(self._outgoing)]
        if not self._outgoing and self._open:
            self._loop.remove_writer(self._socket.fileno())

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        self._incoming += data
        while self._open and len(self._incoming) >= 4:
            (length,) = _LENGTH.unpack_from(self._incoming)
            if length > self._limit:
                self._end()
                return
            if len(self._incoming) < 4 + length:
                return
            message = bytes(self._incoming[4 : 4 + length])
            del self._incoming[: 4 + length]
            self._receive(message)

    def _end(self) -> None:
        if self._open:
            self.close()
            self._closed()
