"""The part of the reference model about published ports, floating addresses and load balancers.

Packets to an external address are translated to an instance's address and port. A *door* is such an address with some
ports, and the ends that it leads to. Several doors may have the same address: one of a single port comes before a
floating address, and a door of one address before those of every address of the host.

A fabric has addresses of its own for the way from the host to the tenant: `Entries`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from insula.network.fabric import Entries
from insula.network.intent import TenantIntent
from insula.network.interpreter.delivery import translated
from insula.network.interpreter.space import TCP, UDP, Boundaries, NumberRange, Service
from insula.network.ranges import contains, number_of, overlap, range_of
from insula.network.reference.expectation import is_untracked

_PROTOCOLS: Final = {"tcp": TCP, "udp": UDP}
_NEAR: Final = {4: ("127.0.0.0/8",), 6: ("::1/128", "fe80::/10")}
"""Addresses that a host has beside its own: loopback, and link-local ones (RFC 4291)."""


class End(NamedTuple):
    """Where packets are translated to. The port is `port`, or with None what it was plus `shift`."""

    address: int
    port: int | None = None
    shift: int = 0


class Door(NamedTuple):
    """Packets to `address` (None is every address of the host) with these ports, or with `protocol` None all packets.

    `network` is that of an internal address. Doors of a lower `rank` come first. Packets go to one of `ends`.
    """

    rank: int
    address: str | None
    network: str | None
    protocol: int | None
    ports: NumberRange
    ends: tuple[End, ...]

    def takes(self, service: Service) -> bool:
        """Whether packets of a service are for this door."""
        if self.protocol is None:
            return True
        mine = service.protocol == (self.protocol, self.protocol) and service.target is not None
        return mine and service.target is not None and contains(self.ports, service.target)


class Translated(NamedTuple):
    """A packet after translation: its address, its ports, and the same as text."""

    address: int
    port: NumberRange | None
    text: str


class OutsideReference:
    """The doors of one tenant, for one version of IP."""

    def __init__(self, intent: TenantIntent, version: int, entries: Entries) -> None:
        self.tenant = intent.tenant.name
        self.version = version
        self._entries = entries
        self._doors = sorted(_doors(intent, version), key=lambda door: door.rank)
        self.floating = {each.address for each in intent.outside.floating if _version(each.address) == version}
        self._subnets = [
            range_of(each)
            for network in intent.networks
            for each in (network.subnet, network.subnet6)
            if each and _version(each) == version
        ]
        self._hosts = {each for each in entries.hosts if _version(each) == version}
        self._every = any(door.address is None for door in self._doors)
        self.sources: dict[int, list[str]] = {}
        for each in intent.outside.floating:
            if each.target is not None and _version(each.address) == version:
                self.sources.setdefault(number_of(each.target), []).append(each.address)

    def cut(self, into: Boundaries) -> None:
        """Add the boundaries of all addresses and ports."""
        named = {door.address for door in self._doors if door.address is not None}
        transits = self._entries.transits.values()
        for address in {*named, *self.floating, *self._hosts, *transits, *self._entries.own}:
            if _version(address) == self.version:
                into.addresses.add(number_of(address), number_of(address))
        if self._every:
            for each in _NEAR[self.version]:
                into.addresses.add(*range_of(each))
        for door in self._doors:
            if door.protocol is not None:
                targets = into.targets[door.protocol]
                targets.add(*door.ports)
                for end in door.ends:
                    low = door.ports.low + end.shift if end.port is None else end.port
                    targets.add(low, low + (door.ports.high - door.ports.low if end.port is None else 0))

    @property
    def any(self) -> bool:
        """Whether anything is offered."""
        return bool(self._doors)

    def told(self, services: Sequence[Service]) -> Iterator[int]:
        """Yield the sets of services that are told from others: those of each door, and single ones if their ports are
        shifted."""
        yield sum(1 << number for number, each in enumerate(services) if each.has_ports)
        yield sum(1 << number for number, each in enumerate(services) if is_untracked(each))
        for door in self._doors:
            taken = [number for number, each in enumerate(services) if door.takes(each)]
            yield sum(1 << number for number in taken)
            if any(end.shift for end in door.ends):
                yield from (1 << number for number in taken)

    # -- the addresses by which doors are known ---------------------------------------------------------------------

    def entering(self, range_: NumberRange) -> tuple[set[str | None], bool]:
        """Return the external addresses that packets from the host with these destinations are for, and whether such
        packets come at all."""
        found: set[str | None] = set()
        used = False
        for address, entry in self._named_entries():
            if _is(range_, entry):
                found.add(address)
                used = True
        for address in {door.address for door in self._doors}:  # the host sends none to internal addresses
            if address is not None and _is(range_, address):
                found.add(address)
        if self._every and any(_is(range_, each) for each in self._free_hosts()):
            found.add(None)
        return found, used or any(_is(range_, each) for each in self.floating)

    def dialed(self, range_: NumberRange) -> dict[str | None, str | None]:
        """Return the external and internal addresses by which an instance calls doors at this address, each with the
        network of an internal one."""
        if not self._doors:
            return {}
        found: dict[str | None, str | None] = {}
        external = not any(overlap(range_, each) for each in self._subnets)
        for door in self._doors:
            named = door.address is not None and _is(range_, door.address)
            if named and (door.network is not None or external):
                found[door.address] = door.network
        if self._every and external and any(_is(range_, each) for each in self._hosts):
            found[None] = None
        return found

    def at_host(self, range_: NumberRange) -> set[str | None]:
        """Return the addresses by which a packet at the host calls doors that the host translates."""
        named = {door.address for door in self._doors if door.network is None}
        found: set[str | None] = {each for each in named if each and each not in self.floating and _is(range_, each)}
        local = any(_is(range_, each) for each in self._hosts)
        local = local or any(contains(range_of(each), range_) for each in _NEAR[self.version])
        return found | {None} if self._every and local else found

    def entry(self, address: str | None) -> str | None:
        """Return the address that the host translates an external one to."""
        return dict(self._named_entries()).get(address)

    def _named_entries(self) -> Iterator[tuple[str | None, str]]:
        for entry in self._entries.own if self._every else ():
            if _version(entry) == self.version:
                yield None, entry
        for address, entry in self._entries.transits.items():
            if _version(entry) == self.version:
                yield address, entry

    def _free_hosts(self) -> list[str]:
        """Return the addresses of the host that mean nothing else in the tenant's networks."""
        return [each for each in self._hosts if not any(overlap(_atom(each), subnet) for subnet in self._subnets)]

    # -- translation -------------------------------------------------------------------------------------------------

    def door(self, addresses: Collection[str | None], service: Service) -> Door | None:
        """Return the first door at one of these addresses that takes a service."""
        return next((door for door in self._doors if door.address in addresses and door.takes(service)), None)

    def ends(self, door: Door, service: Service) -> Iterator[Translated]:
        """Yield what packets of a service are translated to. Which backend it is depends on a hash: each occurs."""
        for end in door.ends:
            yield self._translated(end, service)

    def _translated(self, end: End, service: Service) -> Translated:
        ports: NumberRange | None = None
        if service.has_ports and service.target is not None:
            low, high = service.target
            ports = NumberRange(low + end.shift, high + end.shift) if end.port is None else NumberRange(*[end.port] * 2)
        return Translated(end.address, ports, translated(self.version, NumberRange(end.address, end.address), ports))


