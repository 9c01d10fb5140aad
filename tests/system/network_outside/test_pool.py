"""Packets to addresses of the floating pool that no tenant has end at the host: they don't go in circles."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl, host_routes
from insula.kernel.netns import call_in
from insula.network.intent import FloatingIntent, OutsideIntent
from insula.network.linux import sysctl
from insula.network.linux.fabric import LinuxFabric
from tests.support.external import answers, tells
from tests.support.lab import Lab, World, isolated, two_tenants

POOL = ("198.51.100.0/28", "2001:db8:f::/64")
FORWARDING = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}
IP_TRANSPARENT = 19  # linux/in.h
TAKEN, FREE = ("198.51.100.3", "2001:db8:f::3"), ("198.51.100.4", "2001:db8:f::4")


def routed_world() -> World:
    """A world that sends the packets for the pool to the host, a router, and back whatever the host sends to it."""
    world = World()
    sysctl.write(FORWARDING)
    with call_in(world.instance.netns, Rtnl) as far:
        eth0 = far.link("eth0")
        assert eth0
        for address, gateway in zip(POOL, (World.HOST, World.HOST6), strict=True):
            far.execute(netlink.add_route(address, index=eth0.index, gateway=gateway))
    call_in(world.instance.netns, lambda: sysctl.write(FORWARDING))
    return world


def received() -> int:
    """Packets that the host got from the world."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    return next(int(line.split()[2]) for line in lines if line.split()[0] == "wan:")


def from_elsewhere(world: World) -> int:
    """Packets that the host gets when the world forwards one of a third party to a free address."""
    before = received()
    with call_in(world.instance.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        sock.bind(("192.0.2.99", 0))
        sock.sendto(b"", (FREE[0], 9))
    assert world.instance.pings(World.HOST), "what circles has come before"
    return received() - before


def refused(netns: int, address: str) -> int | None:
    """The error of a TCP connection."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with call_in(netns, lambda: socket.socket(family, socket.SOCK_STREAM)) as sock:
        sock.settimeout(3)
        with pytest.raises(OSError) as caught:
            sock.connect((address, 80))
        return caught.value.errno


def attach(lab: Lab) -> None:
    web = lab.instances["acme", "web"]
    tells(web, 80)
    floating = [
        FloatingIntent(address=address, target=target)
        for address, target in zip(TAKEN, (web.port.address, web.port.address6), strict=True)
    ]
    lab.apply("acme", outside=OutsideIntent(floating=floating))


@isolated
def test_packets_to_free_addresses_end_here() -> None:
    world = routed_world()
    with two_tenants(floating=POOL) as lab:
        attach(lab)
        outside, stranger = world.instance.netns, lab.instances["globex", "web"].netns
        for taken, free in zip(TAKEN, FREE, strict=True):
            assert answers(outside, taken, 80) and answers(stranger, taken, 80)
            for netns in (outside, stranger):
                assert refused(netns, free) in (errno.EHOSTUNREACH, errno.ENETUNREACH)
        assert from_elsewhere(world) < 20, "a circle has some thirty rounds"


@isolated
def test_without_the_pool_they_go_in_circles() -> None:
    world = routed_world()
    with two_tenants():
        assert from_elsewhere(world) > 20


@isolated
def test_a_range_of_a_network_of_the_host_is_reached_there() -> None:
    world = World()
    world.tells_callers(81)
    with two_tenants(floating=("203.0.113.0/24", "2001:470::/64")) as lab:
        web = lab.instances["acme", "web"]
        assert web.connects(World.ADDRESS, 81) == World.HOST and web.connects(World.ADDRESS6, 81) == World.HOST6


@isolated
def test_the_routes_are_those_of_the_pool_now() -> None:
    with two_tenants(floating=POOL) as lab:
        with Rtnl() as host:
            assert host_routes.unreachable(host) == {*POOL}
            host.execute(host_routes.delete_unreachable(POOL[0]))
        assert [text for text in lab.fabric.host_drift() if POOL[0] in text]
        lab.fabric.repair_host()
        assert not lab.fabric.host_drift()
        lab.fabric.close()
        pool_file = lab.run / "network" / "pool.json"
        pool_file.write_text(json.dumps([*json.loads(pool_file.read_bytes()), "192.0.2.0/28"]))  # killed half-way
        lab.fabric = LinuxFabric(lab.run, "lab", resolvers=(), floating=("192.0.2.64/26",))
        lab.fabric.open()
        with Rtnl() as host:
            assert host_routes.unreachable(host) == {"192.0.2.64/26"}
        lab.fabric.teardown()
        with Rtnl() as host:
            assert host_routes.unreachable(host) == set()
