"""Networks alone: instances of one network reach each other, and nothing else arrives anywhere."""

from __future__ import annotations

from tests.support.lab import isolated
from tests.system.fabric.building import built
from tests.system.fabric.packets import arrivals, flows
from tests.system.fabric.reference import expected
from tests.system.fabric.worlds import TENANTS, InstanceIn, TenantIn, owned


@isolated
def test_tenants_with_the_same_addresses_reach_their_own_instances() -> None:
    """Each of them has a container, and virtual machines beside it."""
    instances = {
        "web": InstanceIn("net", 2, {}),
        "db": InstanceIn("net", 3, {}, machine=True),
        "far": InstanceIn("lan", 2, {}, machine=True),
    }
    world = {tenant: TenantIn(("net", "lan"), instances=instances) for tenant in TENANTS}
    with built(world) as cloud:
        tried = list(flows(owned(world)))
        wanted = expected(world, tried)
        assert len(wanted) == 4 * 2 * 6, "the control: web and db of two tenants, two families, six ports"
        assert arrivals(cloud.instances, owned(world), tried, wanted) == wanted
