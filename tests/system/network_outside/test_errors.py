"""ICMP errors about packets to a floating address come from that address: the outside learns no inner one."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network

import pytest

from insula.network.intent import FloatingIntent, OutsideIntent, PolicyIntent
from tests.support.icmp_errors import error_of, keep_errors, reported
from tests.support.lab import Instance, Lab, Sniffer, World, isolated
from tests.support.policy_lab import policy

NEAR, NEAR6 = "203.0.113.77", "2001:470::77"
OTHER, OTHER6 = "203.0.113.78", "2001:470::78"
FAMILIES = pytest.mark.parametrize(("near", "host"), [(NEAR, World.HOST), (NEAR6, World.HOST6)], ids=["ipv4", "ipv6"])
INNER = [ip_network(each) for each in ("10.0.0.0/8", "100.64.0.0/10", "fc00::/7")]
"""What no packet to the outside may have as an address, nor quote as one."""


@contextmanager
def floating(world: World) -> Iterator[tuple[Lab, Instance]]:
    """acme's web with a floating address of each version, in a network with a small MTU."""
    lab = Lab()
    for tenant, near, near6 in (("acme", NEAR, NEAR6), ("globex", OTHER, OTHER6)):
        lab.tenant(tenant)
        lab.network(tenant, subnet6="fd00::/64", mtu=1280)
        port = lab.instance(tenant, "web").port
        some = [FloatingIntent(address=a, target=t) for a, t in ((near, port.address), (near6, port.address6))]
        lab.others[tenant] = {"outside": OutsideIntent(floating=some)}
        lab.apply(tenant)
    spy = world.instance.sniffer()
    yield lab, lab.instances["acme", "web"]
    told = list(errors(spy))
    assert told, "the spy sees errors at all"
    assert [each for each in told if any(ip_address(one) in inner for one in each for inner in INNER)] == []


def errors(spy: Sniffer) -> Iterator[tuple[str, ...]]:
    """The addresses in and quoted by each ICMP error that has arrived."""
    spy.socket.settimeout(0)
    while True:
        try:
            frame, (_, _, kind, *_) = spy.socket.recvfrom(65536)
        except BlockingIOError:
            return
        (type_,), packet = struct.unpack_from("!H", frame, 12), frame[14:]
        if kind == 4:  # PACKET_OUTGOING
            continue
        if type_ == 0x0800 and packet[9] == 1 and packet[20] in (3, 11):
            yield addresses(packet[12:20] + packet[28 + 12 : 28 + 20], 4)
        if type_ == 0x86DD and packet[6] == 58 and packet[40] in (1, 2, 3):
            yield addresses(packet[8:40] + packet[48 + 8 : 48 + 40], 16)


def addresses(data: bytes, size: int) -> tuple[str, ...]:
    return tuple(str(ip_address(data[at : at + size])) for at in range(0, len(data), size))


@isolated
@FAMILIES
def test_a_trace_from_outside_sees_the_host_and_the_floating_address(near: str, host: str) -> None:
    world = World()
    with floating(world):
        seen = [reported(world.instance, near, hops=hops) for hops in (1, 2, 3)]
        assert [each and each.by for each in seen] == [host, near, near]
        arrived = seen[2]
        assert arrived and arrived.number == errno.ECONNREFUSED, "the instance itself: nobody listens there"


@isolated
@FAMILIES
def test_a_packet_that_is_too_big_is_reported_by_the_floating_address(near: str, host: str) -> None:
    world = World()
    with floating(world):
        assert reported(world.instance, near, size=1400) == (errno.EMSGSIZE, near, 1280)
        fits = reported(world.instance, near, size=1280)
        assert fits and fits.number == errno.ECONNREFUSED and fits.by == near


@isolated
@FAMILIES
def test_a_policy_refuses_with_the_floating_address(near: str, host: str) -> None:
    world = World()
    with floating(world) as (lab, _):
        denied = policy("web", {"app": "web"}, "in any udp/1")
        lab.apply("acme", policy=PolicyIntent(policies=[denied], labels={"web": {"app": "web"}}))
        refused = reported(world.instance, near)
        assert refused and refused.by == near and refused.number != errno.ECONNREFUSED
        allowed = reported(world.instance, near, port=1)
        assert allowed and allowed.number == errno.ECONNREFUSED, "the control: that arrives, and nobody listens"


@isolated
@FAMILIES
def test_answers_to_what_the_instance_has_sent_are_reported_by_it_too(near: str, host: str) -> None:
    world = World()
    away = World.ADDRESS6 if ":" in near else World.ADDRESS
    family = socket.AF_INET6 if ":" in near else socket.AF_INET
    with floating(world) as (_, web), world.instance.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((away, 9))
        with web.socket(family, socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", (away, 9))
            server.settimeout(10)
            _, caller = server.recvfrom(100)
            assert caller[0] == near
        keep_errors(server, 2)
        server.sendto(b"an answer that comes to the router", caller)
        answer = error_of(server)
        assert answer and answer.by == near


@isolated
@FAMILIES
def test_an_instance_is_told_by_its_gateway_and_by_others_floating_address(near: str, host: str) -> None:
    """What another tenant's instance learns about it is what the outside learns."""
    world = World()
    with floating(world) as (lab, web):
        stranger, six = lab.instances["globex", "web"], ":" in near
        away = World.ADDRESS6 if six else World.ADDRESS
        first, second = (reported(web, away, hops=hops) for hops in (1, 2))
        assert first and first.by == ("fd00::1" if six else "10.0.0.1")
        assert second and ip_address(second.by) not in INNER[0], "the host"
        hops = [reported(stranger, near, hops=hops) for hops in (1, 2, 3, 4)]
        assert [each and each.by for each in hops[2:]] == [near, near]
        assert reported(world.instance, near, hops=2), "for the spy"
