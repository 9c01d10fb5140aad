"""A tenant's open connections from outside are limited, and a client has a small part of them only.

A limit that is small is exact. A large one is spread over buckets, so the first refusal comes somewhat before it.
"""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
from collections.abc import Sequence

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.linux import host_rules, sysctl
from tests.support.external import asks, publish, tells
from tests.support.lab import SOON, Lab, World, isolated, two_tenants

SHORT = 0.5
QUIET = 2.0
TRIES = 3
PORT = 5353
FEW = 120


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_rules, "CONNECTIONS_CLIENT", FEW)


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


def forget_late(lab: Lab) -> None:
    """Have entries of datagrams outlive the test, however long it takes."""
    late = {"netfilter/nf_conntrack_udp_timeout": "600"}
    sysctl.write(late)
    call_in(lab.inside("acme"), lambda: sysctl.write(late))


def answered(sockets: Sequence[socket.socket]) -> int:
    """How many of them have got an answer when none has come for a while. They are closed then. Those without an answer
    ask again: whoever answers may have lost a datagram, whose connection is open, and one that was refused is again."""
    waiting = selectors.DefaultSelector()
    for sock in sockets:
        waiting.register(sock, selectors.EVENT_READ)
    found = 0
    for _ in range(TRIES):
        while waiting.get_map() and (ready := waiting.select(QUIET if found else SOON)):
            for key, _ in ready:
                waiting.unregister(key.fileobj)
                with contextlib.suppress(OSError):  # an ICMP error is no answer
                    found += bool(key.fileobj.recv(100))  # type: ignore[union-attr]
        for key in waiting.get_map().values():
            with contextlib.suppress(OSError):
                key.fileobj.send(b"who am I?")  # type: ignore[union-attr]
    waiting.close()
    for sock in sockets:
        sock.close()
    return found


def third_tenant(lab: Lab) -> int:
    """The namespace of an instance of another tenant."""
    lab.tenant("initech")
    lab.network("initech", subnet6="fd00::/64")
    return lab.instance("initech", "web").netns


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_two_instances_of_a_tenant_do_not_fill_what_another_may_have_open(version: int, few: None) -> None:
    world = World()
    with two_tenants() as lab:
        forget_late(lab)
        tells(lab.instances["acme", "web"], 53, udp=True)
        publish(lab, "acme", web=f"{PORT}:53/udp")
        host, third = World.HOST if version == 4 else World.HOST6, third_tenant(lab)
        attackers = [lab.instances["globex", each] for each in ("web", "db")]
        each = FEW // 2 + 10
        any_ = "0.0.0.0" if version == 4 else "::"
        opened = [sock for one in attackers for sock in flows(one.netns, any_, host, each)]
        assert answered(opened) == FEW, "of both together"
        assert all(asks(one.netns, host, PORT, SHORT) == "" for one in attackers)
        assert asks(third, host, PORT) and asks(world.instance.netns, host, PORT), "others get in"
        assert asks(lab.instances["acme", "db"].netns, host, PORT), "and the tenant itself"


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_a_client_outside_does_not_fill_it_with_any_address_of_its_own(version: int, few: None) -> None:
    """An IPv6 client has a /64."""
    world = World()
    with two_tenants() as lab:
        forget_late(lab)
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
        assert answered(flows(outside, own, host, FEW + 10)) == FEW
        assert bool(answered(flows(outside, more[0], host, 3))) == (version == 4), "another address of the same /64"
        assert answered(flows(outside, others[0], host, 3)) == 3, "another client"
        assert asks(outside, host, 5354), "the limit is for each tenant that is called"


@isolated
def test_a_client_is_refused_near_its_limit_and_not_before_three_quarters_of_it() -> None:
    world, most = World(), host_rules.CONNECTIONS_CLIENT
    with two_tenants() as lab:
        forget_late(lab)
        tells(lab.instances["acme", "web"], 53, udp=True)
        publish(lab, "acme", web=f"{PORT}:53/udp")
        outside = world.instance.netns
        opened = [flows(outside, World.ADDRESS, World.HOST, count) for count in (most * 3 // 4, most)]
        early, late = map(answered, opened)
        assert early == most * 3 // 4
        assert 0.9 * most < early + late <= most
