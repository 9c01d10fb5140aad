"""The wire format of DNS messages (RFC 1035), parsed and composed.

Names are kept as bytes in wire format, without compression: each label after its length, and the root's empty label.
Names of resource data are decompressed for the types of RFC 1035 that the forwarder uses, CNAME, SOA and PTR; the data
of other types is copied as it is. RFC 3597 forbids compression in newer types.

Everything parsed here comes from hostile instances or servers. A compression pointer must lead to an earlier place than
the name it is in, so parsing ends. Names that were parsed are remembered by their place, so the time is linear.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

A, NS, CNAME, SOA, PTR, AAAA, OPT, SVCB, HTTPS, ANY = 1, 2, 5, 6, 12, 28, 41, 64, 65, 255
IN: Final = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)
RESPONSE, AUTHORITATIVE, TRUNCATED, RECURSION_DESIRED, RECURSION_AVAILABLE = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
OPCODE: Final = 0x7800
MAX_NAME: Final = 255  # RFC 1035, 2.3.4
MAX_LABEL_LENGTH: Final = 63
MAX_RECORDS: Final = 4096  # of one message; more don't fit with an owner's name that is useful
ROOT: Final = b"\0"
_HEADER: Final = struct.Struct("!6H")
_QUESTION: Final = struct.Struct("!HH")
_RECORD: Final = struct.Struct("!HHIH")
_POINTER: Final = 0xC000


class MalformedMessage(ValueError):
    """A message breaks the format."""


class Question(NamedTuple):
    """A question; `name` is spelled as in the message."""

    name: bytes
    type: int
    class_: int = IN


class Record(NamedTuple):
    """A resource record. Names in `data` are not compressed."""

    name: bytes
    type: int
    class_: int
    ttl: int
    data: bytes


@dataclass
class Message:
    """A DNS message; `flags` has opcode and response code too."""

    id: int
    flags: int = 0
    questions: list[Question] = field(default_factory=list)
    answers: list[Record] = field(default_factory=list)
    authorities: list[Record] = field(default_factory=list)
    additionals: list[Record] = field(default_factory=list)

    @property
    def rcode(self) -> int:
        """The response code, without the upper bits of EDNS."""
        return self.flags & 15


# -- names -----------------------------------------------------------------------------------------------------------


def name_of(text: str) -> bytes:
    """Return the wire format of a name in ASCII, with or without a dot at the end. MalformedMessage."""
    labels = text.removesuffix(".").encode("ascii", "strict").split(b".") if text not in ("", ".") else []
    if not all(0 < len(label) <= MAX_LABEL_LENGTH for label in labels):
        raise MalformedMessage("a label is empty or too long")
    name = b"".join(bytes([len(label)]) + label for label in labels) + ROOT
    if len(name) > MAX_NAME:
        raise MalformedMessage("a name is too long")
    return name


def labels_of(name: bytes) -> list[bytes]:
    """Return the labels of a name in wire format, without the root's."""
    labels, at = [], 0
    while length := name[at]:
        labels.append(name[at + 1 : at + 1 + length])
        at += 1 + length
    return labels


def text_of(name: bytes) -> str:
    """Return a name as text in lower case, without a dot at the end; odd bytes are escaped (RFC 1035, 5.1)."""
    return ".".join("".join(map(_escaped, label)) for label in labels_of(name.lower()))


def _escaped(byte: int) -> str:
    if byte in b".\\":
        return f"\\{byte:c}"
    return chr(byte) if 0x20 < byte < 0x7F else f"\\{byte:03d}"


# -- parsing ---------------------------------------------------------------------------------------------------------


def parse(data: bytes) -> Message:
    """Parse a message. MalformedMessage; bytes after its last record are an error too."""
    try:
        return _parse(data)
    except (IndexError, struct.error) as error:
        raise MalformedMessage("the message ends too early") from error