def _doors(intent: TenantIntent, version: int) -> Iterator[Door]:
    outside = intent.outside
    for forward in outside.forwards:
        port = forward.published
        inside = [each for each in forward.addresses if _version(each) == version]
        if inside and (port.address is None or _version(port.address) == version):
            ends = tuple(End(number_of(each), None, port.target - port.port) for each in inside)
            ports = NumberRange(port.port, port.last)
            yield Door(3 if port.address is None else 0, port.address, None, _PROTOCOLS[port.protocol], ports, ends)
    for balancer in outside.balancers:
        ends = tuple(End(number_of(host), port) for host, port in balancer.backends if _version(host) == version)
        for each in balancer.listeners:
            if each.address is None or _version(each.address) == version:
                ports = NumberRange(each.port, each.port)
                rank = 4 if each.address is None else 1
                yield Door(rank, each.address, each.network, _PROTOCOLS[each.protocol], ports, ends)
    for floating in outside.floating:
        if floating.target is not None and _version(floating.address) == version:
            end = End(number_of(floating.target))
            yield Door(2, floating.address, None, None, NumberRange(0, 0xFFFF), (end,))


def at_hosts_of(
    references: Iterable[OutsideReference], range_: NumberRange, services: Sequence[Service]
) -> Mapping[tuple[str, str], int]:
    """Return the services that the host translates to tenants, by (tenant, translated address)."""
    found: dict[tuple[str, str], int] = {}
    for reference in references:
        addresses = reference.at_host(range_)
        for number, service in enumerate(services) if addresses else ():
            door = reference.door(addresses, service)
            entry = reference.entry(door.address) if door else None
            if door is None or entry is None or door.protocol is None:
                continue
            text = translated(reference.version, _atom(entry), service.target)
            found[reference.tenant, text] = found.get((reference.tenant, text), 0) | 1 << number
    return found


def _atom(address: str) -> NumberRange:
    number = number_of(address)
    return NumberRange(number, number)


def _is(range_: NumberRange, address: str) -> bool:
    return range_ == _atom(address)


def _version(address: str) -> int:
    return 6 if ":" in address else 4
