"""Worlds: tenants with networks, routers, instances and policies, as data, and the strategies that invent them.

All tenants of a world draw from the same few addresses, names and labels, so that they overlap as much as they can.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hypothesis import strategies as st

from insula.model.policies import (
    AddressGroup,
    AnyPeer,
    CidrPeer,
    Direction,
    GroupPeer,
    InstancePeer,
    LabelRequirement,
    Policy,
    PolicyPeer,
    PolicyRule,
    PortMatch,
    Selector,
)
from tests.system.fabric.packets import PORTS, Place

TENANTS = ("acme", "globex")
NETWORKS = ("net", "lan", "dmz")
GROUP = AddressGroup(tenant="", name="some", cidrs=["10.0.0.2/31", "10.0.1.0/24", "fd00:1::/64"], created=0.0)
"""A group that every tenant has."""


@dataclass(frozen=True)
class InstanceIn:
    """An instance of a world: a container, or a virtual machine, whose port is a tap. `host` is the last part of its
    addresses, and `allowed` those of further ones that it may use as others may (allowed address pairs)."""

    network: str
    host: int
    labels: dict[str, str]
    allowed: frozenset[int] = frozenset()
    machine: bool = False


@dataclass(frozen=True)
class TenantIn:
    """A tenant of a world. `routers` are the names of the networks that each one joins."""

    networks: tuple[str, ...]
    routers: tuple[frozenset[str], ...] = ()
    instances: dict[str, InstanceIn] = field(default_factory=dict)
    policies: tuple[Policy, ...] = ()


World = dict[str, TenantIn]
"""Tenants by name."""


def subnet(network: str) -> str:
    return f"10.0.{NETWORKS.index(network)}.0/24"


def subnet6(network: str) -> str:
    return f"fd00:{NETWORKS.index(network)}::/64"


def addresses(instance: InstanceIn, host: int | None = None) -> list[str]:
    """The IPv4 and the IPv6 address of an instance, or those of another `host` of its network."""
    number, last = NETWORKS.index(instance.network), host or instance.host
    return [f"10.0.{number}.{last}", f"fd00:{number}::{last:x}" if number else f"fd00::{last:x}"]


def allowed(instance: InstanceIn) -> list[str]:
    """The further addresses that an instance may use."""
    return [address for host in sorted(instance.allowed) for address in addresses(instance, host)]


def taken(tenant: TenantIn) -> dict[str, list[str]]:
    """The further addresses that each instance does use: the first of those that may."""
    found: dict[str, str] = {}
    for name, instance in tenant.instances.items():
        for address in allowed(instance):
            found.setdefault(address, name)
    return {name: [address for address, who in found.items() if who == name] for name in tenant.instances}


def owned(world: World) -> dict[Place, list[str]]:
    """The addresses of each instance, with the further ones that it uses."""
    return {
        Place(tenant, name): [*addresses(instance), *taken(has)[name]]
        for tenant, has in world.items()
        for name, instance in has.instances.items()
    }


# -- strategies ------------------------------------------------------------------------------------------------------

_LABELS = {"app": ("web", "db"), "tier": ("front", "back")}
_RANGES = ("10.0.0.0/24", "10.0.0.2/31", "10.0.0.0/30", "10.0.0.0/23", "fd00::/64", "fd00::2/127", "0.0.0.0/0", "::/0")

labels = st.dictionaries(st.sampled_from(tuple(_LABELS)), st.just(""), max_size=2).flatmap(
    lambda keys: st.fixed_dictionaries({key: st.sampled_from(_LABELS[key]) for key in keys})
)
requirements = st.sampled_from(tuple(_LABELS)).flatmap(
    lambda key: st.one_of(
        st.builds(
            LabelRequirement,
            key=st.just(key),
            operator=st.sampled_from(("In", "NotIn")),
            values=st.lists(st.sampled_from(_LABELS[key]), min_size=1, max_size=2, unique=True),
        ),
        st.builds(LabelRequirement, key=st.just(key), operator=st.sampled_from(("Exists", "DoesNotExist"))),
    )
)
further = st.one_of(st.just(frozenset[int]()), st.frozensets(st.sampled_from((100, 101)), max_size=2))
selectors = st.builds(Selector, labels=labels, expressions=st.lists(requirements, max_size=1))
peers: st.SearchStrategy[PolicyPeer] = st.one_of(
    st.just(AnyPeer()),
    st.builds(InstancePeer, select=selectors, network=st.one_of(st.none(), st.sampled_from(NETWORKS))),
    st.builds(CidrPeer, cidr=st.sampled_from(_RANGES)),
    st.just(CidrPeer(cidr="10.0.0.0/23", exceptions=["10.0.0.3/32", "10.0.1.0/25"])),
    st.just(CidrPeer(cidr="fd00::/16", exceptions=["fd00::3/128", "fd00:1::/64"])),
    st.just(GroupPeer(group=GROUP.name)),
)
_PROTOCOLS: tuple[Literal["tcp", "udp"], ...] = ("tcp", "udp")
port_matches = st.sampled_from(_PROTOCOLS).flatmap(
    lambda protocol: st.one_of(
        st.just(PortMatch(protocol=protocol)),
        st.builds(PortMatch, protocol=st.just(protocol), port=st.sampled_from(PORTS[protocol])),
        st.just(PortMatch(protocol=protocol, port=60, end_port=500)),
        st.just(PortMatch(protocol=protocol, port=1000, end_port=65535)),
    )
)


@st.composite
def policies(draw: st.DrawFn, tenant: str, number: int) -> Policy:
    both: tuple[Direction, ...] = ("in", "out")
    directions = draw(st.lists(st.sampled_from(both), min_size=1, max_size=2, unique=True))
    rules = st.builds(
        PolicyRule,
        direction=st.sampled_from(directions),
        peers=st.lists(peers, min_size=1, max_size=2),
        ports=st.lists(port_matches, max_size=2),
    )
    return Policy(
        tenant=tenant,
        name=f"p{number}",
        select=draw(selectors),
        directions=directions,
        rules=draw(st.lists(rules, max_size=2)),
        created=0.0,
    )


@st.composite
def tenants(draw: st.DrawFn, name: str) -> TenantIn:
    networks = draw(st.lists(st.sampled_from(NETWORKS), min_size=1, max_size=3, unique=True))
    joined = draw(st.sets(st.sampled_from(networks), max_size=3))
    count = draw(st.integers(2, 4))
    instances = {
        f"i{number}": InstanceIn(
            draw(st.sampled_from(networks)), 2 + number, draw(labels), draw(further), draw(st.booleans())
        )
        for number in range(count)
    }
    return TenantIn(
        networks=tuple(networks),
        routers=(frozenset(joined),) if len(joined) > 1 else (),
        instances=instances,
        policies=tuple(draw(policies(name, number)) for number in range(draw(st.integers(0, 3)))),
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    return {name: draw(tenants(name)) for name in TENANTS}
