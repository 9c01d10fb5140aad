"""Allowed address pairs of ports: what an instance may send from beside the addresses of its port.

A single address is as good as one of the port's own: it may be announced (ARP, NDP), and the router finds it. If it is
allowed to several ports and moves between them (VRRP, RFC 9568), it needs a MAC address of its own. The bridge learns
at which port that is, from frames that the anti-spoofing has let through; at other ports nothing is learned.

A range is what is behind an instance that routes: packets from it may come by its port, and are not announced there.
Such ranges are in sets of intervals, which grow with the number of ranges and not with that of ports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import collapse_addresses, ip_address, ip_network
from typing import Any, Final

from insula.kernel import netlink
from insula.kernel.netlink import Request, maps
from insula.kernel.netlink.maps import KeyInterval, MapElements
from insula.kernel.netlink.nftables import NftablesSocket
from insula.model.objects import Network, Port
from insula.network.linux import keys, naming

_TYPES: Final = {"ranges4": "dm4", "ranges6": "dm6"}
"""The sets of ranges in the table `bridge`, with the types of their elements as in `keys`."""
Neighbours = Mapping[tuple[int, str], str]
"""MAC address by index of the bridge and IP address."""


def single(port: Port) -> list[tuple[str, str]]:
    """Return the (MAC address, IP address) pairs of single addresses."""
    return [(pair.mac or port.mac, pair.address) for pair in port.allowed_pairs if "/" not in pair.address]


def macs(port: Port) -> list[str]:
    """Return the MAC addresses other than the port's that it may send from."""
    return sorted({pair.mac for pair in port.allowed_pairs if pair.mac} - {port.mac})


# -- ranges -------------------------------------------------------------------------------------------------------


def change(nftables: NftablesSocket, table: str, ports: Iterable[Port], devices: set[str] | None = None) -> None:
    """Change the sets of ranges to those of these ports; with `devices` only the elements of these. NetlinkError."""
    wanted, requests = _ranges(ports), list[Request]()
    for name in _TYPES:
        have = maps.read(nftables, "bridge", table, name)
        if devices is not None:
            have = {key: value for key, value in have.items() if _device(key) in devices}
        requests += maps.change("bridge", table, name, have, wanted[name])
    nftables.transact(*requests)


def replace(nftables: NftablesSocket, table: str, port: Port, *, plugged: bool) -> None:
    """Add or remove the ranges of one port. NetlinkError."""
    if any("/" in pair.address for pair in port.allowed_pairs):
        change(nftables, table, [port] if plugged else [], {naming.port(port.index)})


def _ranges(ports: Iterable[Port]) -> dict[str, MapElements]:
    found: dict[str, dict[KeyInterval, bytes]] = {name: {} for name in _TYPES}
    for port in ports:
        for mac in {pair.mac or port.mac for pair in port.allowed_pairs}:
            own = [pair.address for pair in port.allowed_pairs if (pair.mac or port.mac) == mac]
            parsed: list[Any] = [ip_network(each) for each in own if "/" in each]
            for version, name in ((4, "ranges4"), (6, "ranges6")):
                # of overlapping ranges the kernel takes one only
                for range_ in collapse_addresses(each for each in parsed if each.version == version):
                    ends = (range_[0], range_[-1])
                    elements = ((naming.port(port.index), mac, str(end)) for end in ends)
                    found[name][KeyInterval(*(keys.packed(_TYPES[name], each) for each in elements))] = b""
    return dict(found)


def _device(key: KeyInterval) -> str:
    return keys.unpacked("d", key.first)[0]


# -- the router's neighbours ---------------------------------------------------------------------------------------


def neighbours(networks: Mapping[str, Network], ports: Iterable[Port], taken: set[tuple[str, str]]) -> Neighbours:
    """Return permanent entries for single addresses of the ports' subnets, except those that are `taken` by a port, as
    (network, address). Of several ports with one address it is that with the lowest number."""
    found: dict[tuple[int, str], str] = {}
    for port in sorted(ports, key=lambda port: port.index):
        network = networks[port.network]
        subnets = [ip_network(subnet) for subnet in (network.subnet, network.subnet6) if subnet]
        for mac, address in single(port):
            if (port.network, address) not in taken and any(ip_address(address) in subnet for subnet in subnets):
                found.setdefault((naming.bridge_index(network.index), address), mac)
    return found


def missing(wanted: Neighbours, have: Neighbours) -> list[Request]:
    """Return requests for entries that are missing or wrong."""
    return [
        netlink.add_neighbour(index, address, mac)
        for (index, address), mac in wanted.items()
        if have.get((index, address)) != mac
    ]
