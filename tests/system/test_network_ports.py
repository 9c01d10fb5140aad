"""Several ports of one instance: which way packets leave, and what stays of a port that is unplugged."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.objects import Port
from insula.network.fabric import NetnsNic
from insula.network.linux import beyond, naming
from insula.network.linux.interfaces import number
from insula.network.proof import reachability
from tests.support.lab import Instance, Lab, Sniffer, World, eventually, isolated, query, two_tenants

A = {4: "10.0.0.", 6: "fd00::"}
B = {4: "10.1.0.", 6: "fd01::"}
VERSIONS = (4, 6)


@contextmanager
def two_networks() -> Iterator[tuple[Lab, Instance, Port]]:
    """acme's web (.2) is on net and on b; db (.3) is on net, and there (.5) on b."""
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="b")
        cloud.instance("acme", "there", network="b", host=5)
        web = cloud.instances["acme", "web"]
        second = cloud.new_port("acme", "web", "b", 2, interface="eth1")
        cloud.plug_more(web, second)
        yield cloud, web, second


def leaves_by(cloud: Lab, web: Instance, source: str, destination: str) -> list[str]:
    """The interfaces of web by which a packet from one address to another comes to the router."""
    spies = {port.interface: Sniffer(cloud.inside("acme"), naming.port(port.index)) for port in (web.port, *web.more)}
    mark = f"{source} to {destination}".encode()
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with web.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        sock.sendto(mark, (destination, 9))
    return [interface for interface, spy in spies.items() if spy.sees(mark, 0.5)]


@isolated
def test_it_is_reached_on_both_networks_at_once() -> None:
    with two_networks() as (cloud, web, _):
        db, there = cloud.instances["acme", "db"], cloud.instances["acme", "there"]
        web.serves("here", 80)
        for version in VERSIONS:
            assert db.connects(f"{A[version]}2", 80) == "here"
            assert there.connects(f"{B[version]}2", 80) == "here"
            assert web.pings(f"{A[version]}3") and web.pings(f"{B[version]}5")
            assert not db.pings(f"{B[version]}2", 0.3), "the networks are apart"


@isolated
def test_a_packet_leaves_by_the_port_of_its_address() -> None:
    """To its own network, to that of the other port, and to the outside."""
    with two_networks() as (cloud, web, _):
        for version, outside in ((4, "198.51.100.7"), (6, "2001:db9::7")):
            for destination in (f"{A[version]}3", f"{B[version]}5", outside):
                assert leaves_by(cloud, web, f"{A[version]}2", destination) == ["eth0"], destination
                assert leaves_by(cloud, web, f"{B[version]}2", destination) == ["eth1"], destination


@isolated
def test_what_has_no_address_yet_leaves_by_the_first_port() -> None:
    with two_networks() as (_, web, _):
        world = World()
        world.tells_callers(80)
        assert web.connects(world.ADDRESS, 80), "the first one leads outside"
        with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((world.ADDRESS, 9))
            assert sock.getsockname()[0] == f"{A[4]}2"
        with web.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.bind((f"{B[4]}2", 0))
            sock.settimeout(5)
            sock.connect((world.ADDRESS, 80))
            assert sock.recv(100), "so does the second, for what is sent from its address"


@isolated
def test_it_can_not_send_from_the_address_of_one_port_by_the_other() -> None:
    """The anti-spoofing is each port's own: without the rules for routes such packets would be lost."""
    with two_networks() as (cloud, web, _):
        assert web.pings(f"{B[4]}5"), "its MAC address is known from now on"
        spy = cloud.instances["acme", "there"].sniffer()
        with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth1")
            sock.bind((f"{A[4]}2", 0))
            sock.sendto(b"forged by the other", (f"{B[4]}5", 9))
        assert not spy.sees(b"forged by the other")
        with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"honest", (f"{B[4]}5", 9))
        assert spy.sees(b"honest", 2.0), "the control"


