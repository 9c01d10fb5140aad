"""Netlink sockets (netlink(7)): requests in batches, dumps, and the kernel's extended acknowledgements.

A request consists of a `nlmsghdr`, a fixed header for its type, and attributes. The kernel takes any number of requests
in one sendmsg(2) and replies to each, so creating a port with all its parts takes one system call in each direction.

A socket belongs to the network namespace that it was opened in, whichever thread uses it later.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from insula.kernel import descriptors
from insula.kernel.netlink import attributes, port_ids

# linux/netlink.h
_ERROR, _DONE = 2, 3
REPLACE, EXCLUSIVE, CREATE = 0x100, 0x200, 0x400
ACK, ECHO = 4, 8
_REQUEST, _DUMP = 1, 0x300
_CAPPED, _ACK_TLVS, _DUMP_INTR = 0x100, 0x200, 0x10
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _STRICT = 270, 10, 11, 12

_HEADER = struct.Struct("=IHHII")
_LARGEST = 1 << 18


class NetlinkError(OSError):
    """An errno, with a description of the request and the text of the kernel's extended acknowledgement."""


@dataclass(frozen=True)
class Request:
    """One message. `what` describes it in errors; `ignore` has errnos that are no error, as ENODEV of a deletion."""

    what: str
    type: int
    flags: int
    body: bytes
    ignore: frozenset[int] = field(default=frozenset())


class _Reply(NamedTuple):
    type: int
    flags: int
    sequence: int
    body: bytes


class NetlinkSocket:
    """A socket of a netlink `protocol`, such as NETLINK_ROUTE. Its methods may be called from any thread."""

    def __init__(self, protocol: int) -> None:
        self._lock = threading.Lock()
        self._sequence = 0
        kind = socket.AF_NETLINK, socket.SOCK_RAW, protocol
        self.socket = socket.socket(*kind, fileno=descriptors.move_above_select_limit(socket.socket(*kind).detach()))
        for option in (_CAP_ACK, _EXT_ACK, _STRICT):
            self.socket.setsockopt(_SOL_NETLINK, option, 1)
        self.socket.bind((0, 0))
        self._port: int = self.socket.getsockname()[0]
        port_ids.add(self._port)

    def close(self) -> None:
        self.socket.close()
        port_ids.discard(self._port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def execute(self, *requests: Request) -> None:
        """Send requests, in order, in one system call. The kernel runs all; the first failure raises `NetlinkError`."""
        if not requests:
            return
        with self._lock:
            first, packet = self._sequence + 1, bytearray()
            for request in requests:
                packet += self._pack(request.type, request.flags | ACK, request.body)
            self.socket.sendto(packet, (0, 0))
            errors: dict[int, NetlinkError] = {}
            missing = set(range(first, first + len(requests)))
            for answer in self._answers(first):
                if answer.type == _ERROR and answer.sequence in missing:
                    missing.remove(answer.sequence)
                    request = requests[answer.sequence - first]
                    error = error_in(request.what, answer)
                    if error is not None and error.errno not in request.ignore:
                        errors[answer.sequence] = error
                    if not missing:
                        break
        if errors:
            raise errors[min(errors)]

    def get(self, type_: int, body: bytes, flags: int = 0) -> bytes:
        """Send a request and return the body of its only reply. NetlinkError."""
        with self._lock:
            self.socket.sendto(self._pack(type_, flags, body), (0, 0))
            answer = next(self._answers(self._sequence))
        if answer.type == _ERROR:
            raise error_in("get", answer) or NetlinkError(5, "get: no answer")
        return answer.body

    def ask(self, type_: int, bodies: Sequence[bytes]) -> list[bytes | None]:
        """Send a request for each body, in one system call, and return the bodies of their only replies in order: None
        for an error. The replies must fit into the receive buffer: some 100 of a kilobyte do."""
        if not bodies:
            return []
        with self._lock:
            first, found = self._sequence + 1, dict[int, bytes | None]()
            self.socket.sendto(b"".join(self._pack(type_, 0, body) for body in bodies), (0, 0))
            for answer in self._answers(first):
                found[answer.sequence - first] = None if answer.type == _ERROR else answer.body
                if len(found) == len(bodies):
                    break
        return [found[number] for number in range(len(bodies))]

    def dump(self, type_: int, body: bytes) -> list[bytes]:
        """Return the bodies of a dump's replies; the dump is repeated if the table changed (NLM_F_DUMP_INTR)."""
        with self._lock:
            while True:
                self.socket.sendto(self._pack(type_, _DUMP, body), (0, 0))
                found, interrupted = self._replies()
                if not interrupted:
                    return found

    def _replies(self) -> tuple[list[bytes], bool]:
        """Return the bodies of a dump's replies, and whether the table has changed meanwhile. NetlinkError."""
        found, interrupted = list[bytes](), 0
        unpack, head = _HEADER.unpack_from, _HEADER.size  # this loop is most of the time that reading takes
        while True:
            data, offset = self.socket.recv(_LARGEST), 0
            while offset < len(data):
                length, type_, flags, sequence, _ = unpack(data, offset)
                if sequence == self._sequence:
                    body = data[offset + head : offset + length]
                    interrupted |= flags & _DUMP_INTR
                    if type_ in (_ERROR, _DONE):
                        if error := error_in("dump", _Reply(type_, flags, sequence, body)):
                            raise error
                        return found, bool(interrupted)
                    found.append(body)
                offset += length + 3 & ~3

    def _pack(self, type_: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return _HEADER.pack(_HEADER.size + len(body), type_, flags | _REQUEST, self._sequence, 0) + body

    def _answers(self, first: int) -> Iterator[_Reply]:
        """Yield the replies to the request with the sequence number `first` and to later ones, without end."""
        while True:
            data, offset = self.socket.recv(_LARGEST), 0
            while offset < len(data):
                length, type_, flags, sequence, _ = _HEADER.unpack_from(data, offset)
                if sequence >= first:
                    yield _Reply(type_, flags, sequence, data[offset + _HEADER.size : offset + length])
                offset += -(-length // 4) * 4


def parts_of(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the messages of a datagram: type, port id, body."""
    offset = 0
    while offset < len(data):
        length, type_, _, _, port = _HEADER.unpack_from(data, offset)
        yield type_, port, data[offset + _HEADER.size : offset + length]
        offset += -(-length // 4) * 4


def error_in(what: str, answer: _Reply) -> NetlinkError | None:
    """Return the error in an NLMSG_ERROR or NLMSG_DONE, with the text of its acknowledgement; None for a success."""
    code = -int(struct.unpack_from("=i", answer.body)[0])
    if code == 0:
        return None
    text = os.strerror(code)
    if answer.type == _ERROR and answer.flags & _ACK_TLVS:
        skipped = _HEADER.size
        if not answer.flags & _CAPPED:
            skipped = -(-struct.unpack_from("=I", answer.body, 4)[0] // 4) * 4
        said = attributes.parse(answer.body[4 + skipped :]).get(1, b"").rstrip(b"\0").decode(errors="replace")
        text = f"{text}: {said}" if said else text
    return NetlinkError(code, f"{what}: {text}")
