"""The source addresses that ports may send from: each port with its own MAC address and with any other, each address.

An element of a set that names another port does not matter to a port, so it is enough to ask about a port's own MAC
address, those that elements of sets allow it, and all others together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from insula.kernel.netlink.messages import Link
from insula.network.interpreter.boundaries import collect
from insula.network.interpreter.delivery import NetworkPlace
from insula.network.interpreter.fields import HeaderFields, State, initial
from insula.network.interpreter.interpretation import Forgery
from insula.network.interpreter.machine import Machine
from insula.network.interpreter.program import InstalledSet, Lookup
from insula.network.interpreter.space import BITS, ECHO, ICMP, ICMPV6, TCP, UDP, Boundaries, NumberRange, Service, Space
from insula.network.interpreter.values import Symbolic
from insula.network.linux.interpreter.bytecode import device_name
from insula.network.linux.interpreter.forwarding import PREROUTING
from insula.network.linux.interpreter.stack import Stack

_ARP: Final = 0x0806
_DHCP: Final = Service(NumberRange(UDP, UDP), NumberRange(68, 68), NumberRange(67, 67))
"""Requests of DHCP clients. They come from 0.0.0.0 (RFC 2131), as do ARP probes (RFC 5227)."""
_MAC: Final = 6


class PortIdentity(NamedTuple):
    """A port's device, its MAC address, and the (MAC address, IP addresses) that it may send from, by version of IP."""

    place: NetworkPlace
    device: Link
    mac: str
    allowed: Mapping[int, Sequence[tuple[str, NumberRange]]]

    def macs(self, version: int) -> set[int]:
        """Return the MAC addresses that it may send from."""
        return {number(self.mac), *(number(mac) for mac, _ in self.allowed.get(version, ()))}

    def permits(self, version: int, mac: NumberRange, address: NumberRange) -> bool:
        """Whether it may send from all of these addresses."""
        return any(
            mac == (number(own), number(own)) and range_.low <= address.low and address.high <= range_.high
            for own, range_ in self.allowed.get(version, ())
        )


class _Variant(NamedTuple):
    """A port that sends with a MAC address, or with any of several."""

    port: PortIdentity
    mac: NumberRange


