"""The linux fabric on a real kernel: allowed packets arrive, and no others."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import threading

import pytest

from insula.kernel import netlink, syscalls
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import InsulaError
from insula.network.linux import naming, sysctl
from tests.support.lab import SOON, Instance, Lab, World, eventually, isolated, ping, query, two_tenants
from tests.system.test_network_verify import report

UPLINKS6 = "fd69:6e73:756c:6100"


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
def test_two_networks_of_a_tenant_do_not_meet() -> None:
    cloud = Lab()
    cloud.tenant("acme")
    cloud.network("acme", "10.0.0.0/24", "fd00::/64", name="front")
    cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
    front = cloud.instance("acme", "web", "front", 2)
    back = cloud.instance("acme", "db", "back", 2)
    back.serves("db", 80)
    assert front.pings("10.0.0.1") and back.pings("10.1.0.1") and back.connects("127.0.0.1", 80) == "db"
    assert front.pings("fd00::1") and back.pings("fd01::1") and back.connects("::1", 80) == "db"
    for address in ("10.1.0.2", "fd01::2", "10.1.0.1", "fd01::1"):
        assert not front.pings(address, 0.2), f"{address} of the other network answers"
    assert front.connects("10.1.0.2", 80, 0.2) == "" and front.connects("fd01::2", 80, 0.2) == ""


@isolated
def test_the_world_outside_sees_the_host_and_cannot_come_in() -> None:
    world = World()
    with two_tenants() as cloud:
        web = cloud.instances["acme", "web"]
        web.serves("web", 80)
        world.tells_callers(80)
        assert web.connects(world.ADDRESS, 80) == world.HOST
        assert web.connects(world.ADDRESS6, 80) == world.HOST6
        assert cloud.instances["globex", "web"].connects(world.ADDRESS, 80) == world.HOST
        assert cloud.instances["globex", "web"].connects(world.ADDRESS6, 80) == world.HOST6
        assert cloud.instances["acme", "db"].connects("10.0.0.2", 80) == "web"
        assert cloud.instances["acme", "db"].connects("fd00::2", 80) == "web"
        for address in ("10.0.0.2", "100.64.0.3", "100.64.0.2"):
            is_host = address == "100.64.0.2"
            assert world.instance.pings(address, SOON if is_host else 0.2) == is_host, f"from outside {address}"
            assert world.instance.connects(address, 80, 0.2) == ""
        with call_in(world.instance.netns, Rtnl) as far:
            eth0 = far.link("eth0")
            assert eth0
            far.execute(netlink.add_route("fd00::/8", index=eth0.index, gateway=world.HOST6))
        for address, is_host in (("fd00::2", False), (f"{UPLINKS6}::3", False), (f"{UPLINKS6}::2", True)):
            assert world.instance.pings(address, SOON if is_host else 0.2) == is_host, address
            assert world.instance.connects(address, 80, 0.2) == ""


@isolated
def test_instances_do_not_reach_the_host_nor_the_link_local_services_behind_it() -> None:
    world = World()
    with two_tenants() as cloud:
        web = cloud.instances["acme", "web"]
        with socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True) as server:
            server.settimeout(SOON)
            for address in (World.HOST, World.HOST6):
                assert world.instance.connects(address, 8080, 0.2) == ""  # connects, but nobody says anything
                server.accept()
            server.settimeout(0.3)
            six = World.HOST6, f"{UPLINKS6}::2", f"{UPLINKS6}::4"
            for address in (World.HOST, "100.64.0.2", "100.64.0.4", *six):
                assert web.connects(address, 8080, 0.2) == ""
                assert not web.pings(address, 0.2)
            with pytest.raises(TimeoutError):
                server.accept()
        with Rtnl() as host:
            wan = host.link("wan")
            assert wan
            host.execute(netlink.add_route("169.254.0.0/16", index=wan.index, gateway=World.ADDRESS))
        spy = world.instance.sniffer()
        for address, seen in (("169.254.169.254", False), ("192.0.2.1", False), ("198.51.100.1", True)):
            mark = os.urandom(8)
            with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(mark, (address, 9))
            assert spy.sees(mark, SOON if seen else 0.3) == seen, address


@isolated
def test_names_are_answered_inside_their_tenant_only() -> None:
    with two_tenants() as cloud:
        cloud.set_names("acme", {"web": ["10.0.0.2", "fd00::2"], "db": ["10.0.0.3"]})
        cloud.set_names("globex", {"secret": ["10.0.0.7"]})
        web, spy = cloud.instances["acme", "web"], cloud.instances["globex", "web"]
        eventually(lambda: query(web.netns, "10.0.0.1", "web") == (0, ["10.0.0.2"]))
        eventually(lambda: query(spy.netns, "10.0.0.1", "secret.globex.internal") == (0, ["10.0.0.7"]))
        assert query(web.netns, "10.0.0.1", "web.acme.internal") == (0, ["10.0.0.2"])
        assert query(web.netns, "fd00::1", "web.acme.internal", 28) == (0, ["fd00::2"])
        assert query(web.netns, "10.0.0.1", "db", 28) == (0, [])
        for name in ("secret", "secret.globex.internal", "secret.acme.internal", "nobody.acme.internal"):
            assert query(web.netns, "10.0.0.1", name) != (0, ["10.0.0.7"])
        assert query(web.netns, "10.0.0.1", "secret.globex.internal") == (3, [])  # NXDOMAIN
        cloud.set_names("acme", {"db": ["10.0.0.4"]})
        eventually(lambda: query(web.netns, "10.0.0.1", "db") == (0, ["10.0.0.4"]))
        assert query(web.netns, "10.0.0.1", "web.acme.internal") == (3, [])


@isolated
def test_names_are_answered_on_a_network_that_came_later_and_others_are_asked_outside() -> None:
    world = World()
    cloud = Lab(resolvers=(world.ADDRESS,))
    cloud.tenant("acme")
    cloud.network("acme")
    cloud.set_names("acme", {"web": ["10.0.0.2"]})
    cloud.network("acme", "10.7.0.0/24", "fd07::/64", name="later")
    late = cloud.instance("acme", "late", "later")
    eventually(lambda: query(late.netns, "10.7.0.1", "web") == (0, ["10.0.0.2"]))
    with world.instance.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((world.ADDRESS, 53))
        server.settimeout(SOON)
        for asked in ("nobody.acme.internal", "nobody", "web.globex.internal", "example.org"):
            query(late.netns, "10.7.0.1", asked, timeout=0.2)
        question, caller = server.recvfrom(512)
        assert b"\x07example\x03org" in question and caller[0] == world.HOST  # the first that was asked outside


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
@isolated
def test_the_outside_is_asked_although_a_network_has_the_server_s_addresses(six: bool) -> None:
    """The resolver asks the host's end of its uplink; what its own networks hold doesn't matter."""
    world = World()
    cloud = Lab(resolvers=(world.ADDRESS6 if six else world.ADDRESS,))
    cloud.tenant("acme")
    cloud.network("acme", "203.0.113.0/24", "2001:470::/64")
    web = cloud.instance("acme", "web", host=7)
    with world.instance.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((world.ADDRESS6 if six else world.ADDRESS, 53))
        server.settimeout(SOON)
        query(web.netns, "203.0.113.1", "example.org", timeout=0.5)
        question, caller = server.recvfrom(512)
        assert b"\x07example\x03org" in question
        assert caller[0] == (world.HOST6 if six else world.HOST)


@pytest.mark.parametrize("before", ["0", "1"], ids=["did not forward", "forwarded"])
@isolated
def test_a_host_forwards_between_its_own_devices_as_before(before: str) -> None:
    """That it forwards for tenants joins no other networks that it is in, and separates none that it did join."""
    world, lan, later = World(), Instance(), Instance()
    sysctl.write({"ipv4/ip_forward": before, "ipv6/conf/all/forwarding": before})
    beside(world, lan, "lan", 1)
    with two_tenants() as cloud:
        beside(world, later, "later", 2)
        assert sysctl.read("ipv4/ip_forward") == sysctl.read("ipv6/conf/all/forwarding") == "1"
        spy = world.instance.sniffer()
        for address in (world.ADDRESS, world.ADDRESS6):
            for source, passes in ((cloud.instances["acme", "web"], True), (lan, before == "1"), (later, True)):
                mark = os.urandom(8)
                with source.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.sendto(mark, (address, 9))
                assert spy.sees(mark, SOON if passes else 0.2) == passes, (address, source is lan)
        assert cloud.fabric.host_drift() == []
        cloud.fabric.close()
        cloud.fabric.open()
        assert cloud.fabric.host_drift() == [], "after a restart it is known still"
        cloud.fabric.teardown()
        assert sysctl.read("ipv4/ip_forward") == sysctl.read("ipv6/conf/all/forwarding") == before


def beside(world: World, instance: Instance, name: str, number: int) -> None:
    """One more network of the host, with an instance on it that sends everything to the host."""
    four, six = f"172.31.{number}", f"fd31:{number}:"
    with Rtnl() as host, call_in(instance.netns, Rtnl) as far:
        host.execute(netlink.veth(name, "eth0", instance.netns))
        here, there = host.link(name), far.link("eth0")
        assert here and there
        far.execute(netlink.set_link(there.index, up=True))
        host.execute(netlink.add_address(here.index, f"{four}.1/24"), netlink.add_address(here.index, f"{six}:1/64"))
        far.execute(
            netlink.add_address(there.index, f"{four}.2/24"),
            netlink.add_address(there.index, f"{six}:2/64"),
            netlink.add_route("0.0.0.0/0", index=there.index, gateway=f"{four}.1"),
            netlink.add_route("::/0", index=there.index, gateway=f"{six}:1"),
        )
        assert host.sync_carrier(name) and far.sync_carrier("eth0")


@isolated
def test_a_network_may_have_the_addresses_of_another_route_of_the_host() -> None:
    """Both go on as if the other were not there: in either IP version, inside, outside and for `verify`."""
    world, lan = World(), Instance()
    beside(world, lan, "lan", 1)
    cloud = Lab()
    for tenant, subnets in (("acme", ("172.31.1.0/24", "fd31:1::/64")), ("globex", ("10.0.0.0/24", "fd00::/64"))):
        cloud.tenant(tenant)
        cloud.network(tenant, *subnets)
    web, db = cloud.instance("acme", "web"), cloud.instance("acme", "db")
    elsewhere = cloud.instance("globex", "web")
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert (web.port.address, web.port.address6) == ("172.31.1.2", "fd31:1::2"), "the address of the one in the LAN"
    world.tells_callers(80)
    cloud.set_names("acme", {"db": ["172.31.1.3", "fd31:1::3"]})
    spy = lan.sniffer()
    lan_is_seen_from = [("the host", home, True), ("another tenant", elsewhere.netns, True), ("db", db.netns, False)]
    for gateway, neighbour, there, outside, host in (
        ("172.31.1.1", "172.31.1.3", "172.31.1.2", world.ADDRESS, world.HOST),
        ("fd31:1::1", "fd31:1::3", "fd31:1::2", world.ADDRESS6, world.HOST6),
    ):
        family = socket.AF_INET6 if ":" in there else socket.AF_INET
        assert web.pings(gateway) and web.pings(neighbour) and web.connects(outside, 80) == host
        eventually(lambda g=gateway: query(web.netns, g, "db") == (0, ["172.31.1.3"]))  # type: ignore[misc]
        assert query(web.netns, gateway, "db", 28) == (0, ["fd31:1::3"])
        assert ping(home, there), "the host reaches its LAN"
        for who, netns, seen in lan_is_seen_from:
            mark = os.urandom(8)
            with call_in(netns, functools.partial(socket.socket, family, socket.SOCK_DGRAM)) as sock:
                sock.sendto(mark, (there, 9))
            assert spy.sees(mark, SOON if seen else 0.2) == seen, (who, there)
    found = report(cloud)
    assert found.passed and found.drift == []


@isolated
def test_only_pings_and_names_are_answered_by_the_gateway() -> None:
    with two_tenants() as cloud:
        web, inside = cloud.instances["acme", "web"], cloud.inside("acme")
        for gateway, family in (("10.0.0.1", socket.AF_INET), ("fd00::1", socket.AF_INET6)):
            with call_in(inside, functools.partial(socket.create_server, (gateway, 8080), family=family)) as server:
                server.settimeout(0.2)
                assert web.connects(gateway, 8080, 0.2) == ""
                with pytest.raises(TimeoutError):
                    server.accept()
            assert web.pings(gateway) and query(web.netns, gateway, "x.acme.internal") == (3, [])


@isolated
def test_the_mtu_holds_from_end_to_end() -> None:
    cloud = Lab()
    cloud.tenant("acme")
    cloud.network("acme", subnet6="fd00::/64", mtu=1400)
    web, _ = cloud.instance("acme", "web"), cloud.instance("acme", "db")
    assert web.pings("fd00::3", size=1400 - 48)
    assert web.pings("fd00::3", size=1400 - 47)  # in fragments
    fits, over = 1400 - 28, 1400 - 27  # less the headers of IP and ICMP
    assert web.pings("10.0.0.3", size=fits, dont_fragment=True)
    assert not web.pings("10.0.0.3", 0.2, size=over, dont_fragment=True)
    assert web.pings("10.0.0.3", size=over)  # in fragments


@isolated
def test_settings_of_an_instance() -> None:
    with two_tenants() as cloud:
        web = cloud.instances["acme", "web"]
        assert web.do(lambda: sysctl.read("ipv4/ip_unprivileged_port_start")) == "0"
        assert web.do(lambda: sysctl.read("ipv4/ping_group_range")) == "0 2147483647"
        assert web.do(lambda: sysctl.read("ipv6/conf/eth0/accept_ra")) == "0"
        neighbours = [
            f"{ip}/neigh/eth0/{name}" for ip in ("ipv4", "ipv6") for name in ("retrans_time_ms", "mcast_solicit")
        ]
        assert web.do(lambda: [sysctl.read(name) for name in neighbours]) == ["100", "3", "100", "3"]
        assert web.connects("127.0.0.1", 1) == ""  # loopback is up: refused at once


@isolated
def test_bridged_packets_pass_the_routers_rules_by_br_netfilter() -> None:
    with two_tenants() as cloud:
        tenant = cloud.tenants["acme"]
        inside = cloud.inside("acme")
        web = cloud.instances["acme", "web"]
        assert web.pings("10.0.0.3")
        call_in(
            inside, lambda: subprocess.run(["nft", "flush set inet lab paths; flush set inet lab judged"], check=True)
        )
        assert not web.pings("10.0.0.3", 0.3)
        assert cloud.fabric.installed(tenant).drift == ["br1 is missing in set paths"]
        cloud.apply("acme")
        assert cloud.fabric.installed(tenant).drift == []


@isolated
def test_applying_again_changes_nothing_and_repairs_damage() -> None:
    with two_tenants() as cloud:
        tenant = cloud.tenants["acme"]
        web, inside = cloud.instances["acme", "web"], cloud.inside("acme")
        before = call_in(inside, lambda: (Rtnl().links(), Rtnl().addresses()))

        def again() -> None:
            cloud.apply("acme")
            cloud.plug(web)

        again()
        assert call_in(inside, lambda: (Rtnl().links(), Rtnl().addresses())) == before
        assert cloud.fabric.installed(tenant).drift == []
        with call_in(inside, Rtnl) as rtnl, call_in(web.netns, Rtnl) as within:
            eth0 = within.link("eth0")
            assert eth0
            damages = {
                "port gone": lambda: rtnl.execute(netlink.delete_link(name=naming.port(web.port.index))),
                "port off the bridge": lambda: rtnl.execute(netlink.set_link(naming.port_index(1), master=0)),
                "gateway gone": lambda: rtnl.execute(netlink.delete_address(naming.bridge_index(1), "10.0.0.1/24")),
                "uplink gone": lambda: rtnl.execute(netlink.delete_link(name=naming.UPLINK)),
                "wrong address": lambda: within.execute(netlink.add_address(eth0.index, "10.0.0.99/24")),
                "bridge down": lambda: rtnl.execute(netlink.set_link(naming.bridge_index(1), up=False)),
            }
            for name, damage in damages.items():
                damage()  # type: ignore[no-untyped-call]
                again()
                assert web.pings("10.0.0.3"), name
                assert web.pings("10.0.0.1"), name
                assert cloud.fabric.installed(tenant).drift == [], name
                assert not any(a.address == "10.0.0.99/24" for a in within.addresses()), name
                eth0 = within.link("eth0")
                assert eth0


@isolated
def test_a_namespace_that_was_taken_away_is_made_again() -> None:
    with two_tenants() as cloud:
        tenant, network = cloud.tenants["acme"], cloud.networks["acme", "net"]
        syscalls.umount2(cloud.fabric.naming.namespace("acme"), syscalls.MNT_DETACH)  # as `ip netns del` does
        assert cloud.fabric.status(tenant, network).ready is False
        cloud.apply("acme")
        for name in ("web", "db"):
            cloud.plug(cloud.instances["acme", name])
        assert cloud.instances["acme", "web"].pings("10.0.0.3")
        eventually(lambda: cloud.fabric.status(tenant, network).ready)
        assert cloud.fabric.installed(tenant).drift == []


@isolated
def test_status_is_measured() -> None:
    with two_tenants() as cloud:
        tenant, network = cloud.tenants["acme"], cloud.networks["acme", "net"]
        assert cloud.fabric.status(tenant, network).ready
        assert cloud.fabric.status(tenant, network).ports == 2
        pid = int(next(cloud.run.glob("dns/acme/pid")).read_text())
        os.kill(pid, 9)
        eventually(lambda: "the resolver does not run" in cloud.fabric.installed(tenant).drift)
        status = cloud.fabric.status(tenant, network)
        assert not status.ready and status.reason == "no resolver answers at 10.0.0.1"
        assert "the resolver does not run" in cloud.fabric.installed(tenant).drift
        cloud.apply("acme")
        assert cloud.fabric.status(tenant, network).ready


@isolated
def test_a_failed_plug_leaves_nothing() -> None:
    with two_tenants() as cloud:
        web = cloud.instances["acme", "web"]
        cloud.unplug(web)
        bare = cloud.fabric.installed(cloud.tenants["acme"])
        cloud.apply("acme", networks=[])
        with pytest.raises(InsulaError) as failed:
            cloud.plug(web)
        assert "\n" not in str(failed.value) and "web" in str(failed.value)
        after = cloud.fabric.installed(cloud.tenants["acme"])
        assert [p.index for p in after.ports] == [p.index for p in bare.ports]
        assert web.do(lambda: [link.name for link in Rtnl().links()]) == ["lo"]


@isolated
def test_tenants_are_served_from_several_threads() -> None:
    cloud = Lab()
    errors: list[BaseException] = []
    for tenant in ("a", "b", "c", "d"):
        cloud.tenant(tenant)
        cloud.network(tenant, "10.0.0.0/16", "fd00::/64")
    made = {t: [prepared(cloud, t) for _ in range(10)] for t in cloud.tenants}

    def work(tenant: str) -> None:
        try:
            for _ in range(3):
                for instance in made[tenant]:
                    cloud.plug(instance)
                for instance in made[tenant][1:]:
                    cloud.unplug(instance)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tenant,)) for tenant in cloud.tenants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for tenant in cloud.tenants:
        installed = cloud.fabric.installed(cloud.tenants[tenant])
        assert [port.index for port in installed.ports] == [made[tenant][0].port.index]
        assert installed.drift == []
        assert made[tenant][0].pings("10.0.0.1")


@isolated
def test_the_first_packet_arrives() -> None:
    """A device that has come up drops packets until the kernel's queue of link changes ran: up to a second."""
    with two_tenants() as cloud:
        web = cloud.instances["acme", "web"]
        for _ in range(30):
            cloud.unplug(web)
            cloud.plug(web)
            assert web.pings("10.0.0.3")


@isolated
def test_a_detached_port_is_attached_again() -> None:
    cloud = Lab()
    cloud.tenant("acme")
    cloud.network("acme", "10.0.0.0/16", "fd00::/64")
    for _ in range(5):
        instance = prepared(cloud, "acme")
        cloud.plug(instance)
        eventually(lambda instance=instance: instance.pings("10.0.0.1"))  # type: ignore[misc]


def prepared(cloud: Lab, tenant: str) -> Instance:
    """An instance that was attached once."""
    instance = cloud.instance(tenant, f"i{len(cloud.instances)}")
    cloud.unplug(instance)
    return instance


@isolated
def test_pings_of_the_laboratory_can_fail() -> None:
    with two_tenants() as cloud:
        assert not ping(cloud.inside("acme"), "10.0.0.9", 0.2)
        assert ping(cloud.inside("acme"), "10.0.0.2")
