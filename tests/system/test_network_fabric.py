"""The linux fabric on the real kernel: what reaches what, and that nothing else does."""

from __future__ import annotations

import time

from tests.support.lab import Lab, isolated, two_tenants


@isolated
def test_two_tenants_with_the_same_addresses_each_reach_their_own() -> None:
    with two_tenants() as cloud:
        for tenant in ("acme", "globex"):
            cloud.instances[tenant, "db"].serves(f"{tenant}'s db", 5432)
        for tenant in ("acme", "globex"):
            web = cloud.instances[tenant, "web"]
            for address in ("10.0.0.3", "fd00::3", "10.0.0.1", "fd00::1"):
                assert web.pings(address), f"{tenant}: {address} does not answer"
            assert web.connects("10.0.0.3", 5432) == f"{tenant}'s db"
            assert web.connects("fd00::3", 5432) == f"{tenant}'s db"


@isolated
def test_attach_is_fast() -> None:
    cloud = Lab()
    cloud.tenant("acme")
    cloud.network("acme", "10.0.0.0/16", "fd00::/64")
    instances = [cloud.instance("acme", f"i{i}") for i in range(3)]
    for instance in instances:
        cloud.detach(instance)
    spent = []
    for _ in range(5):
        for instance in instances:
            start = time.perf_counter()
            cloud.attach(instance)
            spent.append(time.perf_counter() - start)
        for instance in instances:
            cloud.detach(instance)
    print(sorted(spent))
    assert sorted(spent)[len(spent) // 2] < 0.010

