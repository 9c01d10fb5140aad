"""Static routes of routers, with packets: what they lead to, and for which networks."""

from __future__ import annotations

import os

import msgspec

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.objects import AddressPair
from tests.support.lab import Instance, Lab, World, isolated
from tests.system.test_network_routers import SHORT, networks, udp_frame

BEHIND = ("172.16.5.1", "fd20::1")


def has_addresses_behind(lab: Lab, instance: Instance) -> None:
    """Let the instance have further addresses, on its loopback device and as allowed address pairs."""
    with instance.do(Rtnl) as inside:
        inside.execute(*(netlink.add_address(1, f"{each}/{128 if ':' in each else 32}") for each in BEHIND))
    pairs = [AddressPair(address=each) for each in BEHIND]
    instance.port = msgspec.structs.replace(instance.port, allowed_pairs=pairs)
    lab.apply(instance.port.tenant)


@isolated
def test_a_static_route_leads_through_an_instance() -> None:
    lab = Lab()
    one, two, three = networks(lab, "acme")
    routes = {"172.16.0.0/16": "10.2.0.2", "fd20::/32": "fd00:2::2"}
    lab.router("acme", "n1", "n2", routes=routes)
    has_addresses_behind(lab, two)
    for address in BEHIND:
        assert one.pings(address), "from another network of the router"
        assert not three.pings(address, SHORT), "not from a network that is apart"
    lab.router("acme", "n1", "n2")
    assert not one.pings(BEHIND[0], SHORT)
    netns = lab.inside("acme")
    with call_in(netns, Rtnl) as rtnl:
        assert not [rule for rule in rtnl.rules() if rule.priority in (1000, 1001, 1002)], "nothing is left"
        assert not [route for route in rtnl.routes() if route.table > 255]
    os.close(netns)


@isolated
def test_the_longest_destination_decides() -> None:
    lab = Lab()
    one, two, three = networks(lab, "acme")
    routes = {"172.16.0.0/12": "10.3.0.2", "172.16.5.0/24": "10.2.0.2", "0.0.0.0/0": "10.3.0.2"}
    lab.router("acme", "n1", "n2", "n3", routes={**routes, "fd20::/16": "fd00:3::2", "fd20::/64": "fd00:2::2"})
    has_addresses_behind(lab, two)
    seen = three.sniffer()
    assert all(map(one.pings, BEHIND))
    assert one.pings("10.3.0.2") and one.pings("10.2.0.2"), "networks are longer than a default route"
    one.send_frame(udp_frame(one, "10.1.0.2", "172.16.6.1", b"by the shorter one"))
    assert seen.sees(b"by the shorter one", 5)


@isolated
def test_the_routes_of_a_router_act_for_its_own_networks_only() -> None:
    world = World()
    world.tells_callers(80)
    lab = Lab()
    one, two, three = networks(lab, "acme")
    lab.router("acme", "n1", "n2", routes={"0.0.0.0/0": "10.2.0.2", "::/0": "fd00:2::2"})
    lab.router("acme", "n3", name="other")
    assert three.connects(world.ADDRESS, 80) and three.connects(world.ADDRESS6, 80), "it has its own way out"
    seen = two.sniffer()
    one.send_frame(udp_frame(one, "10.1.0.2", world.ADDRESS, b"by the default route"))
    assert seen.sees(b"by the default route", 5)
    assert not one.connects(world.ADDRESS, 80, SHORT), "the instance forwards nothing"


@isolated
def test_routes_that_were_damaged_are_repaired() -> None:
    lab = Lab()
    one, two, _ = networks(lab, "acme")
    lab.router("acme", "n1", "n2", routes={"172.16.0.0/16": "10.2.0.2", "fd20::/32": "fd00:2::2"})
    has_addresses_behind(lab, two)
    assert all(map(one.pings, BEHIND))
    netns = lab.inside("acme")
    with call_in(netns, Rtnl) as rtnl:
        ours = [route for route in rtnl.routes() if route.table > 255]
        rtnl.execute(*map(netlink.delete_route_in, ours))
        rtnl.execute(*(netlink.delete_rule(rule) for rule in rtnl.rules() if rule.priority == 1000))
        assert not one.pings(BEHIND[0], SHORT)
        lab.apply("acme")
        assert all(map(one.pings, BEHIND))
        found = [route for route in rtnl.routes() if route.table > 255]
        assert set(found) == set(ours)
        strange = netlink.add_route_in(ours[0]._replace(destination="192.168.7.0/24", gateway=None), protocol=4)
        rtnl.execute(strange)
        assert lab.fabric.installed(lab.tenants["acme"]).drift == [], "it is harmless"
        lab.apply("acme")
        assert {route for route in rtnl.routes() if route.table > 255} == set(ours)
    os.close(netns)
