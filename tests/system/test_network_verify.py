"""`verify` passes when all is right, and each way of breaking isolation is found, by reading or by packets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.model.views import Reachability, VerifyReport
from insula.network.linux import plan
from insula.network.linux.namespaces import call_in
from insula.network.verify import verify
from tests.support.lab import Lab, World, isolated, two_tenants


def report(cloud: Lab) -> VerifyReport:
    instances = list(cloud.instances.values())
    return verify(
        cloud.fabric,
        list(cloud.tenants.values()),
        list(cloud.networks.values()),
        [instance.port for instance in instances],
        {instance.port.index: instance.netns for instance in instances},
    )


def cell(found: VerifyReport, source: str, target: str) -> Reachability:
    return next(c for c in found.matrix if (c.source, c.target) == (source, target))


def wrong(found: VerifyReport) -> set[tuple[str, str]]:
    return {(c.source, c.target) for c in found.matrix if not c.ok}


@isolated
def test_all_is_well() -> None:
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        cloud.instance("acme", "back", "back")
        found = report(cloud)
        assert found.drift == [] and wrong(found) == set() and found.passed
        assert all(c.control for c in found.matrix)
        reached = {(c.source, c.target) for c in found.matrix if c.probed}
        assert ("acme/web", "acme/db") in reached and ("acme/web", "acme/gateway:net") in reached
        assert ("acme/back", "outside") in reached and ("globex/db", "globex/web") in reached
        for pair in [
            ("acme/web", "globex/db"), ("acme/web", "acme/back"), ("acme/web", "host"), ("host", "acme/web"),
            ("outside", "globex/web"), ("acme/web", "globex/gateway:net"), ("acme/web", "acme/gateway:back"),
        ]:  # fmt: skip
            assert cell(found, *pair).probed is False, pair


@isolated
def test_no_probe_leaves_the_host() -> None:
    world = World()
    with two_tenants() as cloud:
        cloud.network("globex", "10.9.0.0/24", name="far")
        cloud.instance("globex", "far", "far")
        spy = world.instance.sniffer()
        assert report(cloud).passed
        assert not spy.sees(b"insula", 0.1)
        mark = os.urandom(8)
        with cloud.instances["acme", "web"].socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(mark, ("10.9.0.2", 9))
        assert spy.sees(mark, 1.0), "the spy is deaf"


def tenants_joined_by_a_cable(cloud: Lab) -> None:
    """Somebody connects the bridges of two tenants."""
    with call_in(cloud.inside("acme"), Rtnl) as acme, call_in(cloud.inside("globex"), Rtnl) as globex:
        one, two = plan.bridge_index(1), plan.bridge_index(2)
        acme.execute(netlink.veth("cable", "cable", cloud.inside("globex"), master=one))
        link = globex.link("cable")
        assert link
        globex.execute(netlink.set_link(link.index, up=True, master=two))
        assert acme.settle("cable") and globex.settle("cable")
        allow_everything(cloud, "acme")
        allow_everything(cloud, "globex")


def allow_everything(cloud: Lab, tenant: str) -> None:
    run_nft(cloud, tenant, "flush chain bridge lab prerouting; chain bridge lab prerouting { policy accept; }")


def run_nft(cloud: Lab, tenant: str, command: str) -> None:
    cloud.fabric._domain(cloud.tenants[tenant]).nft.run(command)


def tenants_routed_to_each_other(cloud: Lab) -> None:
    """globex's other network is reachable from acme through a host that routes between uplinks."""
    cloud.network("globex", "10.9.0.0/24", name="far")
    cloud.instance("globex", "far", "far")
    with Rtnl() as host:
        uplink = host.link(cloud.fabric.plan.uplink(2))
        assert uplink
        host.execute(netlink.add_route("10.9.0.0/24", index=uplink.index, gateway="100.64.0.5"))
    # the rule that keeps tenants apart is gone, and globex lets in what comes
    host_nft = cloud.fabric._handles()[1]
    host_nft.run("flush chain inet lab from_tenant")
    run_nft(cloud, "globex", "flush chain inet lab forward; chain inet lab forward { policy accept; }")


def gateway_serves_everybody(cloud: Lab) -> None:
    run_nft(cloud, "acme", "insert rule inet lab forward accept")


def host_listens(cloud: Lab) -> None:
    cloud.fabric._handles()[1].run("flush chain inet lab to_host")


