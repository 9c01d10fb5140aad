"""A tenant's open connections from outside are limited, and a client has a small part of them only."""

from __future__ import annotations

import resource
import socket
from collections.abc import Sequence

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.linux.host_rules import CONNECTIONS_CLIENT
from tests.support.external import asks, publish, tells
from tests.support.lab import SOON, Lab, World, isolated, two_tenants

SHORT = 0.5
PORT = 5353


def flows(netns: int, source: str, address: str, count: int) -> list[socket.socket]:
    """Sockets on so many ports of an address, each of which has sent a datagram that an answer may come to."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = []
    for _ in range(count):
        sock = call_in(netns, lambda: socket.socket(family, socket.SOCK_DGRAM))
        sock.bind((source, 0))
        sock.connect((address, PORT))
        sock.send(b"who am I?")
        found.append(sock)
    return found


def answered(sockets: Sequence[socket.socket]) -> int:
    """How many of them have got an answer when no more comes."""
    found = 0
    for sock in sockets:
        sock.settimeout(SOON if not found else 0.01)
        try:
            found += bool(sock.recv(100))
        except OSError:
            continue
        finally:
            sock.close()
    return found


def third_tenant(lab: Lab) -> int:
    """The namespace of an instance of another tenant."""
    lab.tenant("initech")
    lab.network("initech", subnet6="fd00::/64")
    return lab.instance("initech", "web").netns


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_two_instances_of_a_tenant_do_not_fill_what_another_may_have_open(version: int) -> None:
    world = World()
    with two_tenants() as lab:
        tells(lab.instances["acme", "web"], 53, udp=True)
        publish(lab, "acme", web=f"{PORT}:53/udp")
        host, third = World.HOST if version == 4 else World.HOST6, third_tenant(lab)
        attackers = [lab.instances["globex", each] for each in ("web", "db")]
        each = CONNECTIONS_CLIENT // 2 + 100
        any_ = "0.0.0.0" if version == 4 else "::"
        opened = [sock for one in attackers for sock in flows(one.netns, any_, host, each)]
        assert answered(opened) == CONNECTIONS_CLIENT, "of both together"
        assert all(asks(one.netns, host, PORT, SHORT) == "" for one in attackers)
        assert asks(third, host, PORT) and asks(world.instance.netns, host, PORT), "others get in"
        assert asks(lab.instances["acme", "db"].netns, host, PORT), "and the tenant itself"


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_a_client_outside_does_not_fill_it_with_any_address_of_its_own(version: int) -> None:
    """An IPv6 client has a /64."""
    world = World()
    with two_tenants() as lab:
        tells(lab.instances["acme", "web"], 53, udp=True)
        tells(lab.instances["globex", "web"], 53, udp=True)
        publish(lab, "acme", web=f"{PORT}:53/udp")
        publish(lab, "globex", web="5354:53/udp")
        outside, host = world.instance.netns, World.HOST if version == 4 else World.HOST6
        more, others = ("203.0.113.9",), ("198.51.100.7",)
        if version == 6:
            more, others = ("2001:470::9",), ("2001:470:0:1::7",)
        with call_in(outside, Rtnl) as far, Rtnl() as near:
            eth0, wan = far.link("eth0"), near.link("wan")
            assert eth0 and wan
            far.execute(*(netlink.add_address(eth0.index, f"{a}/{32 if version == 4 else 128}") for a in more + others))
            near.execute(netlink.add_route("198.51.100.0/24", index=wan.index, gateway=World.ADDRESS))
            near.execute(netlink.add_route("2001:470:0:1::/64", index=wan.index, gateway=World.ADDRESS6))
        own = World.ADDRESS if version == 4 else World.ADDRESS6
        assert answered(flows(outside, own, host, CONNECTIONS_CLIENT + 100)) == CONNECTIONS_CLIENT
        assert bool(answered(flows(outside, more[0], host, 3))) == (version == 4), "another address of the same /64"
        assert answered(flows(outside, others[0], host, 3)) == 3, "another client"
        assert asks(outside, host, 5354), "the limit is for each tenant that is called"
