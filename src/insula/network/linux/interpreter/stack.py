"""One network stack as the kernel has it: rules, devices, addresses, routes, neighbours and forwarding entries."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from insula.kernel.netlink import Rtnl, rulesets
from insula.kernel.netlink import messages as rt
from insula.kernel.netlink.messages import Link, without_times
from insula.kernel.netlink.nftables import NftablesSocket
from insula.network.interpreter.program import Program
from insula.network.linux.interpreter import bytecode, tables
from insula.network.linux.interpreter.routes import FAMILIES, InstalledRoute, RoutingRule, RoutingTable
from insula.network.linux.interpreter.tables import RememberedLinks, RememberedTable


@dataclass(frozen=True)
class Stack:
    """A stack that was read back. Two are equal if nothing that forwards packets has changed."""

    generation: int
    """Of the rules: each transaction has another one."""
    links: Mapping[int, Link]
    addresses: Mapping[tuple[int, int], int]
    """The first global address of each device, by (version of IP, index)."""
    routes: Mapping[int, Sequence[InstalledRoute]]
    rules: Mapping[int, Sequence[RoutingRule]]
    neighbours: Mapping[tuple[int, int, int], str]
    """MAC addresses by (version of IP, index of the device, address)."""
    forwarding: Mapping[int, Mapping[str, frozenset[int]]]
    """The ports of each bridge to which frames for a MAC address go, by the index of the bridge."""
    tunnels: Mapping[tuple[int, str], frozenset[tuple[str, int | None]]]
    """The hosts that VXLAN devices send frames to, by (index, MAC address), and the VNI if it is not the device's."""
    filters_bridged: Mapping[int, bool]
    """Whether br_netfilter passes bridged packets through the rules for routed ones, by version of IP."""
    program: Program

    def __hash__(self) -> int:
        return hash(self.generation)

    @functools.cached_property
    def by_name(self) -> dict[str, Link]:
        return {link.name: link for link in self.links.values()}

    @functools.cached_property
    def routing(self) -> dict[int, RoutingTable]:
        """Routing by version of IP."""
        return {version: RoutingTable(version, self.routes[version], self.rules[version]) for version in FAMILIES}

    def ports(self, bridge: int) -> list[Link]:
        """Return the devices on a bridge."""
        return [link for link in self.links.values() if link.master == bridge]


class StackReader:
    """Reads one stack, by sockets that were opened in it, and remembers it. Everything is asked for each time but the
    rules, which have a generation; what has not changed is not parsed again."""

    def __init__(self, rtnl: Rtnl, nftables: NftablesSocket) -> None:
        self._rtnl = rtnl
        self._nftables = nftables
        self._last: Stack | None = None
        self._links = RememberedLinks()
        self._addresses = RememberedTable(tables.addresses)
        self._routes = {version: RememberedTable(tables.routes) for version in FAMILIES}
        self._rules = {version: RememberedTable(tables.rules) for version in FAMILIES}
        self._neighbours = RememberedTable(tables.neighbours)
        self._entries = RememberedTable(tables.entries)

    def read(self, *, filters_bridged: Mapping[int, bool]) -> Stack:
        """Return the stack; the same object as the last time if nothing has changed. NetlinkError."""
        links = self._links.of(self._rtnl.link_messages())
        generation, program = self._program()
        neighbours = [each for family in FAMILIES.values() for each in self._neighbours_of(family)]
        forwarding, tunnels = self._entries.of(self._neighbours_of(socket.AF_BRIDGE), links)
        read = Stack(
            generation=generation,
            program=program,
            links=links,
            addresses=self._addresses.of(self._rtnl.dump(rt.RTM_GETADDR, rt.ADDR.pack(0, 0, 0, 0, 0))),
            routes={v: self._routes[v].of(self._dump(rt.RTM_GETROUTE, FAMILIES[v])) for v in FAMILIES},
            rules={v: self._rules[v].of(self._dump(rt.RTM_GETRULE, FAMILIES[v])) for v in FAMILIES},
            neighbours=self._neighbours.of(neighbours),
            forwarding=forwarding,
            tunnels=tunnels,
            filters_bridged=filters_bridged,
        )
        if self._last is None or self._last != read:
            self._last = read
        return self._last

    def _program(self) -> tuple[int, Program]:
        """Return the generation of the rules, and their program."""
        while True:
            generation = self._nftables.generation()
            if self._last is not None and self._last.generation == generation:
                return generation, self._last.program
            program = bytecode.program(rulesets.parse(rulesets.dump(self._nftables)))
            if self._nftables.generation() == generation:  # else they have changed meanwhile
                return generation, program

    def _dump(self, kind: int, family: int) -> list[bytes]:
        return self._rtnl.dump(kind, rt.ROUTE.pack(family, *[0] * 8))

    def _neighbours_of(self, family: int) -> list[bytes]:
        """Return the ARP or NDP table, or the forwarding entries of bridges."""
        return [without_times(each) for each in self._rtnl.dump(rt.RTM_GETNEIGH, rt.NEIGH.pack(family, 0, 0, 0, 0))]
