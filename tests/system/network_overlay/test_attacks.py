"""Forged packets of the overlay: from outside the cloud, from a host that lies, and from inside an instance.

Each forgery has a twin with one difference that makes it right, and the twin arrives.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.addresses import gateway_mac
from tests.support.frames import BROADCAST, advertisement, arp, ethernet, router_advertisement, udp
from tests.support.hosts import Cloud, Machine
from tests.support.lab import SOON, Instance, isolated

IP, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
SHORT = 0.3


def encapsulated(vni: int, frame: bytes) -> bytes:
    """A VXLAN header (RFC 7348) and a frame."""
    return struct.pack("!II", 0x08000000, vni << 8) + frame


def two_hosts(version: int) -> tuple[Cloud, Instance, Instance]:
    """acme's web on the first and db on the second host; globex has the same."""
    cloud = Cloud(2, version)
    for tenant in ("acme", "globex"):
        cloud.tenant(tenant)
        cloud.network(tenant)
        cloud.instance(tenant, "web", 1)
        cloud.instance(tenant, "db", 2)
    return cloud, cloud.instances["acme", "web"], cloud.instances["acme", "db"]


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_packets_of_the_overlay_come_from_the_hosts_of_the_cloud_only(version: int) -> None:
    cloud, web, db = two_hosts(version)
    stranger, target = Machine(9, version, cloud.mtu), cloud.hosts[0].address
    spy = web.sniffer()
    for sender, arrives in ((cloud.hosts[1], True), (stranger, False)):
        for kind, source, address in ((IP, "10.0.0.3", "10.0.0.2"), (IPV6, "fd00::3", "fd00::2")):
            mark = os.urandom(6)
            frame = ethernet(web.port.mac, db.port.mac, kind, udp(source, address, mark))
            sender.sends(encapsulated(cloud.networks["acme", "net"].vni, frame), target)
            assert spy.sees(mark, SOON if arrives else SHORT) == arrives, (sender.number, kind)
    first, second = cloud.hosts
    first.do(lambda: first.fabric.set_hosts([first.address, second.address, stranger.address]))
    stranger.sends(encapsulated(cloud.networks["acme", "net"].vni, frame), target)
    assert spy.sees(mark, SOON), "the control: as a member it may"
    first.do(lambda: first.fabric.set_hosts([first.address, second.address]))
    stranger.sends(encapsulated(cloud.networks["acme", "net"].vni, frame), target)
    assert not spy.sees(mark, SHORT)


@isolated
def test_frames_from_another_host_have_the_source_addresses_of_its_instances() -> None:
    cloud, web, db = two_hosts(4)
    mine, theirs = web.port.mac, db.port.mac
    vni, foreign = cloud.networks["acme", "net"].vni, cloud.networks["globex", "net"].vni
    other = cloud.instances["globex", "web"]
    nobody = "02:66:00:00:00:01"
    cases: dict[str, tuple[bool, int, Callable[[bytes], bytes]]] = {
        "IPv4": (True, vni, lambda m: ethernet(mine, theirs, IP, udp("10.0.0.3", "10.0.0.2", m))),
        "IPv6": (True, vni, lambda m: ethernet(mine, theirs, IPV6, udp("fd00::3", "fd00::2", m))),
        "ARP": (True, vni, lambda m: ethernet(mine, theirs, ARP, arp(2, theirs, "10.0.0.3", mine, "10.0.0.2") + m)),
        "NDP": (
            True,
            vni,
            lambda m: ethernet(mine, theirs, IPV6, advertisement("fd00::3", "fd00::2", "fd00::3", m)),
        ),
        "MAC of nobody": (False, vni, lambda m: ethernet(mine, nobody, IP, udp("10.0.0.3", "10.0.0.2", m))),
        "MAC of the receiver": (False, vni, lambda m: ethernet(mine, mine, IP, udp("10.0.0.3", "10.0.0.2", m))),
        "MAC of the gateway": (
            False,
            vni,
            lambda m: ethernet(mine, gateway_mac(1), IP, udp("10.0.0.3", "10.0.0.2", m)),
        ),
        "IPv4 of nobody": (False, vni, lambda m: ethernet(mine, theirs, IP, udp("10.0.0.9", "10.0.0.2", m))),
        "IPv4 of the gateway": (False, vni, lambda m: ethernet(mine, theirs, IP, udp("10.0.0.1", "10.0.0.2", m))),
        "IPv4 of outside": (False, vni, lambda m: ethernet(mine, theirs, IP, udp("203.0.113.9", "10.0.0.2", m))),
        "IPv6 of nobody": (False, vni, lambda m: ethernet(mine, theirs, IPV6, udp("fd00::9", "fd00::2", m))),
        "ARP: I am the gateway": (
            False,
            vni,
            lambda m: ethernet(BROADCAST, theirs, ARP, arp(2, theirs, "10.0.0.1", mine, "10.0.0.2") + m),
        ),
        "NDP: I am the gateway": (
            False,
            vni,
            lambda m: ethernet(mine, theirs, IPV6, advertisement("fd00::3", "fd00::2", "fd00::1", m)),
        ),
        "router advertisement": (
            False,
            vni,
            lambda m: ethernet(mine, theirs, IPV6, router_advertisement("fe80::1", "ff02::1", m)),
        ),
        "VNI of nobody": (False, 77, lambda m: ethernet(mine, theirs, IP, udp("10.0.0.3", "10.0.0.2", m))),
    }
    spy = web.sniffer()
    for what, (arrives, number, make) in cases.items():
        mark = os.urandom(4)
        cloud.hosts[1].sends(encapsulated(number, make(mark)), cloud.hosts[0].address)
        assert spy.sees(mark, SOON if arrives else SHORT) == arrives, what
    # with the other tenant's VNI it is a frame of that tenant, to whom these addresses belong as well
    mark, there = os.urandom(6), other.sniffer()
    frame = ethernet(other.port.mac, theirs, IP, udp("10.0.0.3", "10.0.0.2", mark))
    cloud.hosts[1].sends(encapsulated(foreign, frame), cloud.hosts[0].address)
    assert not spy.sees(mark, SHORT) and not there.sees(mark, SHORT), "another MAC address than globex' db has"


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_an_instance_sends_no_packets_of_the_overlay(version: int) -> None:
    """It would be translated to the host's address, which is that of a member."""
    cloud, web, _ = two_hosts(version)
    victim = cloud.instances["globex", "db"]
    source = cloud.instances["globex", "web"].port.mac
    first, second = cloud.hosts
    spy, wire = victim.sniffer(), second.sniffer()
    packet = udp("10.0.0.2", "10.0.0.3", b"")
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    vni = cloud.networks["globex", "net"].vni
    with web.socket(family, socket.SOCK_DGRAM) as sock:
        for port, padding, arrives in ((4790, 0, True), (4789, 0, False), (4790, 3000, True), (4789, 3000, False)):
            mark = os.urandom(8)
            forged = encapsulated(vni, ethernet(victim.port.mac, source, IP, packet + mark + bytes(padding)))
            sock.sendto(forged, (second.address, port))
            assert wire.sees(mark, SOON if arrives else SHORT) == arrives, (port, padding)
            assert not spy.sees(mark, 0.05)
    mark = os.urandom(8)
    frame = ethernet(victim.port.mac, source, IP, udp("10.0.0.2", "10.0.0.3", mark))
    first.sends(encapsulated(vni, frame), second.address)
    assert spy.sees(mark, SOON), "the control: from the host it would arrive"


