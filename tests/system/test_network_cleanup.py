"""Nothing is left after unplug, after teardown, and after kill -9 at any moment."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.messages import Neighbour
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.network.fabric import NetnsNic
from insula.network.intent import TenantIntent
from insula.network.linux import sysctl
from insula.network.linux.fabric import LinuxFabric
from insula.network.linux.state import addresses
from tests.support.descriptors import descriptors
from tests.support.lab import Instance, Lab, eventually, isolated, two_tenants

SETTINGS = ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/lo/accept_ra", "ipv6/conf/all/accept_ra")


def snapshot(run: Path) -> dict[str, object]:
    """Everything of a host that the fabric could change, but for what `run` holds."""
    held = descriptors()
    with Rtnl() as rtnl, Nft() as nft:
        return {
            "links": sorted(link.name for link in rtnl.links()),
            "addresses": sorted(address.address for address in rtnl.addresses()),
            "tables": nft.tables(),
            "mounts": sorted(Path("/proc/self/mounts").read_text().splitlines()),
            "settings": {name: sysctl.read(name) for name in SETTINGS},
            "processes": [pid for pid in os.listdir("/proc") if pid.isdigit() and not is_zombie(pid)],
            "files": sorted(str(p) for p in Path("/run").rglob("*") if not p.is_relative_to(run)),
            "descriptors": held,
        }


def is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


_CHANGING = re.compile(
    r"counter packets \d+ bytes \d+"
    r"|\b0x8[0-9a-f]{7}\b"  # each port that goes begins an epoch
    r"|\s*elements = \{[^{}]*(?:ct count|limit rate|expires)[^{}]*\}"  # what was sent lately
)


def inside(cloud: Lab, tenant: str) -> dict[str, object]:
    """The objects in a tenant's namespace. The kernel adds and drops multicast entries of devices by itself, later."""
    netns = cloud.inside(tenant)

    def ours(neighbour: Neighbour) -> bool:
        return neighbour.permanent and not (neighbour.mac and int(neighbour.mac[:2], 16) & 1)

    def look() -> dict[str, object]:
        with Rtnl() as rtnl, Nft() as nft:
            return {
                "links": [link for link in rtnl.links() if link.name != "lo"],
                "neighbours": sorted(
                    filter(ours, (n for family in (2, 7, 10) for n in rtnl.neighbours(family))), key=repr
                ),
                "rules": _CHANGING.sub("", nft.run("list ruleset")),
            }

    try:
        found: dict[str, object] = call_in(netns, look)
        return found
    finally:
        os.close(netns)


@isolated
def test_teardown_leaves_the_host_as_it_was() -> None:
    run = Path("/run/insula")
    host_up()
    sysctl.write({"ipv6/conf/lo/accept_ra": "1"})
    before = snapshot(run)
    with two_tenants(run=run) as cloud:
        cloud.set_names("acme", {"web": ["10.0.0.2"]})
        assert cloud.instances["acme", "web"].pings("10.0.0.3")
        during = snapshot(run)
        assert all(during[part] != before[part] for part in before), "the snapshot would not see a leak"
        for instance in cloud.instances.values():
            instance.remove()
        cloud.fabric.teardown()
    eventually(lambda: snapshot(run) == before)
    assert list(run.iterdir()) == []


@isolated
def test_teardown_leaves_foreign_objects() -> None:
    Path("/run/netns").mkdir()
    os.system("ip netns add other")
    os.system("nft add table inet other")
    other = LinuxFabric(Path("/run/other"), "lab-more", resolvers=(), range4="100.127.0.0/16", range6="fd77::/64")
    with two_tenants() as cloud:
        other.open()
        other.apply(TenantIntent(tenant=cloud.tenants["acme"]))
        cloud.fabric.teardown()
        assert sorted(os.listdir("/run/netns")) == ["lab-more-acme", "other"]
        with Nft() as nft:
            assert nft.tables() == [("inet", "other"), ("inet", "lab-more")]
        assert other.installed(cloud.tenants["acme"]).drift == []
        assert other.host_drift() == []
        other.teardown()
    assert os.listdir("/run/netns") == ["other"]


