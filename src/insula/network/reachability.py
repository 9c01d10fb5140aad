"""Compute reachability between endpoints, from the tenants' networks and from the installed state. Pure functions.

All endpoints of a network reach each other. Endpoints of two networks don't, not even those of one tenant. An instance
reaches the gateway of its network and the outside. Neither the outside nor the host reaches an instance, and no
instance reaches the host. An endpoint is one address: an instance with IPv4 and IPv6 has two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from insula.model.objects import Network, Port
from insula.network.addresses import link_local
from insula.network.endpoints import Endpoint, of_gateway
from insula.network.fabric import Installed, InstalledPort


def pairs(endpoints: Sequence[Endpoint]) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Return all (source, target) to check: every instance to all, and host and outside to every instance."""
    for source in endpoints:
        for target in endpoints:
            if source.version != target.version or source.label == target.label:
                continue
            if source.kind == "instance":
                asked = target.kind in ("instance", "gateway") or target.tenant == source.tenant
            else:
                asked = source.kind != "gateway" and target.kind == "instance" and target.tenant == source.tenant
            if asked:
                yield source, target


def wanted(source: Endpoint, target: Endpoint) -> bool:
    """Whether `source` may reach `target`."""
    if source.kind != "instance":
        return False
    if target.kind == "outside":
        return True
    return target.kind != "host" and (source.tenant, source.network) == (target.tenant, target.network)


class InstalledReachability:
    """Whether one endpoint reaches another according to the installed state, provided that no rule differs."""

    def __init__(self, installed: Iterable[Installed], ports: Iterable[Port]) -> None:
        self._installed = {one.tenant: one for one in installed}
        self._ports: dict[tuple[str, str], list[InstalledPort]] = defaultdict(list)
        for port in ports:
            one = self._installed.get(port.tenant)
            for found in one.ports if one else ():
                if found.index == port.index:
                    self._ports[port.tenant, port.instance].append(found)

    def __call__(self, source: Endpoint, target: Endpoint) -> bool:
        network = self._network(source)
        if source.kind != "instance" or network is None:
            return False
        if target.kind == "instance":
            return target.tenant == source.tenant and self._network(target) == network
        if target.kind == "gateway":
            return target.tenant == source.tenant and target.address in self._gateways(source.tenant, network)
        return target.kind == "outside"

    def _network(self, endpoint: Endpoint) -> int | None:
        """Return the network on whose bridge the instance may use this address."""
        for port in self._ports.get((endpoint.tenant, endpoint.name), ()):
            if port.up and endpoint.address in (*port.addresses, *port.addresses6):
                return port.network
        return None

    def _gateways(self, tenant: str, network: int) -> list[str]:
        found = [n for n in self._installed[tenant].networks if n.index == network and n.up]
        return [gateway.partition("/")[0] for n in found for gateway in n.gateways]


def differences(installed: Installed, networks: Iterable[Network], ports: Iterable[Port]) -> list[str]:
    """Compare the installed state of one tenant with its networks and the ports of its running instances; as text."""
    found: list[str] = []
    there = {network.index: network for network in installed.networks}
    plugged = {port.index: port for port in installed.ports}
    mine = {network.name: network for network in networks if network.tenant == installed.tenant}
    for network in mine.values():
        have = there.pop(network.index, None)
        if have is None:
            found.append(f"network {network.name} is missing")
            continue
        found += _compare(f"network {network.name}: gateways", _bare(have.gateways), of_gateway(network))
        if have.mtu != network.mtu:
            found.append(f"network {network.name}: MTU is {have.mtu}, not {network.mtu}")
        if have.vni not in (None, network.vni):
            found.append(f"network {network.name}: packets to other hosts have VNI {have.vni}, not {network.vni}")
    for port in ports:
        if port.tenant == installed.tenant:
            found += _port_differences(port, mine, plugged.pop(port.index, None))
    found += [f"{network.device} belongs to no network" for network in there.values()]
    found += [f"{port.device} belongs to no instance" for port in plugged.values()]
    return found


def _port_differences(port: Port, networks: Mapping[str, Network], have: InstalledPort | None) -> list[str]:
    if have is None:
        return [f"port of {port.instance} is missing"]
    network = networks.get(port.network)
    found = []
    if network is None or have.network != network.index:
        found.append(f"port of {port.instance} is not on network {port.network}")
    six = {port.address6, link_local(port.mac)} if port.address6 else set()
    for what, now, should in (
        ("MAC addresses", set(have.macs), {port.mac}),
        ("IPv4 addresses", set(have.addresses), {port.address}),
        ("IPv6 addresses", set(have.addresses6), six),
    ):
        if now != should:
            found.append(f"port of {port.instance}: {what} are {sorted(now)}, not {sorted(map(str, should))}")
    return found


def _bare(addresses: Iterable[str]) -> set[str]:
    return {address.partition("/")[0] for address in addresses}


def _compare(what: str, now: set[str], should: Iterable[Endpoint]) -> list[str]:
    wanted_ = {endpoint.address for endpoint in should}
    return [] if now == wanted_ else [f"{what} are {sorted(now)}, not {sorted(wanted_)}"]
