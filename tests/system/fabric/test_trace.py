"""`trace`, `verify` and packets agree, on hosts as they should be and on damaged ones.

Worlds are built, foreign rules are put among the installed ones, and packets are sent. The trace of each says whether
it arrives; and if one arrives that may not, or does not and may, the proof has a finding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from insula.network.tracing.trace import parse, trace
from tests.support.lab import isolated
from tests.system.fabric.building import Built, built
from tests.system.fabric.packets import PORTS, Arrival, Flow, Place, arrivals, flows
from tests.system.fabric.reference import expected
from tests.system.fabric.worlds import TENANTS, InstanceIn, TenantIn, World, addresses, owned, worlds

MOST = 40
"""Flows of a world that are traced."""
ADDRESSES = (
    "ip {end} 10.0.0.2",
    "ip {end} 10.0.0.3",
    "ip {end} 10.0.1.0/24",
    "ip6 {end} fd00::3",
    "ip6 {end} fd00::/63",
)


@st.composite
def foreign_rules(draw: st.DrawFn) -> str:
    """A rule at the head of a chain. One that accepts is about UDP: answers of TCP have no such rule."""
    verdict = draw(st.sampled_from(("accept", "drop")))
    protocol = "udp" if verdict == "accept" else draw(st.sampled_from(("tcp", "udp")))
    ends = [draw(st.sampled_from(("", *ADDRESSES))).format(end=end) for end in ("saddr", "daddr")]
    if len({each.split()[0] for each in ends if each}) == 2:
        ends[1] = ""  # of two versions of IP at once there is no packet
    where = (
        draw(st.sampled_from(("inet lab forward", "bridge lab prerouting")))
        if verdict == "drop"
        else "inet lab forward"
    )
    return f"insert rule {where} {' '.join(ends)} {protocol} dport {draw(st.sampled_from(PORTS[protocol]))} {verdict}"


def own_addresses(world: World) -> dict[Place, list[str]]:
    return {
        Place(tenant, name): addresses(each) for tenant, has in world.items() for name, each in has.instances.items()
    }


def some_flows(world: World, dice: random.Random) -> list[Flow]:
    """Flows between instances of one tenant, from and to addresses that are theirs alone: a trace is asked for by
    instances."""
    own = own_addresses(world)
    mine = {tenant: {a for place, some in own.items() if place.tenant == tenant for a in some} for tenant in world}
    found = [flow for flow in flows(own) if flow.to_address in mine[flow.source.tenant]]
    return dice.sample(found, min(MOST, len(found)))


def traced(cloud: Built, world: World, tried: list[Flow]) -> Iterator[Arrival]:
    """The flows that arrive, as their traces say, and where."""
    running = {each.port.index for each in cloud.instances.values()}
    owners = {(place.tenant, a): place for place, some in own_addresses(world).items() for a in some}
    for flow in tried:
        intent = cloud.lab.intent(flow.source.tenant)
        asked = parse(intent, flow.from_address, flow.to_address, f"{flow.protocol}/{flow.port}")
        if trace(cloud.lab.fabric, intent, asked, running).allowed:
            yield Arrival(flow, owners[flow.source.tenant, flow.to_address])


def check(world: World, damage: list[tuple[str, str]], dice: random.Random) -> bool:
    """Whether the damage has changed what arrives."""
    with built(world) as cloud:
        for tenant, command in damage:
            cloud.lab.fabric._tenant(cloud.lab.tenants[tenant]).nft.run(command)
        tried = some_flows(world, dice)
        told = set(traced(cloud, world, tried))
        arrived = arrivals(cloud.instances, owned(world), tried, told)
        assert arrived - told == set(), f"arrived, and its trace says that it does not; {damage}"
        assert told - arrived == set(), f"did not arrive, and its trace says that it does; {damage}"
        wanted, findings = expected(world, tried), cloud.prove().findings
        assert arrived == wanted or findings, f"the proof finds nothing; {damage}"
        assert damage or not findings
        return arrived != wanted


@settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(worlds(), st.lists(st.tuples(st.sampled_from(TENANTS), foreign_rules()), max_size=3), st.randoms())
def several(world: World, damage: list[tuple[str, str]], dice: random.Random) -> None:
    check(world, damage, dice)


@isolated
def test_in_a_world_whose_damage_is_known() -> None:
    two = {name: InstanceIn("net", host, {}) for name, host in (("i0", 2), ("i1", 3))}
    world = {"acme": TenantIn(networks=("net",), instances=two)}
    assert not check(world, [], random.Random(0))
    assert check(
        world, [("acme", "insert rule inet lab forward ip6 daddr fd00::3 udp dport 53 drop")], random.Random(0)
    )


@isolated
def test_in_invented_worlds() -> None:
    several()


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_in_many_worlds(part: int) -> None:
    isolated(lambda: settings(max_examples=50)(several)())()
