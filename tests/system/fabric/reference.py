"""The reference of the conformance suite: which flows of a world arrive, and where.

It is written from docs/networking.md and shares no code with Insula, not even with Insula's own model. It goes the
other way round: each policy grants connections, and a flow arrives if it is granted wherever its ends are selected.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping

from insula.model.policies import AnyPeer, CidrPeer, GroupPeer, InstancePeer, Policy, PolicyPeer, PortMatch, Selector
from tests.system.fabric.packets import PORTS, Arrival, Flow, Place
from tests.system.fabric.worlds import GROUP, InstanceIn, TenantIn, World, addresses, allowed, owned, taken

Grant = tuple[str, str, int]
"""The other end's address, a protocol and a port."""


def expected(world: World, tried: Iterable[Flow]) -> set[Arrival]:
    """The flows that arrive, and where."""
    connections = {name: set(_connections(tenant)) for name, tenant in world.items()}
    at = {place: {*some} for place, some in owned(world).items()}
    found = set()
    for flow in tried:
        here = world[flow.source.tenant]
        places = [Place(flow.source.tenant, name) for name in here.instances]
        target = next((place.name for place in places if flow.to_address in at[place]), None)
        connection = (flow.from_address, flow.to_address, flow.protocol, flow.port)
        if target and connection in connections[flow.source.tenant]:
            found.add(Arrival(flow, Place(flow.source.tenant, target)))
    return found


def _connections(tenant: TenantIn) -> Iterator[tuple[str, str, str, int]]:
    """Every (source, target, protocol, port) that is allowed in a tenant."""
    sends = {name: _granted(tenant, name, "out") for name in tenant.instances}
    accepts = {name: _granted(tenant, name, "in") for name in tenant.instances}
    used, shared = taken(tenant), _shared(tenant)
    closed = {address for address, names in shared.items() if any(_selecting(tenant, name, "in") for name in names)}
    everything = [(protocol, port) for protocol, ports in PORTS.items() for port in ports]
    for source, one in tenant.instances.items():
        for target, other in tenant.instances.items():
            if source == target or not _joined(tenant, one.network, other.network):
                continue
            for a in [each for each in (*addresses(one), *used[source]) if each not in shared]:
                for b in [each for each in (*addresses(other), *used[target]) if each not in closed]:
                    for protocol, port in everything:
                        may_send = (b, protocol, port) in sends[source]
                        may_accept = b in shared or (a, protocol, port) in accepts[target]
                        if may_send and may_accept and (":" in a) == (":" in b):
                            yield a, b, protocol, port


def _shared(tenant: TenantIn) -> dict[str, list[str]]:
    """The further addresses that instances with different labels may use, with these instances."""
    found: dict[str, list[str]] = {}
    for name, instance in tenant.instances.items():
        for address in allowed(instance):
            found.setdefault(address, []).append(name)
    labels = {name: sorted(instance.labels.items()) for name, instance in tenant.instances.items()}
    return {address: names for address, names in found.items() if any(labels[n] != labels[names[0]] for n in names)}


def _joined(tenant: TenantIn, one: str, other: str) -> bool:
    return one == other or any({one, other} <= router for router in tenant.routers)


class _Everything(set[Grant]):
    """The grants of an instance that nothing selects."""

    def __contains__(self, grant: object) -> bool:
        return True


def _granted(tenant: TenantIn, name: str, direction: str) -> set[Grant]:
    """What the policies that select an instance grant it in a direction."""
    mine = _selecting(tenant, name, direction)
    return set().union(*(_grants(tenant, policy, direction) for policy in mine)) if mine else _Everything()


def _selecting(tenant: TenantIn, name: str, direction: str) -> list[Policy]:
    return [
        policy
        for policy in tenant.policies
        if direction in policy.directions and _fits(policy.select, tenant.instances[name].labels)
    ]


def _grants(tenant: TenantIn, policy: Policy, direction: str) -> set[Grant]:
    return {
        (address, protocol, port)
        for rule in policy.rules
        if rule.direction == direction
        for peer in rule.peers
        for address in _named(tenant, peer)
        for protocol, port in _ports(rule.ports)
    }


def _named(tenant: TenantIn, peer: PolicyPeer) -> Iterator[str]:
    """The addresses of instances that a peer names. A shared one belongs to no instance."""
    shared = _shared(tenant)
    for instance in tenant.instances.values():
        for address in (*addresses(instance), *allowed(instance)):
            if _is_named(peer, instance, address) and not (isinstance(peer, InstancePeer) and address in shared):
                yield address


def _is_named(peer: PolicyPeer, instance: InstanceIn, address: str) -> bool:
    match peer:
        case AnyPeer():
            return True
        case InstancePeer():
            return peer.network in (None, instance.network) and _fits(peer.select, instance.labels)
        case CidrPeer():
            return _in(address, [peer.cidr]) and not _in(address, peer.exceptions)
        case GroupPeer():
            return _in(address, GROUP.cidrs)
    raise AssertionError(f"no world has a {peer}")


def _in(address: str, ranges: Iterable[str]) -> bool:
    one = int(ipaddress.ip_address(address))
    for each in ranges:
        network = ipaddress.ip_network(each)
        first, last = int(network.network_address), int(network.broadcast_address)
        if (network.version == 6) == (":" in address) and first <= one <= last:
            return True
    return False


def _ports(matches: list[PortMatch]) -> set[tuple[str, int]]:
    everything = {(protocol, port) for protocol, ports in PORTS.items() for port in ports}
    if not matches:
        return everything
    found: set[tuple[str, int]] = set()
    for match in matches:
        first = match.port or 0
        last = 65535 if match.port is None else match.end_port or match.port
        found |= {
            (protocol, port) for protocol, port in everything if protocol == match.protocol and first <= port <= last
        }
    return found


def _fits(selector: Selector, labels: Mapping[str, str]) -> bool:
    wrong = [key for key, value in selector.labels.items() if (key, value) not in labels.items()]
    for each in selector.expressions:
        value = labels.get(each.key)
        listed = value is not None and value in each.values
        if (each.operator, listed, value is None) in {
            ("In", False, False), ("In", False, True), ("NotIn", True, False),
            ("Exists", False, True), ("DoesNotExist", False, False),
        }:  # fmt: skip
            wrong.append(each.key)
    return not wrong
