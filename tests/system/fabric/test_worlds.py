"""Invented worlds, built for real: exactly those packets arrive that the reference says."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.lab import isolated
from tests.system.fabric.building import built
from tests.system.fabric.packets import arrivals, flows
from tests.system.fabric.reference import expected
from tests.system.fabric.worlds import World, owned, worlds

PHASES = (Phase.explicit, Phase.generate)  # a smaller world is not worth the time that finding it takes


def check(world: World) -> None:
    """Build a world, try every flow in it, and have it proven."""
    with built(world) as cloud:
        tried = list(flows(owned(world)))
        wanted = expected(world, tried)
        arrived = arrivals(cloud.instances, owned(world), tried, wanted)
        assert arrived - wanted == set(), "arrived and may not"
        assert wanted - arrived == set(), "may and did not arrive"
        proof = cloud.prove()
        assert proof.findings == [] and proof.tenants == len(world)


@settings(max_examples=50, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck), database=None)
@given(worlds())
def fifty(world: World) -> None:
    check(world)


@isolated
def test_what_arrives_in_fifty_worlds_is_what_may() -> None:
    fifty()


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_what_arrives_in_a_thousand_worlds_is_what_may(part: int) -> None:
    isolated(lambda: settings(max_examples=50)(fifty)())()