@isolated
def test_fifty_ports_come_and_go_without_a_trace() -> None:
    with two_tenants() as cloud:
        before = inside(cloud, "acme"), snapshot(cloud.run)
        for _ in range(2):
            instances = [cloud.instance("acme", f"i{i}") for i in range(25)]
            assert instances[-1].pings("10.0.0.2")
            for i, instance in enumerate(instances):
                if i % 2:  # the instance dies first, or its port goes first
                    instance.remove()
                cloud.unplug(instance)
                if not i % 2:
                    instance.remove()
                del cloud.instances["acme", f"i{i}"]
        # devices are deleted behind our back, when nobody can be sending through them any more
        eventually(lambda: (inside(cloud, "acme"), snapshot(cloud.run)) == before)
        assert cloud.instances["acme", "web"].pings("10.0.0.3")


@isolated
def test_sweep_removes_leftovers_only() -> None:
    with two_tenants() as cloud:
        clean = inside(cloud, "acme")
        cloud.network("acme", "10.5.0.0/24", "fd05::/64", name="old")
        cloud.instance("acme", "gone", "old")
        cloud.instance("acme", "gone-too")
        cloud.fabric.close()
        fabric = LinuxFabric(cloud.run, cloud.fabric.naming.prefix, resolvers=())  # as after a restart
        fabric.open()
        whole = cloud.intent("acme")
        fabric.sweep([whole.tenant])
        kept = {port.instance: port for port in whole.ports if port.instance in ("web", "db")}
        some = msgspec.structs.replace(
            whole,
            networks=[network for network in whole.networks if network.name == "net"],
            ports=list(kept.values()),
            names={name: addresses(port) for name, port in kept.items()},
        )
        assert fabric.apply(msgspec.structs.replace(some, complete=False)) == {}
        assert inside(cloud, "acme") != clean, "what this fabric does not know may be somebody's"
        assert fabric.apply(some) == {}
        assert inside(cloud, "acme") == clean
        assert os.listdir("/run/netns") == ["lab-acme"]
        assert cloud.instances["acme", "web"].pings("10.0.0.3")
        gone = cloud.instances["globex", "web"]  # the kernel takes a namespace down a little later
        eventually(lambda: not gone.pings("10.0.0.1", 0.2))
        assert fabric.installed(cloud.tenants["acme"]).drift == []


@isolated
def test_kill_9_at_any_moment_is_repaired() -> None:
    """A child makes everything again and again and is killed at random moments; then all is put in order."""
    random.seed(7)
    run = Path("/run/insula")
    host_up()
    before = snapshot(run)
    cloud = Lab(run=run)
    tenant = cloud.tenant("acme")
    network = cloud.network("acme", subnet6="fd00::/64")
    instance: Instance = cloud.instance("acme", "web")
    port, intent = instance.port, cloud.intent("acme")
    cloud.fabric.close()

    def everything() -> None:
        fabric = LinuxFabric(run, "lab", resolvers=())
        while True:
            fabric.open()
            fabric.apply(intent)
            fabric.plug(tenant, network, port, NetnsNic(instance.netns))
            fabric.unplug(tenant, network, port)
            fabric.apply(TenantIntent(tenant=tenant))
            fabric.remove(tenant)
            fabric.teardown()

    for round_ in range(40):
        kill_while(everything, random.uniform(0.005, 0.25))
        fabric = LinuxFabric(run, "lab", resolvers=())
        fabric.open()
        if round_ % 2:
            fabric.sweep([tenant])
            assert fabric.apply(intent) == {}
            fabric.plug(tenant, network, port, NetnsNic(instance.netns))
            assert fabric.installed(tenant).drift == [], f"round {round_}"
            eventually(lambda: instance.pings("10.0.0.1"))
            assert fabric.status(tenant, network).ready, f"round {round_}"
        fabric.teardown()
    instance.remove()
    eventually(lambda: snapshot(run) == before)


def host_up() -> None:
    with Rtnl() as host:
        host.execute(netlink.set_link(1, up=True))


def kill_while(work: Callable[[], None], seconds: float) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the work ended by itself: it failed"