def port_may_use_another_address(cloud: Lab) -> None:
    run_nft(
        cloud, "acme", f'add element bridge lab ipv4 {{ "p1" . {cloud.instances["acme", "web"].port.mac} . 10.0.0.3 }}'
    )


def port_is_on_no_bridge(cloud: Lab) -> None:
    with call_in(cloud.inside("acme"), Rtnl) as acme:
        acme.execute(netlink.set_link(plan.port_index(1), master=0))


def element_is_missing(cloud: Lab) -> None:
    run_nft(cloud, "acme", f'delete element bridge lab macs {{ "p1" . {cloud.instances["acme", "web"].port.mac} }}')


FAULTS: list[tuple[Callable[[Lab], None], str, tuple[str, str] | None]] = [
    # (what breaks, what is said of it, a pair whose packets tell)
    (tenants_joined_by_a_cable, "device cable is not ours", ("acme/db", "globex/web")),
    (tenants_routed_to_each_other, "rule missing in inet lab", None),
    (gateway_serves_everybody, "rule added in inet lab", ("host", "acme/web")),
    (host_listens, "host: rule missing in inet lab", ("acme/web", "host")),
    (port_may_use_another_address, "IPv4 addresses are ['10.0.0.2', '10.0.0.3']", None),
    (port_is_on_no_bridge, "port of web is not on network net", ("acme/web", "acme/db")),
    (element_is_missing, "has no rule elements", ("acme/web", "acme/db")),
]


@pytest.mark.parametrize(("fault", "said", "pair"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
@isolated
def test_every_fault_is_found(fault: Callable[[Lab], None], said: str, pair: tuple[str, str] | None) -> None:
    with two_tenants(subnet6=None) as cloud:
        assert report(cloud).passed
        fault(cloud)
        found = report(cloud)
        assert not found.passed
        assert any(said in text for text in found.drift), found.drift
        if pair:
            assert pair in wrong(found) | {(c.source, c.target) for c in found.matrix if not c.control}, wrong(found)


@isolated
def test_packets_alone_tell_of_a_leak_that_no_reading_shows() -> None:
    """A cable between two instances of different tenants, inside their own namespaces, where no fabric looks."""
    with two_tenants(subnet6=None) as cloud:
        spy, victim = cloud.instances["globex", "web"], cloud.instances["acme", "web"]
        with call_in(victim.netns, Rtnl) as one, call_in(spy.netns, Rtnl) as two:
            one.execute(netlink.veth("cable", "cable", spy.netns))
            here, there = one.link("cable"), two.link("cable")
            assert here and there
            one.execute(netlink.add_address(here.index, "172.20.0.1/24"))
            two.execute(netlink.set_link(there.index, up=True), netlink.add_address(there.index, "172.20.0.2/24"))
            one.execute(netlink.add_route("10.0.0.3/32", index=here.index, gateway="172.20.0.2"))
        found = report(cloud)
        assert found.drift == []
        assert not found.passed
        assert cell(found, "acme/web", "globex/web").probed is True or wrong(found) == {("acme/web", "acme/db")}


@isolated
def test_silence_is_no_proof() -> None:
    """An instance whose device is down receives nothing: that proves no isolation, and it is not said to."""
    with two_tenants(subnet6=None) as cloud:
        db = cloud.instances["globex", "db"]
        with call_in(db.netns, Rtnl) as within:
            eth0 = within.link("eth0")
            assert eth0
            within.execute(netlink.set_link(eth0.index, up=False))
        found = report(cloud)
        silent = cell(found, "acme/web", "globex/db")
        assert not found.passed and silent.probed is None and silent.detail == "the receiver saw no control packet"


@isolated
def test_without_the_host_s_rules_nothing_is_sent_beyond() -> None:
    world = World()
    with two_tenants() as cloud:
        cloud.fabric._handles()[1].run("delete table inet lab")
        spy = world.instance.sniffer()
        found = report(cloud)
        assert not found.passed and not spy.sees(b"insula", 0.1)
        assert cell(found, "acme/web", "outside").probed is None
        assert cell(found, "acme/web", "acme/db").probed is True


@isolated
def test_fifty_instances_in_two_seconds() -> None:
    cloud = Lab()
    for tenant in ("a", "b", "c", "d", "e"):
        cloud.tenant(tenant)
        cloud.network(tenant)
        for i in range(10):
            cloud.instance(tenant, f"i{i}")
    found = report(cloud)
    assert found.passed and len(found.matrix) > 2500
    assert found.seconds < 6.0, found.seconds  # 0.8 on an idle machine
