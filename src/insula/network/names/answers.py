"""What a client is told: the part of an upstream answer that its rules allow.

An answer is taken apart and composed anew. Only the chain of CNAME records from the question to the addresses is kept
(RFC 1034, 3.6.2), with the addresses that names outside may lead to; of a negative answer its SOA record (RFC 2308).
Everything else, such as additional records and signatures, is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Final, NamedTuple

from insula.network.names import wire
from insula.network.names.wire import AAAA, CNAME, HTTPS, SOA, SVCB, A, MalformedMessage, Message, Question, Record

MAX_CHAIN: Final = 16  # CNAME records
MAX_TTL: Final = 300  # seconds that clients are told: a name is asked for again before its lease ends
LONGEST_TTL: Final = 86_400  # seconds that are believed
_ADDRESS_LENGTHS: Final = {A: 4, AAAA: 16}
_DROPPED_PARAMETERS: Final = {4, 5, 6}
"""Parameters of SVCB and HTTPS records that are removed (RFC 9460): ipv4hint and ipv6hint are addresses that nobody
checked, and ech would hide the server name."""
_PAIR: Final = struct.Struct("!HH")


class FoundAddresses(NamedTuple):
    """The addresses of an answer.

    `names` has the question's name and those that it is an alias of, normalised. `ttl` is the shortest of its records.
    """

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    ttl: int


def follow(answer: Message, question: Question) -> tuple[list[Record], list[Record]]:
    """Return the CNAME records from the question's name on, and the records of the wanted type at the chain's end.

    MalformedMessage if the chain is a loop or too long.
    """
    aliases: dict[bytes, Record] = {}
    for record in answer.answers:
        if record.type == CNAME and record.class_ == wire.IN:
            aliases.setdefault(record.name.lower(), record)
    chain: list[Record] = []
    name = question.name.lower()
    while (alias := aliases.get(name)) is not None and question.type != CNAME:
        chain.append(alias)
        name = alias.data.lower()
        if len(chain) > MAX_CHAIN:
            raise MalformedMessage("a chain of CNAME records is a loop, or too long")
    wanted = [
        record
        for record in answer.answers
        if record.type == question.type and record.class_ == wire.IN and record.name.lower() == name
    ]
    return chain, wanted


def found_in(chain: Sequence[Record], records: Sequence[Record], question: Question) -> FoundAddresses:
    """Return names and addresses of an answer to a question of type A or AAAA."""
    length = _ADDRESS_LENGTHS[question.type]
    addresses = [str(ip_address(record.data)) for record in records if len(record.data) == length]
    names = (wire.text_of(question.name), *(wire.text_of(record.data) for record in chain))
    ttl = min((record.ttl for record in (*chain, *records)), default=0)
    return FoundAddresses(names, tuple(dict.fromkeys(addresses)), min(ttl, LONGEST_TTL))


def compose_answer(
    answer: Message, question: Question, chain: Sequence[Record], records: Sequence[Record]
) -> tuple[list[Record], list[Record]]:
    """Return the answers and authorities that the client is told. The chain begins with the name as it was asked."""
    told, name = [], question.name
    for record in chain:
        told.append(Record(name, CNAME, wire.IN, min(record.ttl, MAX_TTL), record.data))
        name = record.data
    told += [Record(name, record.type, wire.IN, min(record.ttl, MAX_TTL), record.data) for record in records]
    if records:
        return told, []
    return told, [soa._replace(ttl=min(soa.ttl, MAX_TTL)) for soa in answer.authorities if soa.type == SOA][:1]


def services(records: Sequence[Record], question: Question, allowed: Callable[[str], bool]) -> list[Record]:
    """Return SVCB and HTTPS records without hints and ECH; those about names that are not allowed are left out."""
    if question.type not in (SVCB, HTTPS):
        return []
    return [record._replace(data=data) for record in records if (data := _service(record.data, allowed)) is not None]


def _service(data: bytes, allowed: Callable[[str], bool]) -> bytes | None:
    """Return the data of a record without some parameters (RFC 9460, 2.2); None if it is malformed, its target is not
    allowed, or what was removed is mandatory."""
    at = 2
    while at < len(data) and 0 < data[at] < 64:
        at += 1 + data[at]
    if at >= len(data) or data[at] != 0:
        return None
    target, at = data[2 : at + 1], at + 1
    if target != wire.ROOT and not allowed(wire.text_of(target)):
        return None
    kept = bytearray(data[:at])
    while at < len(data):
        if at + 4 > len(data):
            return None
        key, length = _PAIR.unpack_from(data, at)
        end = at + 4 + length
        if end > len(data):
            return None
        value = data[at + 4 : end]
        if key == 0 and any(
            int.from_bytes(value[i : i + 2], "big") in _DROPPED_PARAMETERS for i in range(0, length, 2)
        ):
            return None
        if key not in _DROPPED_PARAMETERS:
            kept += data[at:end]
        at = end
    return bytes(kept)
