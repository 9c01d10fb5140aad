"""What the interpreter is told of a tenant: devices, addresses of ports, and boundaries of the reference model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from insula.model.objects import Network, Port
from insula.network.addresses import gateway_mac, link_local
from insula.network.endpoints import port_name
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import Boundaries, NumberRange
from insula.network.ranges import number_of


@dataclass(frozen=True)
class PortSources:
    """A port's device and MAC address, and the (MAC address, IP addresses) that it may send from, by version."""

    device: str
    mac: str
    allowed: Mapping[int, Sequence[tuple[str, NumberRange]]]


@dataclass(frozen=True)
class InterpreterView:
    """`ports` are places by device, `identities` what each may send from, and `tunnels` what may come from ports on
    other hosts. `senders` are (device, source), and `owners` the MAC addresses of those who have an address, or may use
    it, both by version."""

    tenant: str
    ports: Mapping[str, NetworkPlace]
    identities: Sequence[PortSources]
    tunnels: Sequence[PortSources]
    senders: Mapping[int, Sequence[tuple[str, PacketSource]]]
    owners: Mapping[int, Mapping[int, Sequence[str]]]
    peers: dict[str, tuple[NetworkPlace, dict[int, Sequence[NumberRange]]]]
    """The devices of peerings, each with the other side's addresses there by version."""
    overlays: Mapping[str, str]
    """Networks and peerings by the name of the device that leads to their ports on other hosts."""
    bridges: Mapping[str, str]
    """Networks by the name of their bridge."""
    broadcasts: Mapping[int, Mapping[str, int]]
    """The broadcast addresses of networks by the name of their bridge, by version."""
    uplink: str
    translated: Mapping[int, NumberRange]
    """The addresses that packets have after translation, by version."""
    cuts: Mapping[int, Boundaries]


@dataclass(frozen=True)
class DeviceNames:
    """The names of devices: of the port, of the peering, of the overlays of a network and of a peering, and of the
    bridge with an index, and of the uplink."""

    port: Callable[[int], str]
    peering: Callable[[int], str]
    overlay: Callable[[int], str]
    peering_overlay: Callable[[int], str]
    bridge: Callable[[int], str]
    uplink: str


def view(
    intent: TenantIntent,
    running: Collection[int],
    cuts: Mapping[int, Boundaries],
    devices: DeviceNames,
    translated: Mapping[int, NumberRange],
) -> InterpreterView:
    """Return the view of a tenant; `running` are the indices of the ports that are plugged."""
    device = devices.port
    ports = [port for port in intent.ports if port.index in running]
    return InterpreterView(
        tenant=intent.tenant.name,
        ports={device(port.index): NetworkPlace("port", port_name(port)) for port in ports},
        identities=[_sources(device(port.index), port) for port in ports],
        tunnels=[
            _from_elsewhere(devices.overlay(network.index), network, intent, ports) for network in intent.networks
        ],
        senders={
            version: [
                (
                    device(port.index),
                    PacketSource(NetworkPlace("port", port_name(port)), NumberRange(address, address), mac),
                )
                for port in ports
                for address, mac in _sent(intent, port, version)
            ]
            for version in cuts
        },
        owners={
            version: {**_elsewhere(intent, version), **_further(ports, version), **_own(ports, version)}
            for version in cuts
        },
        overlays={
            **{devices.overlay(network.index): network.name for network in intent.networks},
            **{devices.peering_overlay(each.index): f"peering {each.name}" for each in intent.peerings},
        },
        bridges={devices.bridge(network.index): network.name for network in intent.networks},
        broadcasts={
            version: {devices.bridge(network.index): int(ip_network(network.subnet)[-1]) for network in intent.networks}
            if version == 4
            else {}
            for version in cuts
        },
        peers=_peers(intent.peerings, cuts, devices),
        uplink=devices.uplink,
        translated=translated,
        cuts=cuts,
    )


