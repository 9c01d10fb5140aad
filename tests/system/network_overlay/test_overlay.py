"""Tenants' networks on three hosts: who is on one network meets wherever it is, and nobody else."""

from __future__ import annotations

import pytest

from tests.support.hosts import Cloud
from tests.support.lab import isolated


def two_tenants_on_three_hosts(version: int = 4) -> Cloud:
    """acme and globex with the same addresses: web, db and log on each host, and web2 beside web."""
    cloud = Cloud(version=version)
    for tenant in ("acme", "globex"):
        cloud.tenant(tenant)
        cloud.network(tenant)
        for name, host in (("web", 1), ("db", 2), ("log", 3), ("web2", 1)):
            cloud.instance(tenant, name, host)
    return cloud


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_instances_of_a_network_meet_on_all_hosts_and_in_their_tenant_only(version: int) -> None:
    cloud = two_tenants_on_three_hosts(version)
    for (tenant, name), instance in cloud.instances.items():
        instance.serves(f"{tenant}'s {name}", 80)
    for (tenant, name), instance in cloud.instances.items():
        for other in ("web", "db", "log", "web2"):
            port = cloud.instances[tenant, other].port
            for address in (port.address, str(port.address6)):
                said = instance.connects(address, 80)
                assert said == f"{tenant}'s {other}", f"{tenant}: {name} to {other} at {address}: {said!r}"
                assert instance.pings(address)
    assert cloud.drift() == []
