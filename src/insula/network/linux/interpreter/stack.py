"""One network stack as the kernel has it: rules, devices, addresses, routes, neighbours and forwarding entries."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from insula.kernel.netlink import Rtnl, rulesets
from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink import messages as rt
from insula.kernel.netlink.messages import Link
from insula.kernel.netlink.nftables import NftablesSocket
from insula.network.interpreter.program import Program
from insula.network.linux.interpreter import bytecode
from insula.network.linux.interpreter.routes import (
    FAMILIES,
    InstalledRoute,
    RoutingRule,
    RoutingTable,
    parse_route,
    parse_rule,
)

_RTM_GETRULE: Final = 34
_NDA_VNI: Final = 7
_FAILED: Final = 0x20  # NUD_FAILED


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
    """Reads one stack, by sockets that were opened in it, and remembers it: rules are read if they have changed."""

    def __init__(self, rtnl: Rtnl, nftables: NftablesSocket) -> None:
        self._rtnl = rtnl
        self._nftables = nftables
        self._last: Stack | None = None

    def read(self, *, filters_bridged: Mapping[int, bool]) -> Stack:
        """Return the stack; the same object as the last time if nothing has changed. NetlinkError."""
        links = {link.index: link for link in self._rtnl.links()}
        generation, program = self._rules()
        forwarding, tunnels = self._entries(links)
        read = Stack(
            generation=generation,
            program=program,
            links=links,
            addresses=dict(self._addresses()),
            routes={v: list(self._routes(v)) for v in FAMILIES},
            rules={v: [parse_rule(body) for body in self._dump(_RTM_GETRULE, FAMILIES[v])] for v in FAMILIES},
            neighbours=dict(self._neighbours()),
            forwarding=forwarding,
            tunnels=tunnels,
            filters_bridged=filters_bridged,
        )
        if self._last is None or self._last != read:
            self._last = read
        return self._last

    def _rules(self) -> tuple[int, Program]:
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

    def _routes(self, version: int) -> Iterator[InstalledRoute]:
        for body in self._dump(rt.RTM_GETROUTE, FAMILIES[version]):
            if route := parse_route(body):
                yield route

    def _addresses(self) -> Iterator[tuple[tuple[int, int], int]]:
        found: dict[tuple[int, int], int] = {}
        for body in self._rtnl.dump(rt.RTM_GETADDR, rt.ADDR.pack(0, 0, 0, 0, 0)):
            family, _, _, scope, index = rt.ADDR.unpack_from(body)
            parts = rtattr.parse(body[rt.ADDR.size :])
            packed = parts.get(rt.IFA_LOCAL) or parts.get(rt.IFA_ADDRESS)
            if packed and scope == 0:
                found.setdefault((6 if family == socket.AF_INET6 else 4, index), int.from_bytes(packed, "big"))
        yield from found.items()

    def _neighbours(self) -> Iterator[tuple[tuple[int, int, int], str]]:
        for version, family in FAMILIES.items():
            for body in self._rtnl.dump(rt.RTM_GETNEIGH, rt.NEIGH.pack(family, 0, 0, 0, 0)):
                _, index, state, _, _ = rt.NEIGH.unpack_from(body)
                parts = rtattr.parse(body[rt.NEIGH.size :])
                if rt.NDA_DST in parts and rt.NDA_LLADDR in parts and not state & _FAILED:
                    address = int.from_bytes(parts[rt.NDA_DST], "big")
                    yield (version, index, address), parts[rt.NDA_LLADDR].hex(":")

    def _entries(
        self, links: Mapping[int, Link]
    ) -> tuple[dict[int, dict[str, frozenset[int]]], dict[tuple[int, str], frozenset[tuple[str, int | None]]]]:
        """Return the forwarding entries of bridges, and those of VXLAN devices."""
        found: dict[int, dict[str, frozenset[int]]] = {}
        tunnels: dict[tuple[int, str], frozenset[tuple[str, int | None]]] = {}
        for body in self._rtnl.dump(rt.RTM_GETNEIGH, rt.NEIGH.pack(socket.AF_BRIDGE, 0, 0, 0, 0)):
            _, index, state, flags, _ = rt.NEIGH.unpack_from(body)
            link = links.get(index)
            if link is None:
                continue
            if link.kind == "vxlan" and flags & rt.NTF_SELF:
                _add_tunnel(tunnels, index, rtattr.parse(body[rt.NEIGH.size :]))
                continue
            if link.master is None or flags & rt.NTF_SELF or state & rt.NUD_PERMANENT:
                continue  # a permanent entry is an address of the bridge itself
            parts = rtattr.parse(body[rt.NEIGH.size :])
            if rt.NDA_LLADDR in parts:
                entries, mac = found.setdefault(link.master, {}), parts[rt.NDA_LLADDR].hex(":")
                entries[mac] = entries.get(mac, frozenset()) | {index}
        return found, tunnels


def _add_tunnel(
    into: dict[tuple[int, str], frozenset[tuple[str, int | None]]], index: int, parts: Mapping[int, bytes]
) -> None:
    """Add an entry of a VXLAN device; one that leads to no host, but to a group of next hops, has no name here."""
    if rt.NDA_LLADDR not in parts:
        return
    key = index, parts[rt.NDA_LLADDR].hex(":")
    host = str(ip_address(parts[rt.NDA_DST])) if rt.NDA_DST in parts else "unknown"
    vni = rtattr.integer(parts[_NDA_VNI]) if _NDA_VNI in parts else None
    into[key] = into.get(key, frozenset()) | {(host, vni)}