def _parse(data: bytes) -> Message:
    id_, flags, *counts = _HEADER.unpack_from(data)
    if sum(counts) > MAX_RECORDS:
        raise MalformedMessage("too many records")
    message, names, at = Message(id_, flags), dict[int, bytes](), _HEADER.size
    for _ in range(counts[0]):
        name, at = _name(data, at, names)
        message.questions.append(Question(name, *_QUESTION.unpack_from(data, at)))
        at += _QUESTION.size
    for count, section in zip(counts[1:], (message.answers, message.authorities, message.additionals), strict=True):
        for _ in range(count):
            record, at = _record(data, at, names)
            section.append(record)
    if at != len(data):
        raise MalformedMessage("bytes follow the last record")
    return message


def _record(data: bytes, at: int, names: dict[int, bytes]) -> tuple[Record, int]:
    name, at = _name(data, at, names)
    type_, class_, ttl, length = _RECORD.unpack_from(data, at)
    at += _RECORD.size
    end = at + length
    if end > len(data):
        raise MalformedMessage("a record is longer than the message")
    body = data[at:end]
    if type_ in (CNAME, PTR, NS):
        body, stop = _name(data, at, names)
        if stop != end:
            raise MalformedMessage("a record's name does not fill it")
    elif type_ == SOA:
        first, at = _name(data, at, names)
        second, at = _name(data, at, names)
        if end - at != 20:
            raise MalformedMessage("a SOA record has another length")
        body = first + second + data[at:end]
    return Record(name, type_, class_, ttl if ttl < 1 << 31 else 0, body), end  # RFC 2181, 8


def _name(data: bytes, start: int, names: dict[int, bytes]) -> tuple[bytes, int]:
    """Parse the name at `start`; returns it and the place after it. `names` has those that end at a pointer or root."""
    labels, at = [], start
    while True:
        length = data[at]
        if length < 0x40:
            labels.append((at, data[at : at + 1 + length]))
            at += 1 + length
            if at > len(data):
                raise MalformedMessage("a label is longer than the message")
            if not length:
                name = b""
                break
        elif length >= 0xC0:
            target = (length & 0x3F) << 8 | data[at + 1]
            at += 2
            if target >= start or target not in names:
                raise MalformedMessage("a compression pointer leads to no earlier name")
            name = names[target]
            break
        else:
            raise MalformedMessage("a label has a reserved type")
    for place, label in reversed(labels):
        name = label + name
        names[place] = name
    if len(name) > MAX_NAME:
        raise MalformedMessage("a name is too long")
    return name, at


# -- composing -------------------------------------------------------------------------------------------------------


def compose(message: Message, limit: int = 65535) -> bytes:
    """Return the message's bytes, at most `limit`. If the records don't fit, the message has only its question and OPT
    record, and says that it is truncated (RFC 2181, 9)."""
    whole = _compose(message, message.answers, message.authorities, message.additionals, message.flags)
    if len(whole) <= limit:
        return whole
    kept = [record for record in message.additionals if record.type == OPT]
    return _compose(message, (), (), kept, message.flags | TRUNCATED)


def _compose(
    message: Message,
    answers: Iterable[Record],
    authorities: Iterable[Record],
    additionals: Iterable[Record],
    flags: int,
) -> bytes:
    sections = [list(answers), list(authorities), list(additionals)]
    out = bytearray(_HEADER.pack(message.id, flags, len(message.questions), *map(len, sections)))
    places: dict[bytes, int] = {}
    for question in message.questions:
        _put_name(out, question.name, places)
        out += _QUESTION.pack(question.type, question.class_)
    for record in (record for section in sections for record in section):
        _put_name(out, record.name, places)
        at = len(out)
        out += _RECORD.pack(record.type, record.class_, record.ttl, 0)
        if record.type in (CNAME, PTR, NS):
            _put_name(out, record.data, places)
        else:
            out += record.data
        struct.pack_into("!H", out, at + 8, len(out) - at - _RECORD.size)
    return bytes(out)


def _put_name(out: bytearray, name: bytes, places: dict[bytes, int]) -> None:
    """Append a name; its end is replaced by a pointer if it was written before. A name's case is that of the first."""
    at = 0
    while name[at]:
        rest = name[at:]
        if (place := places.get(rest)) is not None:
            out += (_POINTER | place).to_bytes(2, "big")
            return
        if len(out) < _POINTER >> 2:
            places[rest] = len(out)
        out += name[at : at + 1 + name[at]]
        at += 1 + name[at]
    out += ROOT
