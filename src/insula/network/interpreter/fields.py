"""Header fields in all packet classes, and the terms of rules as values of these fields.

A packet is described by these fields: addresses ``saddr`` and ``daddr``, ``protocol``, ports ``sport`` and ``dport``,
ICMP ``type`` and ``code``, ``smac`` and ``dmac``, ``ethertype``, and properties such as ``iifname``, ``oifname``,
``mark`` and ``priority``. The tuple of the connection's first packet has the names ``original …``; that of its answers
follows from the present addresses (nf_conntrack, RFC 2663).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Final

from insula.network.interpreter.program import (
    AddressType,
    Attribute,
    Choice,
    Constant,
    Load,
    LookupResult,
    Masked,
    RouteDevice,
    Slice,
    Swapped,
    Term,
)
from insula.network.interpreter.space import ICMP, ICMPV6, TCP, UDP, NumberRange, Service, Space
from insula.network.interpreter.values import Symbolic

_LINK: Final = (("dmac", 0, 6), ("smac", 6, 6), ("ethertype", 12, 2))
_PORTS: Final = (("sport", 0, 2), ("dport", 2, 2))
_NETWORK: Final = {
    4: (("protocol", 9, 1), ("saddr", 12, 4), ("daddr", 16, 4)),
    6: (("protocol", 6, 1), ("saddr", 8, 16), ("daddr", 24, 16)),
}
_ARP: Final = (
    ("arp htype", 0, 2),
    ("arp ptype", 2, 2),
    ("arp operation", 6, 2),
    ("arp smac", 8, 6),
    ("saddr", 14, 4),
)
ETHERTYPE: Final = {4: 0x0800, 6: 0x86DD}

_NEW, _UNTRACKED_STATE = 8, 64  # NF_CT_STATE_BIT
_UNTRACKED: Final = frozenset({130, 131, 132, 133, 134, 135, 136, 143})
"""The ICMPv6 types that connection tracking leaves alone (net/netfilter/nf_conntrack_proto_icmpv6.c)."""

State = dict[str, Symbolic]
TRANSLATED: Final = "destination translated"
"""The field that is 1 where the destination of the connection was translated."""
TRANSLATION: Final = "translation"
"""The field with the address and the port, one after the other, that packets were translated to by an element that has
both. It is unknown where they were translated in another way."""


def initial(space: Space, version: int) -> State:
    """Return the fields that the services of a space have."""
    services = space.services
    protocol = space.by_service(1, [each.protocol for each in services])
    return {
        "protocol": protocol,
        "sport": space.by_service(2, [each.source for each in services]),
        "dport": space.by_service(2, [each.target if each.has_ports else None for each in services]),
        "type": space.by_service(1, [each.target if each.is_icmp else None for each in services]),
        "code": space.by_service(1, [each.code for each in services]),
        "ethertype": Symbolic.constant(2, ETHERTYPE[version], space.all),
        "nfproto": Symbolic.constant(1, {4: 2, 6: 10}[version], space.all),
        "l4proto": protocol,
        "mark": Symbolic.constant(4, 0, space.all),
        "priority": Symbolic.constant(4, 0, space.all),
    }


def new_connection(state: State, space: Space) -> None:
    """Add the fields of a connection whose first packet is in `state`."""
    untracked = 0
    for number, each in enumerate(space.services):
        if each.protocol == (ICMPV6, ICMPV6) and each.target and each.target.low in _UNTRACKED:
            untracked |= 1 << number
    untracked = space.of_services(untracked)
    tracked = space.all & ~untracked
    for name in ("saddr", "daddr", "sport", "dport"):
        value = state[name]
        state[f"original {name}"] = Symbolic(value.length, value.only(tracked), value.unknown & tracked)
    states = [(host_order(number, 4), classes) for number, classes in ((_NEW, tracked), (_UNTRACKED_STATE, untracked))]
    state["ct state"] = Symbolic(4, [(number, number, classes) for number, classes in states])
    for name in ("ct mark", "ct status"):
        state[name] = Symbolic.constant(4, 0, tracked)
    state[TRANSLATED] = Symbolic.constant(1, 0, space.all)
    state["ct direction"] = Symbolic.constant(1, 0, tracked)


def host_order(value: int, length: int) -> int:
    """Return a number of the machine as it stands in memory (little-endian machines only have it turned)."""
    return int.from_bytes(value.to_bytes(length, sys.byteorder), "big")


class HeaderFields:
    """The value of any term in a state. `found` has what look-ups of the same rule have found."""

    def __init__(
        self,
        version: int,
        space: Space,
        routes: Callable[[RouteDevice | AddressType, State], Symbolic] | None = None,
        choices: Callable[[Choice], Sequence[int]] = lambda _: (),
    ) -> None:
        self._version = version
        self._space = space
        self._routes = routes
        self._choices = choices
        self._constants: dict[Term, Symbolic] = {}
        self._known: dict[object, tuple[list[Symbolic], Symbolic]] = {}

    def value(self, term: Term, state: State, found: dict[int, Symbolic]) -> Symbolic:
        if isinstance(term, Attribute):  # the most frequent ones first
            return self._attribute(term, state)
        if isinstance(term, Load):
            return self._loaded(term, state)
        if isinstance(term, Constant):
            if term not in self._constants:
                self._constants[term] = Symbolic.constant(term.length, term.value, self._space.all)
            return self._constants[term]
        if isinstance(term, LookupResult):
            return found[term.number]
        if isinstance(term, Masked):
            return self.value(term.of, state, found).masked(term.mask, term.xor)
        if isinstance(term, Swapped):
            return self.value(term.of, state, found).swapped(term.size)
        if isinstance(term, Slice):
            return self.value(term.of, state, found).slice(term.start, term.length)
        if isinstance(term, Choice) and (values := self._choices(term)):
            return Symbolic(term.length, [(each, each, self._space.all) for each in values], 0, self._space.all)
        if isinstance(term, RouteDevice | AddressType) and self._routes:
            return self._routes(term, state)
        return self.unknown(term.length)

    def unknown(self, length: int) -> Symbolic:
        return Symbolic(length, (), self._space.all)

    def pieces(self, term: Term, arp: bool = False) -> list[tuple[Load, int]]:
        """Return the fields that a load of several fields consists of, with the offset of each in the load."""
        if not isinstance(term, Load):
            return []
        found = []
        for _, offset, length in self._layout(term.base, arp=arp):
            low, high = max(offset, term.offset), min(offset + length, term.offset + term.length)
            if low < high:
                found.append((Load(term.base, low, high - low), low - term.offset))
        if len(found) < 2 or sum(load.length for load, _ in found) != term.length:
            return []
        return found

    def field_of(self, load: Load, *, arp: bool = False) -> tuple[str, int, int] | None:
        """Return the field that a load is from, with the offset and length of the field in the header."""
        for name, offset, length in self._layout(load.base, arp=arp):
            if offset <= load.offset and load.offset + load.length <= offset + length:
                return name, offset, length
        return None

    def _layout(self, base: str, *, arp: bool) -> tuple[tuple[str, int, int], ...]:
        if base == "link":
            return _LINK
        if base == "network":
            return _ARP if arp else _NETWORK[self._version]
        return _PORTS if base == "transport" else ()

    def _loaded(self, load: Load, state: State) -> Symbolic:
        if load.base == "transport":
            if "nd target" in state and (load.offset, load.length) == (8, 16):  # RFC 4861, section 4.4
                return state["nd target"]
            return self._transport(load, state)
        where = self.field_of(load, arp="arp operation" in state)
        if where is None or where[0] not in state:
            return self.unknown(load.length)
        name, offset, _ = where
        return state[name].slice(load.offset - offset, load.length)

    def _remembered(self, key: object, make: Callable[[], Symbolic], state: State, *names: str) -> Symbolic:
        """Return what is made of some fields; it is made again if one of them has changed."""
        fields = [state[name] for name in names]
        known = self._known.get(key)
        if known is None or any(one is not other for one, other in zip(known[0], fields, strict=True)):
            known = self._known[key] = fields, make()
        return known[1]

    def _transport(self, load: Load, state: State) -> Symbolic:
        """Return bytes of the transport header: ports of TCP and UDP, type and code of ICMP."""
        fields = ("protocol", "sport", "dport", "type", "code")
        return self._remembered(load, lambda: self._transport_now(load, state), state, *fields)

    def _transport_now(self, load: Load, state: State) -> Symbolic:
        ports = Symbolic(1, [p for p in state["protocol"].parts if p[:2] in ((TCP, TCP), (UDP, UDP))])
        icmp = Symbolic(1, [p for p in state["protocol"].parts if p[:2] in ((ICMP, ICMP), (ICMPV6, ICMPV6))])
        with_ports, with_types = (sum(bits for _, _, bits in each.parts) for each in (ports, icmp))
        parts: list[tuple[int, int, int]] = []
        known = several = 0
        start, end = load.offset, load.offset + load.length
        for name, offset in (("sport", 0), ("dport", 2)):
            if offset <= start and end <= offset + 2:
                one = state[name].slice(start - offset, load.length)
                parts += one.only(with_ports)
                known |= with_ports & ~one.unknown
                several |= one.several
        for name, offset in (("type", 0), ("code", 1)):
            if (start, end) == (offset, offset + 1):
                parts += state[name].only(with_types)
                known |= with_types & ~state[name].unknown
        if (start, end) == (0, 2):  # type and code together
            for low, high, bits in state["type"].only(with_types):
                for first, last, more in state["code"].only(bits):
                    if low == high or (first, last) == (0, 0xFF):
                        parts.append((low << 8 | first, high << 8 | last, more))
                        known |= more
        return Symbolic(load.length, parts, self._space.all & ~known, several)

    def _attribute(self, term: Attribute, state: State) -> Symbolic:
        name = _CONNECTION.get(term.name, term.name)
        if name in ("original proto-dst", "reply proto-src"):
            fields = ("protocol", "sport", "dport", "type", "code", "original dport")
            present = [each for each in fields if each in state]
            return self._remembered(name, lambda: self._port_of_connection(name, state), state, *present)
        if name in state and state[name].length == term.length:
            return state[name]
        if name in state and term.name.startswith("ct "):
            return Symbolic(term.length)  # an address of the other version of IP, which the connection does not have
        return self.unknown(term.length)

    def _port_of_connection(self, name: str, state: State) -> Symbolic:
        """Return the port that a connection is to: before translation, or after it. ICMP has type and code in the
        original tuple (net/netfilter/nf_conntrack_proto_icmp.c)."""
        port = state["original dport" if name == "original proto-dst" else "dport"]
        if name == "reply proto-src":
            without = self._space.of_services(_without_ports(self._space))
            return Symbolic(2, [*port.parts, (0, 0, port.unknown & without)], port.unknown & ~without, port.several)
        types = Load("transport", 0, 2)
        icmp = sum(b for low, high, b in state["protocol"].parts if (low, high) in ((ICMP, ICMP), (ICMPV6, ICMPV6)))
        both = self._transport(types, state)
        unknown = port.unknown & ~icmp | both.unknown & icmp
        without = self._space.of_services(_without_ports(self._space))
        return Symbolic(2, [*port.parts, *both.only(icmp), (0, 0, unknown & without)], unknown & ~without, port.several)


_TRACKED_PORTS: Final = (33, 47, 132, 136)  # DCCP, GRE, SCTP, UDP-Lite have something like ports in their tuples


def _without_ports(space: Space) -> int:
    """Return the services of protocols whose connections have the port 0 (nf_conntrack_proto_generic.c)."""
    found = 0
    for number, each in enumerate(space.services):
        if each.target is None and not any(each.protocol.low <= p <= each.protocol.high for p in _TRACKED_PORTS):
            found |= 1 << number
    return found


_CONNECTION: Final = {
    "ct original saddr": "original saddr",
    "ct original daddr": "original daddr",
    "ct original proto-src": "original sport",
    "ct original proto-dst": "original proto-dst",
    "ct reply saddr": "daddr",  # the answers come from where the packets go to
    "ct reply daddr": "saddr",
    "ct reply proto-src": "reply proto-src",
    "ct reply proto-dst": "sport",
}


def single(range_: NumberRange | None) -> int | None:
    """Return the only number of a range; None if there are several."""
    return range_.low if range_ and range_.low == range_.high else None


def describe(service: Service) -> str:
    """Return a service in words, as in tcp/80."""
    number = single(service.protocol)
    if service.has_ports and service.target:
        ports = _text(service.target, 0xFFFF)
        return f"{'tcp' if number == TCP else 'udp'}{ports}"
    if service.is_icmp and service.target:
        return f"icmp{_text(service.target, 0xFF)}"
    return f"protocol {service.protocol.low}" + (f"-{service.protocol.high}" if number is None else "")


def _text(range_: NumberRange, top: int) -> str:
    if range_ == (0, top):
        return ""
    return f"/{range_.low}" if range_.low == range_.high else f"/{range_.low}-{range_.high}"