@isolated
def test_unplugging_leaves_the_other_port_alone() -> None:
    """A connection on it goes on; nothing of the port is left inside, in the tenant's namespace, or in the names."""
    with two_networks() as (cloud, web, second):
        db, there = cloud.instances["acme", "db"], cloud.instances["acme", "there"]
        with (
            web.socket(socket.AF_INET, socket.SOCK_STREAM) as server,
            db.socket(socket.AF_INET, socket.SOCK_STREAM) as client,
        ):
            server.bind((f"{A[4]}2", 99))
            server.listen()
            client.settimeout(10)
            client.connect((f"{A[4]}2", 99))
            connection, _ = server.accept()
            assert query(db.netns, f"{A[4]}1", "web.acme.internal") == (0, [f"{A[4]}2", f"{B[4]}2"])
            cloud.withdraw(web, second)
            cloud.apply("acme")
            connection.send(b"still there")
            assert client.recv(100) == b"still there"
            connection.close()
        assert web.pings(f"{A[4]}3") and not there.pings(f"{B[4]}2", 0.3)
        with call_in(web.netns, Rtnl) as inside:
            assert {link.name for link in inside.links()} >= {"lo", "eth0"}
            assert inside.index("eth1") is None
            assert len(inside.default_routes()) == 2, "one for each version of IP"
        eventually(lambda: query(db.netns, f"{A[4]}1", "web.acme.internal") == (0, [f"{A[4]}2"]))
        installed = cloud.fabric.installed(cloud.tenants["acme"])
        networks = [network for (owner, _), network in cloud.networks.items() if owner == "acme"]
        ports = [each.port for (owner, _), each in cloud.instances.items() if owner == "acme"]
        assert [*installed.drift, *reachability.differences(installed, networks, ports)] == []


@isolated
def test_without_its_first_port_the_next_one_has_the_default_routes() -> None:
    with two_networks() as (cloud, web, second):
        first = web.port
        cloud.withdraw(web, first)
        assert web.port == second
        for version, outside in ((4, "198.51.100.7"), (6, "2001:db9::7")):
            assert leaves_by(cloud, web, f"{B[version]}2", outside) == ["eth1"]
            with web.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                sock.connect((outside, 9))
                assert sock.getsockname()[0] == f"{B[version]}2"
        cloud.plug_more(web, first)
        with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("198.51.100.7", 9))
            assert sock.getsockname()[0] == f"{A[4]}2", "eth0 has them again"
        assert web.pings(f"{A[4]}3") and web.pings(f"{B[4]}5")


@isolated
def test_plugging_twice_is_as_once() -> None:
    """As after a daemon that was killed in the middle of it."""
    with two_networks() as (cloud, web, second):
        web.more.remove(second)
        cloud.plug_more(web, second)
        assert web.pings(f"{B[4]}5") and web.pings(f"{A[6]}3")
        cloud.withdraw(web, second)
        web.more.append(second)
        cloud.withdraw(web, second)
        assert web.pings(f"{A[4]}3")
        cloud.plug_more(web, second)
        assert web.pings(f"{B[6]}5") and leaves_by(cloud, web, f"{B[6]}2", f"{A[6]}3") == ["eth1"]


@isolated
def test_the_counters_of_a_port_stay_until_they_were_read() -> None:
    with two_networks() as (cloud, web, second):
        tenant, network = cloud.tenants["acme"], cloud.networks["acme", "b"]
        assert web.pings(f"{B[4]}5")
        before = cloud.fabric.traffic(tenant, [second])[second.index]
        assert before.sent.packets >= 1
        cloud.withdraw(web, second)
        cloud.apply("acme", ports=[*cloud.intent("acme").ports, second])
        after = cloud.fabric.traffic(tenant, [second])[second.index]
        assert after.sent.packets >= before.sent.packets and after.sent.incarnation == before.sent.incarnation
        cloud.fabric.unplug(tenant, network, second)
        assert cloud.fabric.traffic(tenant, [second]) == {}


@isolated
def test_devices_of_all_ports_are_known() -> None:
    with two_networks() as (cloud, web, second):
        netns = {port.index: web.netns for port in (web.port, second)}
        assert cloud.fabric.strange_devices(netns, [web.port, second]) == []
        assert cloud.fabric.strange_devices(netns, [web.port]) != [], "the control: a port that nobody knows of"


