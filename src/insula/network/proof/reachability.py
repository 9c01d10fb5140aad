"""Compute reachability between endpoints, from the tenants' networks and from the installed state. Pure functions.

All endpoints of a network reach each other. Those of two networks do if a router of their tenant joins both, and else
don't. An instance reaches the gateways of these networks, and the outside unless its network has no way out, or its
router a default route. Neither the outside nor the host reaches an instance, and no
instance reaches the host. An endpoint is one address: an instance with IPv4 and IPv6 has two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from insula.model.objects import Network, Port
from insula.model.routers import Router
from insula.network.addresses import link_local
from insula.network.endpoints import Endpoint, of_gateway, port_name
from insula.network.fabric import Installed, InstalledNetwork, InstalledPort
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.packets import SERVICES
from insula.network.reference.policy_model import permits


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


class WantedReachability:
    """Whether one endpoint may reach another, by the tenants' networks and routers."""

    def __init__(self, networks: Iterable[Network], routers: Iterable[Router] = ()) -> None:
        self._networks = {(network.tenant, network.index): network for network in networks}
        self._routers = {(router.tenant, name): router for router in routers for name in router.networks}

    def __call__(self, source: Endpoint, target: Endpoint) -> bool:
        here = self._networks.get((source.tenant, source.network))
        if source.kind != "instance" or here is None or target.kind == "host":
            return False
        router = self._routers.get((source.tenant, here.name))
        if target.kind == "outside":
            diverted = router is not None and f"{'::' if target.version == 6 else '0.0.0.0'}/0" in routes_of(router)
            return here.outbound == "nat" and not diverted
        there = self._networks.get((target.tenant, target.network))
        if there is None or there.tenant != here.tenant:
            return False
        return there.name == here.name or (router is not None and there.name in router.networks)


def routes_of(router: Router) -> dict[str, str]:
    """Return the next hop of each destination."""
    return {route.destination: route.next_hop for route in router.routes}


class PolicyReachability:
    """Whether the policies of a tenant, and the operator's, let at least one of the probes pass that an instance sends.
    That they let nothing else pass is for the proof."""

    def __init__(self, intents: Iterable[TenantIntent]) -> None:
        self._intents = {intent.tenant.name: intent for intent in intents if intent.policy != PolicyIntent()}

    def __call__(self, source: Endpoint, target: Endpoint) -> bool:
        intent = self._intents.get(source.tenant)
        if intent is None or source.kind != "instance" or target.kind == "gateway":
            return True
        return any(permits(intent, source.address, target.address, *service) for service in SERVICES[source.version])


class InstalledReachability:
    """Whether one endpoint reaches another according to the installed state, provided that no rule differs."""

    def __init__(self, installed: Iterable[Installed], ports: Iterable[Port]) -> None:
        self._installed = {one.tenant: one for one in installed}
        self._ports: dict[tuple[str, str], list[InstalledPort]] = defaultdict(list)
        for port in ports:
            one = self._installed.get(port.tenant)
            for found in one.ports if one else ():
                if found.index == port.index:
                    self._ports[port.tenant, port_name(port)].append(found)

    def __call__(self, source: Endpoint, target: Endpoint) -> bool:
        network = self._network(source)
        if source.kind != "instance" or network is None:
            return False
        here = next((n for n in self._installed[source.tenant].networks if n.index == network), None)
        if here is None:
            return False
        if target.kind == "instance":
            return target.tenant == source.tenant and self._network(target) in here.reaches
        if target.kind == "gateway":
            known = (address for index in here.reaches for address in self._gateways(source.tenant, index))
            return target.tenant == source.tenant and target.address in known
        diverted = f"{'::' if target.version == 6 else '0.0.0.0'}/0" in here.routes
        return target.kind == "outside" and here.outbound and not diverted

    def _network(self, endpoint: Endpoint) -> int | None:
        """Return the network on whose bridge the instance may use this address."""
        for port in self._ports.get((endpoint.tenant, endpoint.name), ()):
            if port.up and endpoint.address in (*port.addresses, *port.addresses6):
                return port.network
        return None

    def _gateways(self, tenant: str, network: int) -> list[str]:
        found = [n for n in self._installed[tenant].networks if n.index == network and n.up]
        return [gateway.partition("/")[0] for n in found for gateway in n.gateways]


def differences(
    installed: Installed, networks: Iterable[Network], ports: Iterable[Port], routers: Iterable[Router] = ()
) -> list[str]:
    """Compare the installed state of one tenant with its networks, routers and the ports of its running instances; as
    text."""
    found: list[str] = []
    there = {network.index: network for network in installed.networks}
    plugged = {port.index: port for port in installed.ports}
    mine = {network.name: network for network in networks if network.tenant == installed.tenant}
    joined = {name: router for router in routers if router.tenant == installed.tenant for name in router.networks}
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
        found += _routing_differences(network, mine, joined.get(network.name), have)
    for port in ports:
        if port.tenant == installed.tenant:
            found += _port_differences(port, mine, plugged.pop(port.index, None))
    found += [f"{network.device} belongs to no network" for network in there.values()]
    found += [f"{port.device} belongs to no instance" for port in plugged.values()]
    return found


def _routing_differences(
    network: Network, networks: Mapping[str, Network], router: Router | None, have: InstalledNetwork
) -> Iterator[str]:
    beyond = set(router.networks if router else ()) | {network.name}
    should = sorted(networks[name].index for name in beyond if name in networks)
    if sorted(have.reaches) != should:
        names = {one.index: one.name for one in networks.values()}
        now = sorted(names.get(index, f"number {index}") for index in have.reaches)
        yield f"network {network.name} reaches {', '.join(now) or 'no network'}, not {', '.join(sorted(beyond))}"
    if have.outbound != (network.outbound == "nat"):
        yield f"network {network.name} has {'a' if have.outbound else 'no'} way out"
    routes = routes_of(router) if router else {}
    for each in sorted({*routes.items()} ^ {*have.routes.items()}):
        what = "missing" if each in routes.items() else "not wanted"
        yield f"network {network.name}: route {' via '.join(each)} is {what}"


def _port_differences(port: Port, networks: Mapping[str, Network], have: InstalledPort | None) -> list[str]:
    if have is None:
        return [f"port of {port.instance} is missing"]
    network = networks.get(port.network)
    found = []
    if network is None or have.network != network.index:
        found.append(f"port of {port.instance} is not on network {port.network}")
    six = {port.address6, link_local(port.mac)} if port.address6 else set()
    pairs = [pair for pair in port.allowed_pairs if "/" not in pair.address]
    six |= {pair.address for pair in pairs if ":" in pair.address}
    for what, now, should in (
        ("MAC addresses", set(have.macs), {port.mac} | {pair.mac for pair in port.allowed_pairs if pair.mac}),
        ("IPv4 addresses", set(have.addresses), {port.address} | {p.address for p in pairs if ":" not in p.address}),
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
