"""The first message of TLS, and the server name in it (RFC 8446, 4.1.2; RFC 6066, 3).

A ClientHello may be divided into any number of records, and those into any number of segments. It has to be whole
within `LONGEST` bytes: hellos with keys against quantum computers take 2 KiB.

With Encrypted Client Hello (RFC 9849) the name here is the outer one, that of the server which can decrypt the inner
one. It is judged like any other. Browsers send an empty such extension to all servers (GREASE), which changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

LONGEST: Final = 1 << 14  # bytes, with the heads of records
_HANDSHAKE, _CLIENT_HELLO = 22, 1
_SERVER_NAME, _HOST_NAME = 0, 0
_MAX_RECORD: Final = 1 << 14
_EXTENSION: Final = struct.Struct("!HH")  # type and length


class NoClientHello(ValueError):
    """What a client sends is not a ClientHello, or it has no server name."""


class ClientHelloReader:
    """Reads a ClientHello piece by piece."""

    def __init__(self) -> None:
        self.received = bytearray()
        self._at = 0  # of the next record's head
        self._message = bytearray()  # the handshake messages in the records so far

    def feed(self, data: bytes) -> str | None:
        """Add bytes; returns the server name when the ClientHello is whole, None before. NoClientHello."""
        self.received += data
        while len(self.received) >= self._at + 5:
            type_, major, length = self.received[self._at], self.received[self._at + 1], self._length()
            if type_ != _HANDSHAKE or major != 3 or not 0 < length <= _MAX_RECORD:
                raise NoClientHello("this is not TLS")
            if len(self.received) < self._at + 5 + length:
                break
            self._message += self.received[self._at + 5 : self._at + 5 + length]
            self._at += 5 + length
            if (name := self._parsed()) is not None:
                return name
        if self.received and self.received[0] != _HANDSHAKE:
            raise NoClientHello("this is not TLS")
        if len(self.received) > LONGEST:
            raise NoClientHello("the ClientHello is too long")
        return None

    def _length(self) -> int:
        return int.from_bytes(self.received[self._at + 3 : self._at + 5], "big")

    def _parsed(self) -> str | None:
        if len(self._message) < 4:
            return None
        if self._message[0] != _CLIENT_HELLO:
            raise NoClientHello("the first message is another one")
        length = int.from_bytes(self._message[1:4], "big")
        if length > LONGEST:
            raise NoClientHello("the ClientHello is too long")
        if len(self._message) < 4 + length:
            return None
        return server_name(bytes(self._message[4 : 4 + length]))


class _Fields:
    """Reads fields of a message one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, length: int) -> bytes:
        end = self.at + length
        if end > len(self.data):
            raise NoClientHello("a field is longer than the message")
        taken, self.at = self.data[self.at : end], end
        return taken

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def vector(self, length: int) -> bytes:
        return self.take(self.number(length))

    @property
    def left(self) -> bool:
        return self.at < len(self.data)


def server_name(body: bytes) -> str:
    """Return the server name in the body of a ClientHello. NoClientHello if it is malformed, or has none or several."""
    hello = _Fields(body)
    hello.take(34)  # version, random
    hello.vector(1)  # session ID
    hello.vector(2)  # cipher suites
    hello.vector(1)  # compression methods
    if not hello.left:
        raise NoClientHello("there is no server name")
    extensions = hello.vector(2)
    if hello.left:
        raise NoClientHello("bytes follow the extensions")
    names = [name for type_, value in _extensions(extensions) if type_ == _SERVER_NAME for name in _names(value)]
    if len(names) != 1:
        raise NoClientHello("there is no server name" if not names else "there are several server names")
    try:
        return names[0].decode("ascii")
    except UnicodeDecodeError:
        raise NoClientHello("the server name is not ASCII") from None


def _extensions(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each extension."""
    at, size = 0, len(data)
    while at < size:
        if at + 4 > size:
            raise NoClientHello("a field is longer than the message")
        type_, length = _EXTENSION.unpack_from(data, at)
        at += 4 + length
        if at > size:
            raise NoClientHello("a field is longer than the message")
        yield type_, data[at - length : at]


def _names(value: bytes) -> list[bytes]:
    outer = _Fields(value)
    listed, names = _Fields(outer.vector(2)), []
    while listed.left:
        if listed.number(1) != _HOST_NAME:
            raise NoClientHello("the server name has an unknown type")
        names.append(listed.vector(2))
    if outer.left:
        raise NoClientHello("bytes follow the server names")
    return names
