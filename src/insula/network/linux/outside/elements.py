"""The elements of the tables for packets from outside, from the intent of a tenant. Pure functions.

Keys and values are the kernel's bytes (`kernel.netlink.maps`): addresses and ports in network byte order, numbers of
balancers and places in that of the machine, each padded to four bytes.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, NamedTuple

from insula.kernel.netlink.maps import KeyInterval
from insula.kernel.netlink.nftables import IFNAME
from insula.model.objects import PublishedPort
from insula.network import maglev
from insula.network.intent import BalancerIntent, BalancerListener, TenantIntent
from insula.network.linux.outside.addresses import OutsideAddresses, outside_of, version

MapContents = dict[str, dict[KeyInterval, bytes]]
"""The elements of a table's sets and maps, by their names."""

_PROTOCOLS: Final = {"tcp": b"\6\0\0\0", "udp": b"\x11\0\0\0"}
_TENANT_SETS: Final = (
    *("ports", "ranges", "spread", "affine", "host_ports", "host_ranges", "host_spread", "host_affine"),
    *("places", "floating", "sources", "selves", "hosts", "dialed", "external"),
)
_HOST_SETS: Final = ("ports", "ranges", "host_ports", "host_ranges", "overlaps", "floating")
TENANT_SETS: Final = tuple(f"{name}{family}" for name in _TENANT_SETS for family in (4, 6))
HOST_SETS: Final = tuple(f"{name}{family}" for name in _HOST_SETS for family in (4, 6))
_NO_PORTS: Final = ("places", "selves", "sources", "hosts", "dialed", "external", "overlaps")


class ExternalPorts(NamedTuple):
    """Ports that lead somewhere: `address` is None for every address of the host, `protocol` for all of them."""

    address: str | None
    protocol: str | None
    first: int = 0
    last: int = 65535
    version: int = 4


# -- the tenant's table -------------------------------------------------------------------------------------------


def of_tenant(intent: TenantIntent, at: OutsideAddresses) -> MapContents:
    """Return the elements of the table in the tenant's namespace."""
    found: MapContents = {name: {} for name in TENANT_SETS}
    outside = intent.outside
    for forward in outside.forwards:
        for inside in forward.addresses:
            _add_forward(found, forward.published, inside, at)
    for each in outside.floating:
        if each.target is not None:
            found[f"floating{version(each.address)}"][KeyInterval(_ip(each.address))] = _ip(each.target)
            found[f"sources{version(each.address)}"][KeyInterval(_ip(each.target))] = _ip(each.address)
    for balancer in outside.balancers:
        _add_balancer(found, balancer, at)
    _add_reachable(found, intent, at)
    return found


def _add_forward(found: MapContents, published: PublishedPort, inside: str, at: OutsideAddresses) -> None:
    family = version(inside)
    if published.address is not None and version(published.address) != family:
        return
    keeps = published.count > 1 and published.port == published.target
    name = f"{'host_' if published.address is None else ''}{'ranges' if keeps else 'ports'}{family}"
    for local in _inside(published.address, at):
        if keeps:
            found[name][_range(local, published.protocol, published.port, published.last)] = _ip(inside)
            continue
        target = _ip(inside)
        head = _head(local, published.protocol)
        found[name].update(
            (KeyInterval(head + _port(published.port + n)), target + _port(published.target + n))
            for n in range(published.count)
        )


def _add_balancer(found: MapContents, balancer: BalancerIntent, at: OutsideAddresses) -> None:
    number = struct.pack("=I", balancer.index)
    kind = "affine" if balancer.affinity else "spread"
    for listener in balancer.listeners:
        families = (4, 6) if listener.address is None else (version(listener.address),)
        for family in families:
            name = f"{'host_' if listener.address is None else ''}{kind}{family}"
            for local in [listener.address] if listener.network else _inside(listener.address, at):
                found[name][KeyInterval(_head(local, listener.protocol) + _port(listener.port))] = number
    for family in (4, 6):
        backends = [each for each in balancer.backends if version(each[0]) == family]
        chosen = maglev.table(tuple(f"{address} {port}" for address, port in backends))
        values = [_ip(address) + _port(port) for address, port in backends]
        found[f"places{family}"].update(
            (KeyInterval(number + struct.pack("=I", place)), values[backend]) for place, backend in enumerate(chosen)
        )