@isolated
def test_an_instance_forges_no_source_across_hosts() -> None:
    cloud, web, db = two_hosts(4)
    cloud.instance("acme", "log", 2, number=7)
    log = cloud.instances["acme", "log"].port
    wire, spy = cloud.hosts[1].sniffer(), db.sniffer()
    mine, theirs = web.port.mac, db.port.mac
    honest = ethernet(theirs, mine, IP, udp("10.0.0.2", "10.0.0.3", b"honest twin"))
    web.send_frame(honest)
    assert spy.sees(b"honest twin", SOON)
    for what, frame in {
        "MAC of another": ethernet(theirs, log.mac, IP, udp("10.0.0.2", "10.0.0.3", b"forged frame")),
        "address of another": ethernet(theirs, mine, IP, udp("10.0.0.7", "10.0.0.3", b"forged frame")),
        "address of another, IPv6": ethernet(theirs, mine, IPV6, udp("fd00::7", "fd00::3", b"forged frame")),
    }.items():
        web.send_frame(frame)
        assert not wire.sees(b"forged frame", SHORT), what


@isolated
def test_the_other_addresses_of_a_host_are_no_way_in() -> None:
    """The kernel's socket is bound to all of them."""
    cloud, web, db = two_hosts(4)
    stranger, first = Machine(9, 4, cloud.mtu), cloud.hosts[0]
    with call_in(first.netns, Rtnl) as rtnl:
        wan = rtnl.index("wan")
        assert wan
        rtnl.execute(netlink.add_address(wan, "198.51.100.101/24"))
    spy = web.sniffer()
    for sender, arrives in ((stranger, False), (cloud.hosts[1], True)):
        mark = os.urandom(6)
        frame = ethernet(web.port.mac, db.port.mac, IP, udp("10.0.0.3", "10.0.0.2", mark))
        sender.sends(encapsulated(cloud.networks["acme", "net"].vni, frame), "198.51.100.101")
        assert spy.sees(mark, SOON if arrives else SHORT) == arrives


@isolated
def test_with_a_device_the_overlay_comes_from_that_device_only() -> None:
    cloud, web, db = two_hosts(4)
    first, second = cloud.hosts
    first.do(first.fabric.close)
    spy = web.sniffer()
    for device, arrives in (("other", False), ("wan", True)):
        first.start(device)
        mark = os.urandom(6)
        frame = ethernet(web.port.mac, db.port.mac, IP, udp("10.0.0.3", "10.0.0.2", mark))
        second.sends(encapsulated(cloud.networks["acme", "net"].vni, frame), first.address)
        assert spy.sees(mark, SOON if arrives else SHORT) == arrives
        assert first.do(first.fabric.host_drift) == []
        first.do(first.fabric.close)
