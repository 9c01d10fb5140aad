"""Extension mechanisms for DNS (EDNS, RFC 6891): the OPT record, and errors with a reason (RFC 8914)."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from insula.network.names.wire import OPT, ROOT, MalformedMessage, Message, Record

UDP_SIZE: Final = 1232
"""The largest message that is sent or asked for over UDP, in bytes: it fits the smallest MTU of IPv6 (DNS flag day
2020)."""
PLAIN_SIZE: Final = 512  # without EDNS
ERROR_OPTION: Final = 15
FILTERED, PROHIBITED, NETWORK_ERROR = 17, 18, 23  # RFC 8914, 4
_HEAD: Final = struct.Struct("!HH")


class Edns(NamedTuple):
    """An OPT record: the largest UDP message of its sender, and the version."""

    size: int
    version: int


def edns_of(message: Message) -> Edns | None:
    """Return the OPT record's contents, None if there is none. MalformedMessage if there are several or it is wrong."""
    found = [record for record in message.additionals if record.type == OPT]
    if not found:
        return None
    if len(found) > 1 or found[0].name != ROOT:
        raise MalformedMessage("the OPT record is not the only one, or has a name")
    return Edns(max(PLAIN_SIZE, found[0].class_), found[0].ttl >> 16 & 0xFF)


def opt(error: int | None = None, text: str = "", *, version_error: bool = False) -> Record:
    """Return an OPT record, with an error's reason. `version_error` is the response code BADVERS (16)."""
    data = b""
    if error is not None:
        reason = error.to_bytes(2, "big") + text.encode()
        data = _HEAD.pack(ERROR_OPTION, len(reason)) + reason
    return Record(ROOT, OPT, UDP_SIZE, 1 << 24 if version_error else 0, data)


def errors_in(message: Message) -> list[int]:
    """Return the codes of the errors (RFC 8914) in a message's OPT record."""
    found = []
    for record in message.additionals:
        at = 0
        while record.type == OPT and at + 4 <= len(record.data):
            code, length = _HEAD.unpack_from(record.data, at)
            if code == ERROR_OPTION and length >= 2:
                found.append(int.from_bytes(record.data[at + 4 : at + 6], "big"))
            at += 4 + length
    return found