def _peers(
    peerings: Iterable[PeeringIntent], versions: Iterable[int], devices: DeviceNames
) -> dict[str, tuple[NetworkPlace, dict[int, Sequence[NumberRange]]]]:
    """Return the devices of peerings: on this host all addresses of the peer's networks may be, and on others those of
    ports there."""
    found = dict[str, tuple[NetworkPlace, dict[int, Sequence[NumberRange]]]]()
    for each in peerings:
        place = NetworkPlace("peer", each.peer.name)
        whole: dict[int, Sequence[NumberRange]] = {v: _subnets(each.others if each.routed else (), v) for v in versions}
        found[devices.peering(each.index)] = place, whole
        remote = [ip_address(address) for one in each.remotes for address in one.addresses if each.routed]
        points: dict[int, Sequence[NumberRange]] = {
            v: [NumberRange(int(a), int(a)) for a in remote if a.version == v] for v in versions
        }
        found[devices.peering_overlay(each.index)] = place, points
    return found


def _own(ports: Sequence[Port], version: int) -> dict[int, Sequence[str]]:
    return {each: [port.mac] for port in ports for each in _addresses(port, version)}


def _sent(intent: TenantIntent, port: Port, version: int) -> list[tuple[int, str]]:
    """Return the single addresses of its network that a port may send from, each with the MAC address."""
    subnets = _subnets([each for each in intent.networks if each.name == port.network], version)
    own = [(address, port.mac) for address in _addresses(port, version)]
    further = [
        (address, mac) for address, mac in _single(port, version) if any(s.low <= address <= s.high for s in subnets)
    ]
    return list(dict.fromkeys([*own, *further]))


def _single(port: Port, version: int) -> Iterator[tuple[int, str]]:
    """Yield the single addresses that a port may use beside its own, each with the MAC address."""
    for pair in port.allowed_pairs:
        if "/" not in pair.address and (address := ip_address(pair.address)).version == version:
            yield int(address), pair.mac or port.mac


def _further(ports: Sequence[Port], version: int) -> dict[int, Sequence[str]]:
    """Return the MAC addresses of single addresses that ports may use beside their own: several may use one."""
    found: dict[int, list[str]] = {}
    for address, mac in dict.fromkeys(each for port in ports for each in _single(port, version)):
        found.setdefault(address, []).append(mac)
    return dict(found)


def _elsewhere(intent: TenantIntent, version: int) -> dict[int, Sequence[str]]:
    """Return the MAC addresses of ports on other hosts by their addresses."""
    addresses = [(ip_address(text), remote.mac) for remote in intent.remotes for text in remote.addresses]
    return {int(address): [mac] for address, mac in addresses if address.version == version}


def _addresses(port: Port, version: int) -> list[int]:
    address = port.address if version == 4 else port.address6
    return [number_of(address)] if address else []


def _subnets(networks: Sequence[Network], version: int) -> list[NumberRange]:
    found = [ip_network(each) for network in networks for each in (network.subnet, network.subnet6) if each]
    return [NumberRange(int(each[0]), int(each[-1])) for each in found if each.version == version]


def _sources(device: str, port: Port) -> PortSources:
    own = [*_addresses(port, 6), number_of(link_local(port.mac))] if port.address6 else []
    found = {
        4: [(port.mac, NumberRange(each, each)) for each in _addresses(port, 4)],
        6: [(port.mac, NumberRange(each, each)) for each in own],
    }
    for pair in port.allowed_pairs:
        range_ = ip_network(pair.address)
        found[range_.version].append((pair.mac or port.mac, NumberRange(int(range_[0]), int(range_[-1]))))
    return PortSources(device, port.mac, found)


def _from_elsewhere(device: str, network: Network, intent: TenantIntent, ports: Sequence[Port]) -> PortSources:
    """Return what may come from other hosts to a network: from its ports there, and with the gateway's MAC address from
    those of other networks of its router."""
    here = {(port.network, port.mac) for port in ports}
    remotes = [each for each in intent.remotes if (each.network, each.mac) not in here]
    beside = {name for router in intent.routers if network.name in router.networks for name in router.networks}
    router, found = gateway_mac(network.index), dict[int, list[tuple[str, NumberRange]]]()
    for remote in remotes:
        mac = remote.mac if remote.network == network.name else router if remote.network in beside else None
        six = [link_local(remote.mac)] if remote.network == network.name else []
        local = six if any(":" in address for address in remote.addresses) else []
        for address in (*remote.addresses, *local) if mac else ():
            number = number_of(address)
            found.setdefault(6 if ":" in address else 4, []).append((mac or "", NumberRange(number, number)))
    return PortSources(device, router, found)
