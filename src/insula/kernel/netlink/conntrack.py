"""Connections that the kernel tracks (ctnetlink): list those to an address or port, and delete them.

An entry of the table has two tuples: that of the first packet (original), and that of the replies. Translation of
addresses (NAT) is decided when an entry is made, and holds until it is gone. So a change of the translation concerns
connections that exist only if their entries are deleted: the next packet then makes a new one. That matters most for
UDP, where a client that keeps sending keeps its entry (include/uapi/linux/netfilter/nfnetlink_conntrack.h).

The kernel filters dumps by parts of a tuple since Linux 5.8 (CTA_FILTER). Its filter of IPv6 addresses lists those that
differ, so these are compared here only.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Final, NamedTuple

from insula.kernel.netlink import attributes
from insula.kernel.netlink.attributes import NESTED
from insula.kernel.netlink.socket import NetlinkSocket, Request

_NETLINK_NETFILTER: Final = 12
_GET, _DELETE, _GET_STATS = 0x101, 0x102, 0x105  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET, _DELETE and _GET_STATS
_GLOBAL_ENTRIES = 1  # CTA_STATS_GLOBAL_ENTRIES
_ORIGINAL, _REPLY, _MARK, _ID, _ZONE, _FILTER = 1, 2, 8, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_ADDRESSES: Final = {4: (1, 2), 6: (3, 4)}  # CTA_IP_V4_SRC and _DST, CTA_IP_V6_SRC and _DST
_PROTOCOL, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_BY_SOURCE, _BY_DESTINATION, _BY_PROTOCOL, _BY_PORT = 1 << 0, 1 << 1, 1 << 3, 1 << 5
_MOST_ASKED: Final = 512
"""Entries that are asked for one by one: more take as long as a dump."""
_TOGETHER: Final = 64  # of them in one system call: the answers have to fit into the socket's buffer
_ANY: Final = struct.pack("!BBH", socket.AF_UNSPEC, 0, 0)
PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "icmp6": 58}


class Tuple(NamedTuple):
    """One direction of a connection; the ports are 0 where the protocol has none."""

    source: str
    destination: str
    protocol: int
    source_port: int
    destination_port: int


class Connection(NamedTuple):
    """An entry; `handle` are its identifying attributes as the kernel listed them, `mark` is what rules have set."""

    original: Tuple
    reply: Tuple
    handle: bytes
    mark: int = 0


class Match(NamedTuple):
    """A condition on one tuple of an entry: the original one, or with `reply` that of the replies. None matches any.

    `ports` are the first and last destination port, `source_ports` those of the source. With `translated` only entries
    match whose destination was translated.
    """

    destination: str | None = None
    source: str | None = None
    protocol: str | None = None
    ports: tuple[int, int] | None = None
    source_ports: tuple[int, int] | None = None
    reply: bool = False
    version: int = 4
    translated: bool = False

    def matches(self, connection: Connection) -> bool:
        """Whether an entry fulfils the condition."""
        found = connection.reply if self.reply else connection.original
        return (
            self.destination in (None, found.destination)
            and self.source in (None, found.source)
            and (self.protocol is None or PROTOCOLS[self.protocol] == found.protocol)
            and (self.ports is None or self.ports[0] <= found.destination_port <= self.ports[1])
            and (self.source_ports is None or self.source_ports[0] <= found.source_port <= self.source_ports[1])
            and not (self.translated and connection.original.destination == connection.reply.source)
        )


def to(destination: str, protocol: str | None = None, ports: tuple[int, int] | None = None) -> Match:
    """Return the condition that the first packet was sent to this address and, unless None, protocol and ports."""
    return Match(destination, protocol=protocol, ports=ports, version=_version(destination))


class ConntrackSocket(NetlinkSocket):
    """A socket in the network namespace of the calling thread. Its methods may be called from any thread."""

    def __init__(self) -> None:
        super().__init__(_NETLINK_NETFILTER)

    def connections(self, match: Match) -> list[Connection]:
        """Return the entries that match. NetlinkError."""
        found = (_parse(body) for body in self.dump(_GET, _request(match)))
        return [each for each in found if each is not None and match.matches(each)]

    def every(self) -> Sequence[Connection]:
        """Return all entries, of both IP versions. NetlinkError."""
        return ConnectionTable(self).read()

    def count(self) -> int:
        """Return the number of the namespace's entries. NetlinkError."""
        return count(self)

    def pairs(self, version: int) -> set[tuple[str, str]]:
        """Return source and destination of all entries of an IP version, as first packets had them. NetlinkError."""
        found = set()
        for body in self.dump(_GET, _header(version)):
            parts = attributes.parse(attributes.parse(body[4:]).get(_ORIGINAL, b""))
            addresses = attributes.parse(parts.get(_TUPLE_IP, b""))
            found.add(tuple(addresses.get(kind, b"") for kind in _ADDRESSES[version]))
        return {(str(ip_address(one)), str(ip_address(other))) for one, other in found if one and other}

    def delete(self, matches: Iterable[Match]) -> int:
        """Delete the entries that match one of the conditions; returns how many there were. NetlinkError."""
        gone = {each.handle: match.version for match in matches for each in self.connections(match)}
        requests = [
            Request("delete a connection", _DELETE, 0, _header(version) + handle, frozenset({errno.ENOENT}))
            for handle, version in gone.items()
        ]
        for start in range(0, len(requests), 256):
            self.execute(*requests[start : start + 256])
        return len(gone)