def _inside(address: str | None, at: OutsideAddresses) -> list[str | None]:
    """Return the addresses by which packets to an external address are known in the tenant's namespace."""
    if address is None:
        return [None]
    transit = at.transits.get(address)
    return [address] if transit is None else [transit, address]


def _add_reachable(found: MapContents, intent: TenantIntent, at: OutsideAddresses) -> None:
    """Add what concerns connections of the tenant's own instances to its external and internal addresses.

    The address of a balancer in a network is in that network; an external one that is in a network too means an
    instance there. An instance that reaches itself gets its gateway's address as the source, since it would keep a
    reply to its own address.
    """
    outside = intent.outside
    external = [each.published.address for each in outside.forwards] + [each.address for each in outside.floating]
    listeners = [each for balancer in outside.balancers for each in balancer.listeners]
    external += [each.address for each in listeners if each.network is None]
    named = {each for each in external if each is not None}
    hosts = outside_of(intent, at.hosts) if None in external else []
    internal = {each.address for each in listeners if each.network is not None and each.address is not None}
    for address in {*outside_of(intent, sorted(named)), *hosts}:
        for name in ("dialed", "external"):
            found[f"{name}{version(address)}"][KeyInterval(_ip(address))] = b""
    for address in internal:
        found[f"dialed{version(address)}"][KeyInterval(_ip(address))] = b""
    if None in external:
        for address in (*hosts, *at.own.values()):
            found[f"hosts{version(address)}"][KeyInterval(_ip(address))] = b""
    gateways = {network.name: {4: network.gateway, 6: network.gateway6} for network in intent.networks}
    for port in intent.ports:
        for inside in (port.address, port.address6):
            gateway = gateways.get(port.network, {}).get(version(inside)) if inside else None
            if inside and gateway and (named or internal or None in external):
                found[f"selves{version(inside)}"][KeyInterval(_ip(inside) * 2)] = _ip(gateway)


# -- the host's table ---------------------------------------------------------------------------------------------


def of_host(intent: TenantIntent, at: OutsideAddresses) -> MapContents:
    """Return the elements of the table in the host's namespace that are the tenant's."""
    found: MapContents = {name: {} for name in HOST_SETS}
    for forward in intent.outside.forwards:
        for family in {version(inside) for inside in forward.addresses}:
            _lead(found, forward.published, family, at)
    for balancer in intent.outside.balancers:
        for listener in balancer.listeners:
            if listener.network is None:
                for family in (4, 6):
                    _lead(found, _as_port(listener), family, at)
    for each in intent.outside.floating:
        found[f"floating{version(each.address)}"][KeyInterval(_ip(each.address) + _device(at.uplink))] = b""
    for network in intent.networks:
        for subnet in (network.subnet, network.subnet6):
            if subnet:
                found[f"overlaps{version(subnet)}"][_overlap(at.uplink, subnet)] = b""
    return found


def _as_port(listener: BalancerListener) -> PublishedPort:
    return PublishedPort(port=listener.port, target=listener.port, protocol=listener.protocol, address=listener.address)


def _lead(found: MapContents, published: PublishedPort, family: int, at: OutsideAddresses) -> None:
    """Add the element that leads ports of the host to the tenant; a floating address needs none."""
    local: str | None
    if published.address is None:
        prefix, local = "host_", at.own.get(family)
    else:
        prefix = ""
        local = at.transits.get(published.address) if version(published.address) == family else None
    if local is None:
        return
    kind = "ports" if published.count == 1 else "ranges"
    key = (
        KeyInterval(_head(published.address, published.protocol) + _port(published.port))
        if published.count == 1
        else _range(published.address, published.protocol, published.port, published.last)
    )
    found[f"{prefix}{kind}{family}"][key] = _ip(local)