@isolated
def test_other_devices_with_the_name_give_way() -> None:
    """An instance with nested containers may have made an eth1 of its own."""
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", None, name="b")
        cloud.instance("acme", "there", network="b", host=5)
        web = cloud.instances["acme", "web"]
        with call_in(web.netns, Rtnl) as inside:
            inside.execute(netlink.bridge("eth1", mac="02:00:00:00:00:09", mtu=1500))
        cloud.plug_more(web, cloud.new_port("acme", "web", "b", 2, interface="eth1"))
        assert web.pings("10.1.0.5")


@pytest.mark.parametrize("interface", ["eth0", "eth1", "eth10"])
def test_the_number_of_an_interface(interface: str) -> None:
    port = Port(
        tenant="a", network="n", instance="i", index=1, interface=interface, mac="02:10:00:00:00:01", address="10.0.0.2"
    )
    assert f"eth{number(port)}" == interface


@isolated
def test_what_a_router_leads_to_is_reached_by_the_port_on_its_network() -> None:
    """eth0 is on a network that no router joins, eth1 on one that is joined with `far`, which comes later."""
    with two_networks() as (cloud, web, _):
        cloud.network("acme", "10.2.0.0/24", "fd02::/64", name="far")
        far = cloud.instance("acme", "far", network="far", host=9)
        far.serves("far", 80)
        goals = ("10.2.0.9", "fd02::9")
        place = cloud.tenants["acme"], NetnsNic(web.netns)
        world = World()
        world.tells_callers(80)

        def route() -> None:
            cloud.fabric.route(*place, cloud.places(web))

        route()
        assert not any(web.connects(goal, 80, 0.3) for goal in goals)
        cloud.router("acme", "b", "far")
        route()
        assert [web.connects(goal, 80) for goal in goals] == ["far"] * 2
        assert all(web.pings(goal) for goal in goals)
        web.serves("here", 81)
        for version in VERSIONS:
            assert far.connects(f"{B[version]}2", 81) == "here", "answers leave by eth1"
        assert web.pings(f"{A[4]}3") and web.pings(f"{B[6]}5") and web.connects(world.ADDRESS, 80), "as before"
        late = cloud.new_port("acme", "web", "far", 2, interface="eth2")
        cloud.plug_more(web, late)
        assert leaves_by(cloud, web, "10.2.0.2", "10.2.0.9") == ["eth2"] and web.pings("10.2.0.9"), "it is near now"
        cloud.withdraw(web, late)
        assert all(web.pings(goal) for goal in goals), "and far again"
        cloud.router("acme")
        route()
        with call_in(web.netns, Rtnl) as inside:
            assert inside.routes(beyond.PROTOCOL) == []
        assert not web.pings(goals[0], 0.3)


@isolated
def test_of_several_ports_the_longest_destination_decides_and_then_the_first() -> None:
    with two_networks() as (cloud, web, _):
        for number_, name in ((2, "both"), (3, "beyond")):
            cloud.network("acme", f"10.{number_}.0.0/24", f"fd0{number_}::/64", name=name)
        db = cloud.instances["acme", "db"]
        wide = {"172.16.0.0/12": f"{B[4]}5", "172.16.5.0/24": f"{B[4]}5", "0.0.0.0/0": f"{B[4]}5"}
        cloud.router("acme", "b", "beyond", routes=wide, name="second")
        cloud.router("acme", "net", routes={"172.16.5.0/24": db.port.address, "::/0": f"{A[6]}3"}, name="first")
        cloud.fabric.route(cloud.tenants["acme"], NetnsNic(web.netns), cloud.places(web))
        goals = {"172.16.6.1": "eth1", "172.16.5.1": "eth0", "10.3.0.9": "eth1", "198.51.100.7": "eth0"}
        sources = {"eth0": f"{A[4]}2", "eth1": f"{B[4]}2"}
        for goal, interface in goals.items():
            with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect((goal, 9))
                assert sock.getsockname()[0] == sources[interface], goal