class Spoofing:
    """`unknown` collects what was not understood."""

    def __init__(self, stack: Stack, ports: Sequence[PortIdentity]) -> None:
        self._program = stack.program
        self._ports = [port for port in ports if port.device.master]
        self._variants = list(self._all_variants())
        self.unknown: set[str] = set()

    def forgeries(self, version: int) -> Iterator[Forgery]:
        """Yield what ports may send with a source that is not theirs."""
        if not self._ports:
            return
        boundaries = Boundaries(version)
        for table in self._program.tables:
            for chain in table.chains.values():
                for rule in chain.rules:
                    for step in rule.steps:
                        if isinstance(step, Lookup):
                            self._cut(step, table.sets, boundaries)
        collect(self._program, boundaries)
        for port in self._ports:
            for _, range_ in port.allowed.get(version, ()):
                boundaries.addresses.add(*range_)
        boundaries.addresses.add(0, 0)
        yield from self._run(version, "ip", boundaries)
        yield from self._run(version, "arp" if version == 4 else "nd", boundaries)

    def _cut(self, step: Lookup, sets: Mapping[str, InstalledSet], boundaries: Boundaries) -> None:
        """Add the addresses of elements, whichever field of a packet they are compared with."""
        elements, size = sets.get(step.set), BITS[boundaries.version] // 8
        if elements is None or elements.changes:
            return
        wanted = [number for number, term in enumerate(step.terms) if term.length == size]
        for entry in elements.entries(tuple(term.length for term in step.terms)) if wanted else ():
            for number in wanted:
                boundaries.addresses.add(*entry.keys[number])

    def _all_variants(self) -> Iterator[_Variant]:
        macs = self._macs()
        for port in self._ports:
            own = port.macs(4) | port.macs(6)
            known = sorted({*own, *macs.get(device_name(port.device.name), ()), *macs.get(None, ())})
            for mac in known:
                yield _Variant(port, NumberRange(mac, mac))
            for low, high in _between(known):
                yield _Variant(port, NumberRange(low, high))

    def _macs(self) -> dict[int | None, set[int]]:
        """Return the MAC addresses in elements by the device that stands beside them; None for those without one."""
        found: dict[int | None, set[int]] = {}
        for table in self._program.tables:
            for chain in table.chains.values():
                for step in (step for rule in chain.rules for step in rule.steps):
                    if not isinstance(step, Lookup) or step.set not in table.sets or table.sets[step.set].changes:
                        continue
                    lengths = tuple(term.length for term in step.terms)
                    at = [number for number, length in enumerate(lengths) if length == _MAC]
                    device = next((n for n, length in enumerate(lengths) if length == 16), None)
                    for entry in table.sets[step.set].entries(lengths) if at else ():
                        name = entry.keys[device].low if device is not None else None
                        found.setdefault(name, set()).update(entry.keys[number].low for number in at)
        return found

    # -- runs --------------------------------------------------------------------------------------------------------

    def _run(self, version: int, protocol: str, boundaries: Boundaries) -> Iterator[Forgery]:
        services = _services(version, protocol)
        space = Space(len(self._variants), boundaries.addresses.atoms(), services)
        fields = HeaderFields(version, space)
        machine = Machine(self._program, space, fields)
        live = machine.hook(("bridge",), PREROUTING, self._state(version, protocol, space), space.all)
        self.unknown |= machine.unknown
        for source, target, service in space.classes(live):
            variant, range_ = self._variants[source], space.targets[target]
            port, mac = variant
            known = mac.low == mac.high and mac.low in port.macs(version)
            nobody = version == 4 and range_ == (0, 0) and (protocol == "arp" or services[service] == _DHCP)
            if not (port.permits(version, mac, range_) or (known and nobody)):
                yield Forgery(_name(port.place), protocol, not known, version, range_)

    def _state(self, version: int, protocol: str, space: Space) -> State:
        size = BITS[version] // 8
        state = initial(space, version)
        macs = space.by_source(_MAC, [each.mac for each in self._variants])
        names = [device_name(each.port.device.name) for each in self._variants]
        state["iifname"] = space.by_source(16, [NumberRange(name, name) for name in names])
        state["smac"] = macs
        if protocol == "arp":
            state["ethertype"] = Symbolic.constant(2, _ARP, space.all)
            state["arp htype"] = Symbolic.constant(2, 1, space.all)
            state["arp ptype"] = Symbolic.constant(2, 0x0800, space.all)
            state["arp operation"] = space.by_service(2, [each.code for each in space.services])
            state["arp smac"] = macs
        if protocol == "nd":  # the sender's own address, and any address in the message
            own = [each.port.allowed.get(version, ()) for each in self._variants]
            known = [each.port.place.kind == "port" for each in self._variants]  # else it is one of several stations
            firsts = [some[0][1] if some and is_one else None for some, is_one in zip(own, known, strict=True)]
            state["saddr"] = space.by_source(size, firsts)
            state["nd target"] = space.by_target(size)
        else:
            state["saddr"] = space.by_target(size)
        return state


def _name(place: NetworkPlace) -> str:
    return f"{place.name} on other hosts" if place.kind == "overlay" else place.name


def number(mac: str) -> int:
    """Return a MAC address as a number."""
    return int(mac.replace(":", ""), 16)


def _services(version: int, protocol: str) -> list[Service]:
    """Return a few services that stand for all: what a port may send does not depend on ports."""
    any_port, zero = NumberRange(0, 0xFFFF), NumberRange(0, 0)
    icmp = ICMP if version == 4 else ICMPV6
    if protocol == "arp":  # a request, and an answer
        return [Service(zero, None, None, NumberRange(each, each)) for each in (1, 2)]
    if protocol == "nd":
        return [Service(NumberRange(icmp, icmp), None, NumberRange(136, 136), zero)]
    return [
        Service(NumberRange(TCP, TCP), any_port, any_port),
        Service(NumberRange(UDP, UDP), NumberRange(1024, 0xFFFF), any_port),
        _DHCP,
        Service(NumberRange(icmp, icmp), None, NumberRange(ECHO[version], ECHO[version]), zero),
    ]


def _between(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of MAC addresses of single stations that are between these values. The address zero and those of
    groups are no sources (IEEE 802), but the filter has to see that."""
    at = 0
    for value in values:
        if at < value:
            yield at, value - 1
        at = value + 1
    yield at, (1 << 48) - 1