def owned(contents: Mapping[str, Mapping[KeyInterval, bytes]], at: OutsideAddresses) -> MapContents:
    """Return the elements of the host's table that lead to these places."""
    ours = {_ip(each) for each in (*at.own.values(), *at.transits.values())}
    device = _device(at.uplink)
    found: MapContents = {}
    for name, elements in contents.items():
        if name.startswith("overlaps"):
            found[name] = {key: value for key, value in elements.items() if key.first.startswith(device)}
        elif name.startswith("floating"):
            found[name] = {key: value for key, value in elements.items() if key.first.endswith(device)}
        else:
            found[name] = {key: value for key, value in elements.items() if value in ours}
    return found


# -- bytes --------------------------------------------------------------------------------------------------------


def changed(have: MapContents, wanted: MapContents) -> Iterator[ExternalPorts]:
    """Yield the ports that lead somewhere else than before, or that are new or gone; adjoining ones together."""
    for name, before in have.items():
        kind, family = name[:-1], int(name[-1])
        if kind in _NO_PORTS:
            continue
        differing: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        for first, last in dict(before.items() ^ wanted.get(name, {}).items()):
            if kind == "floating":
                yield ExternalPorts(_text(first[: 4 if family == 4 else 16]), None, version=family)
            else:
                differing[first[:-4]].append((_number(first[-4:]), _number((last or first)[-4:])))
        for head, ports in differing.items():
            address = None if kind.startswith("host_") else _text(head[:-4])
            protocol = next(name for name, packed in _PROTOCOLS.items() if packed == head[-4:])
            for low, high in _merged(ports):
                yield ExternalPorts(address, protocol, low, high, family)


def differences(have: MapContents, wanted: MapContents) -> list[str]:
    """Return in words which sets and maps have other elements than they should."""
    found = []
    for name, should in wanted.items():
        now = have.get(name, {})
        more, less = now.items() - should.items(), should.items() - now.items()
        if more or less:
            found.append(
                f"{name}, of what is open to the outside, has {len(more)} wrong elements, and lacks {len(less)}"
            )
    return found


def _merged(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the ranges in order; those that adjoin as one."""
    low, high = 0, -2
    for first, last in sorted(ranges):
        if first > high + 1:
            if high >= 0:
                yield low, high
            low, high = first, last
        high = max(high, last)
    yield low, high


def backends(contents: Mapping[KeyInterval, bytes]) -> set[tuple[int, str, int]]:
    """Return (number of the balancer, address, port) of the backends in a map `places`."""
    found = {(key.first[:4], value) for key, value in contents.items()}
    return {(struct.unpack("=I", number)[0], _text(value[:-4]), _number(value[-4:])) for number, value in found}


def _head(address: str | None, protocol: str) -> bytes:
    return (b"" if address is None else _ip(address)) + _PROTOCOLS[protocol]


def _range(address: str | None, protocol: str, first: int, last: int) -> KeyInterval:
    head = _head(address, protocol)
    return KeyInterval(head + _port(first), head + _port(last))


def _overlap(device: str, subnet: str) -> KeyInterval:
    network, head = ip_network(subnet), _device(device)
    return KeyInterval(head + network.network_address.packed, head + network.broadcast_address.packed)


def _device(name: str) -> bytes:
    return name.encode().ljust(IFNAME, b"\0")


def _ip(address: str) -> bytes:
    return inet_pton(AF_INET6 if ":" in address else AF_INET, address)


def _text(packed: bytes) -> str:
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def _port(number: int) -> bytes:
    return struct.pack("!Hxx", number)


def _number(packed: bytes) -> int:
    return int.from_bytes(packed[:2], "big")