def count(netfilter: NetlinkSocket) -> int:
    """Return the number of the entries of the namespace that a socket of NETLINK_NETFILTER is in. NetlinkError."""
    stats = netfilter.get(_GET_STATS, _ANY)
    return int.from_bytes(attributes.parse(stats[4:])[_GLOBAL_ENTRIES], "big")


class ConnectionTable:
    """All entries of one namespace, of both IP versions, read again and again by a socket of NETLINK_NETFILTER in it.

    The kernel looks through the table of all namespaces for a dump, which takes 5 to 12 ms. It is not needed if the
    namespace has as many entries as the last time, and the kernel finds each of these, which takes 10 µs: then there
    are no others.
    """

    def __init__(self, netfilter: NetlinkSocket) -> None:
        self._netfilter = netfilter
        self._known: dict[bytes, Connection] = {}  # by what does not change with time

    def read(self) -> Sequence[Connection]:
        """Return the entries. NetlinkError."""
        number = count(self._netfilter)
        if number == 0:
            self._known = {}
        elif number != len(self._known) or number > _MOST_ASKED or not self._same():
            known, self._known = self._known, {}
            for body in self._netfilter.dump(_GET, _ANY):
                key, parts = _lasting(body)
                if (each := known.get(key) or _parsed(parts)) is not None:
                    self._known[key] = each
        return list(self._known.values())

    def _same(self) -> bool:
        """Whether the kernel still has each entry as it was."""
        known = list(self._known.items())
        for first in range(0, len(known), _TOGETHER):
            some = known[first : first + _TOGETHER]
            asked = [_header(_version(each.original.source)) + each.handle for _, each in some]
            for (key, _), answer in zip(some, self._netfilter.ask(_GET, asked), strict=True):
                if answer is None or _lasting(answer)[0] != key:
                    return False
        return True


def _request(match: Match) -> bytes:
    """Return the body of a dump that the kernel filters by address, protocol and single port."""
    flags, addresses, protocol = 0, list[tuple[int, bytes]](), list[tuple[int, bytes]]()
    of_source, of_destination = _ADDRESSES[match.version]
    for address, kind, flag in (
        (match.source, of_source, _BY_SOURCE),
        (match.destination, of_destination, _BY_DESTINATION),
    ):
        if address is not None and match.version == 4:
            flags |= flag
            addresses.append((kind, ip_address(address).packed))
    if match.protocol is not None:
        flags |= _BY_PROTOCOL
        protocol.append((_PROTOCOL, bytes([PROTOCOLS[match.protocol]])))
        if match.ports and match.ports[0] == match.ports[1]:
            flags |= _BY_PORT
            protocol.append((_DESTINATION_PORT, struct.pack("!H", match.ports[0])))
    if not flags:
        return _header(match.version)
    parts = [(_TUPLE_IP | NESTED, attributes.attributes(*addresses))] if addresses else []
    parts += [(_TUPLE_PROTOCOL | NESTED, attributes.attributes(*protocol))] if protocol else []
    ours, theirs = (_FILTER_REPLY, _FILTER_ORIGINAL) if match.reply else (_FILTER_ORIGINAL, _FILTER_REPLY)
    wanted = attributes.attributes((ours, attributes.u32(flags)), (theirs, attributes.u32(0)))
    kind = _REPLY if match.reply else _ORIGINAL
    return _header(match.version) + attributes.attributes(
        (kind | NESTED, attributes.attributes(*parts)), (_FILTER | NESTED, wanted)
    )


def _parse(body: bytes) -> Connection | None:
    """Return the entry; None for one of another kind than IPv4 and IPv6."""
    return _parsed(attributes.parse(body[4:]))


def _lasting(body: bytes) -> tuple[bytes, dict[int, bytes]]:
    """Return what an entry keeps as long as rules don't change it, as bytes, and all of its attributes."""
    found = attributes.parse(body[4:])
    return b"|".join([found.get(each, b"") for each in (_ORIGINAL, _REPLY, _MARK, _ID, _ZONE)]), found


def _parsed(found: Mapping[int, bytes]) -> Connection | None:
    original, reply = (_tuple(found.get(kind, b"")) for kind in (_ORIGINAL, _REPLY))
    if original is None or reply is None:
        return None
    handle = attributes.attributes((_ORIGINAL | NESTED, found[_ORIGINAL]), (_ID, found.get(_ID)))
    mark = int.from_bytes(found.get(_MARK, b""), "big")
    return Connection(original, reply, handle, mark)


def _tuple(data: bytes) -> Tuple | None:
    parts = attributes.parse(data)
    addresses = attributes.parse(parts.get(_TUPLE_IP, b""))
    protocol = attributes.parse(parts.get(_TUPLE_PROTOCOL, b""))
    for source, destination in _ADDRESSES.values():
        if source in addresses and destination in addresses:
            ports = (int.from_bytes(protocol.get(each, b""), "big") for each in (_SOURCE_PORT, _DESTINATION_PORT))
            number = protocol.get(_PROTOCOL, b"\0")[0]
            return Tuple(_address(addresses[source]), _address(addresses[destination]), number, *ports)
    return None


@functools.lru_cache(maxsize=8192)
def _address(packed: bytes) -> str:
    return str(ip_address(packed))


def _header(version: int) -> bytes:
    """Return a `struct nfgenmsg`."""
    return struct.pack("!BBH", socket.AF_INET6 if version == 6 else socket.AF_INET, 0, 0)


def _version(address: str) -> int:
    return 6 if ":" in address else 4
