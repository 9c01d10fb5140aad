"""An instance can send from its own MAC and IP addresses only, also in ARP and NDP.

Each forgery is sent as a raw frame by web and must not arrive at db; the honest twins around it must.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address

from insula.kernel.netns import call_in
from insula.network.addresses import gateway_mac, link_local
from insula.network.linux import sysctl
from tests.support.frames import (
    ALL_NODES,
    BROADCAST,
    advertisement,
    arp,
    authenticated,
    ethernet,
    fragment,
    icmpv6,
    igmp,
    ipv6,
    mac,
    message6,
    option,
    router_advertisement,
    solicitation,
    syn,
    udp,
)
from tests.support.lab import SOON, Instance, Lab, Sniffer, isolated, two_tenants
from tests.system.hostile.attack import town

ARP, IP, IPV6, VLAN = 0x0806, 0x0800, 0x86DD, 0x8100
MLD_ROUTERS = "ff02::16"
MULTICAST = "33:33:00:00:00:01"
ZERO = "00:00:00:00:00:00"
THEIRS = ip_address("fd00::3").packed
FOREIGN = "02:00:00:00:99:99"
Make = Callable[[bytes], bytes]


def actors(cloud: Lab) -> tuple[Instance, Instance, str, str]:
    web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
    return web, db, web.port.mac, db.port.mac


def frames_of(cloud: Lab) -> tuple[dict[str, Make], dict[str, Make]]:
    """(honest, forged) frames from web to db by name; each takes a mark of 4 bytes."""
    _, _, a, b = actors(cloud)

    def frame(kind: int, payload: bytes, to: str = b, by: str = a) -> bytes:
        return ethernet(to, by, kind, payload)

    def tcp(source: str, target: str, mark: bytes) -> bytes:
        return syn(source, target, 40000, 9, int.from_bytes(mark, "big"))

    ours, theirs, router = link_local(a), link_local(b), link_local(gateway_mac(1))
    advertised = struct.pack("!BBHII", 64, 0, 1800, 0, 0)
    whole_advertisement = advertisement("fd00::2", "fd00::3", "fd00::2", bytes(6))[40:]
    honest: dict[str, Make] = {
        "UDP behind options": lambda m: frame(
            IPV6, ipv6("fd00::2", "fd00::3", 60, bytes((17, 0, 1, 4, 0, 0, 0, 0)) + udp("fd00::2", "fd00::3", m)[40:])
        ),
        "IPv4": lambda m: frame(IP, udp("10.0.0.2", "10.0.0.3", m)),
        "TCP": lambda m: frame(IP, tcp("10.0.0.2", "10.0.0.3", m)),
        "TCP by IPv6": lambda m: frame(IPV6, tcp("fd00::2", "fd00::3", m)),
        "IPv4 broadcast": lambda m: frame(IP, udp("10.0.0.2", "10.0.0.255", m), to=BROADCAST),
        "IPv6": lambda m: frame(IPV6, udp("fd00::2", "fd00::3", m)),
        "IPv6 link-local": lambda m: frame(IPV6, udp(ours, theirs, m)),
        "ARP request": lambda m: frame(ARP, arp(1, a, "10.0.0.2", ZERO, "10.0.0.3") + m, to=BROADCAST),
        "ARP probe": lambda m: frame(ARP, arp(1, a, "0.0.0.0", ZERO, "10.0.0.3") + m, to=BROADCAST),
        "ARP announcement": lambda m: frame(ARP, arp(1, a, "10.0.0.2", ZERO, "10.0.0.2") + m, to=BROADCAST),
        "ARP reply": lambda m: frame(ARP, arp(2, a, "10.0.0.2", b, "10.0.0.3") + m),
        "NDP solicitation": lambda m: frame(IPV6, solicitation("fd00::2", "fd00::3", "fd00::3", m)),
        "NDP advertisement": lambda m: frame(IPV6, advertisement("fd00::2", "fd00::3", "fd00::2", m)),
        "NDP solicitation with its MAC": lambda m: frame(
            IPV6, solicitation("fd00::2", "fd00::3", "fd00::3", m, option(1, mac(a)))
        ),
        "NDP advertisement with its MAC": lambda m: frame(
            IPV6, advertisement("fd00::2", "fd00::3", "fd00::2", m, option(2, mac(a)))
        ),
        "NDP for its link-local address": lambda m: frame(IPV6, advertisement(ours, "fd00::3", ours, m)),
        "NDP announcement": lambda m: frame(IPV6, advertisement("fd00::2", ALL_NODES, "fd00::2", m), to=MULTICAST),
    }
    forged: dict[str, Make] = {
        "MAC of nobody": lambda m: frame(IP, udp("10.0.0.2", "10.0.0.3", m), by=FOREIGN),
        "MAC of the victim": lambda m: frame(IP, udp("10.0.0.2", "10.0.0.3", m), by=b),
        "MAC of the gateway": lambda m: frame(IP, udp("10.0.0.2", "10.0.0.3", m), by=gateway_mac(1)),
        "IPv4 of the gateway": lambda m: frame(IP, udp("10.0.0.1", "10.0.0.3", m)),
        "IPv4 of nobody": lambda m: frame(IP, udp("10.0.0.77", "10.0.0.3", m)),
        "IPv4 of another subnet": lambda m: frame(IP, udp("172.16.0.1", "10.0.0.3", m)),
        "IPv4 0.0.0.0": lambda m: frame(IP, udp("0.0.0.0", "10.0.0.3", m)),
        "TCP, MAC of nobody": lambda m: frame(IP, tcp("10.0.0.2", "10.0.0.3", m), by=FOREIGN),
        "TCP, MAC of the gateway": lambda m: frame(IPV6, tcp("fd00::2", "fd00::3", m), by=gateway_mac(1)),
        "TCP, IPv4 of the gateway": lambda m: frame(IP, tcp("10.0.0.1", "10.0.0.3", m)),
        "TCP, IPv4 of nobody": lambda m: frame(IP, tcp("10.0.0.77", "10.0.0.3", m)),
        "TCP, IPv6 of the gateway": lambda m: frame(IPV6, tcp("fd00::1", "fd00::3", m)),
        "TCP, IPv6 of nobody": lambda m: frame(IPV6, tcp("fd00::77", "fd00::3", m)),
        "TCP with a VLAN tag": lambda m: frame(VLAN, b"\0\1\x08\0" + tcp("10.0.0.2", "10.0.0.3", m)),
        "IPv6 of the gateway": lambda m: frame(IPV6, udp("fd00::1", "fd00::3", m)),
        "IPv6 of nobody": lambda m: frame(IPV6, udp("fd00::77", "fd00::3", m)),
        "IPv6 of another prefix": lambda m: frame(IPV6, udp("fd99::2", "fd00::3", m)),
        "IPv6 link-local of the router": lambda m: frame(IPV6, udp(router, "fd00::3", m)),
        "IPv6 ::": lambda m: frame(IPV6, udp("::", "fd00::3", m)),
        "ARP of another kind of hardware": lambda m: frame(ARP, b"\0\6" + arp(2, a, "10.0.0.2", b, "10.0.0.3")[2:] + m),
        "ARP of another protocol": lambda m: frame(ARP, b"\0\1\x86\xdd" + arp(2, a, "10.0.0.2", b, "10.0.0.3")[4:] + m),
        "ARP: I am the gateway": lambda m: frame(ARP, arp(2, a, "10.0.0.1", b, "10.0.0.3") + m),
        "ARP request as the gateway": lambda m: frame(
            ARP, arp(1, a, "10.0.0.1", BROADCAST, "10.0.0.3") + m, to=BROADCAST
        ),
        "ARP with another MAC inside": lambda m: frame(ARP, arp(2, FOREIGN, "10.0.0.2", b, "10.0.0.3") + m),
        "ARP probe as a reply": lambda m: frame(ARP, arp(2, a, "0.0.0.0", b, "10.0.0.3") + m),
        "ARP with more behind it": lambda m: frame(ARP, arp(2, a, "10.0.0.2", b, "10.0.0.3") + bytes(18) + m),
        "ARP request for another": lambda m: frame(ARP, arp(1, a, "10.0.0.2", ZERO, "10.0.0.9") + m, to=BROADCAST),
        "NDP with another hop limit": lambda m: frame(
            IPV6, _with_hops(64, advertisement("fd00::2", "fd00::3", "fd00::2", m))
        ),
        "NDP with two options": lambda m: frame(
            IPV6, advertisement("fd00::2", "fd00::3", "fd00::2", m, option(2, mac(a)) * 2)
        ),
        "NDP solicitation with another MAC": lambda m: frame(
            IPV6, solicitation("fd00::2", "fd00::3", "fd00::3", m, option(1, mac(FOREIGN)))
        ),
        "NDP advertisement with another MAC": lambda m: frame(
            IPV6, advertisement("fd00::2", "fd00::3", "fd00::2", m, option(2, mac(b)))
        ),
        "NDP with an option of another kind": lambda m: frame(
            IPV6, solicitation("fd00::2", "fd00::3", "fd00::3", m, option(253, mac(a)))
        ),
        "NDP with a nonce": lambda m: frame(
            IPV6, solicitation("fd00::2", "fd00::3", "fd00::3", m, option(14, bytes(6)))
        ),
        "NDP with half an option": lambda m: frame(
            IPV6, solicitation("fd00::2", "fd00::3", "fd00::3", m, option(1, mac(a))[:4])
        ),
        "NDP behind an extension header": lambda m: frame(
            IPV6, icmpv6("fd00::2", "fd00::3", 135, m[:4] + THEIRS, hop_by_hop=True)
        ),
        "NDP solicitation for another": lambda m: frame(
            IPV6, solicitation("fd00::2", ALL_NODES, "fd00::9", m), to=MULTICAST
        ),
        "duplicate address detection": lambda m: frame(IPV6, solicitation("::", ALL_NODES, ours, m), to=MULTICAST),
        "NDP: I am the gateway": lambda m: frame(IPV6, advertisement("fd00::2", "fd00::3", "fd00::1", m)),
        "NDP: I am the router": lambda m: frame(IPV6, advertisement(ours, "fd00::3", router, m)),
        "detection of another's address": lambda m: frame(
            IPV6, solicitation("::", ALL_NODES, "fd00::3", m), to=MULTICAST
        ),
        "router advertisement": lambda m: frame(IPV6, router_advertisement(ours, ALL_NODES, m)),
        "the same behind an extension header": lambda m: frame(
            IPV6, router_advertisement(ours, ALL_NODES, m, hop_by_hop=True)
        ),
        "MLD report": lambda m: frame(
            IPV6, icmpv6(ours, MLD_ROUTERS, 143, bytes(4) + m, hop_by_hop=True), to=MULTICAST
        ),
        "MLD report without an address": lambda m: frame(
            IPV6, icmpv6("::", MLD_ROUTERS, 143, bytes(4) + m), to=MULTICAST
        ),
        "IGMP report": lambda m: frame(IP, igmp("10.0.0.2", m)),
        "router advertisement behind an authentication header": lambda m: frame(
            IPV6, authenticated(ours, ALL_NODES, 58, message6(ours, ALL_NODES, 134, advertised + m))
        ),
        # destination options that reach into the second fragment, where the message is (RFC 7112)
        "first fragment of a header chain": lambda m: frame(
            IPV6, fragment(ours, ALL_NODES, 60, bytes((58, 1, 1, 12)) + bytes(6) + m, offset=0, more=True)
        ),
        "first fragment with half a header": lambda m: frame(
            IPV6, fragment(ours, ALL_NODES, 60, bytes((17, 0, 1, 4)) + bytes(4) + m, offset=0, more=True)
        ),
        "second fragment of a header chain": lambda m: frame(
            IPV6, fragment(ours, ALL_NODES, 60, message6(ours, ALL_NODES, 134, advertised + m), offset=2, more=False)
        ),
        "neighbor advertisement in a fragment": lambda m: frame(
            IPV6, fragment("fd00::2", "fd00::3", 58, whole_advertisement + m, offset=0, more=True)
        ),
        "a protocol that nobody speaks": lambda m: frame(IPV6, ipv6("fd00::2", "fd00::3", 253, m)),
        "redirect": lambda m: frame(IPV6, icmpv6(ours, "fd00::3", 137, bytes(36) + m)),
        "DHCP server": lambda m: frame(IP, udp("10.0.0.2", "10.0.0.3", m, 67, 68)),
        "DHCPv6 server": lambda m: frame(IPV6, udp(ours, "fd00::3", m, 547, 546)),
        "VLAN tag": lambda m: frame(VLAN, b"\0\1\x08\0" + udp("10.0.0.2", "10.0.0.3", m)),
        "unknown protocol": lambda m: frame(0x88B5, m),
    }
    return honest, forged


def _with_hops(number: int, packet: bytes) -> bytes:
    return packet[:7] + bytes((number,)) + packet[8:]


def arrives(cloud: Lab, make: Make, timeout: float) -> bool:
    web, db, *_ = actors(cloud)
    mark = os.urandom(4)
    sniffer = db.sniffer()
    web.send_frame(make(mark))
    seen = sniffer.sees(mark, timeout)
    sniffer.socket.close()
    return seen


@isolated
def test_honest_frames_arrive_and_forged_ones_do_not() -> None:
    with two_tenants() as cloud:
        honest, forged = frames_of(cloud)
        assert [name for name, make in honest.items() if not arrives(cloud, make, SOON)] == []
        assert [name for name, make in forged.items() if arrives(cloud, make, 0.05)] == []
        assert arrives(cloud, honest["IPv4"], SOON)


@isolated
def test_fragments_are_put_together_and_arrive() -> None:
    """Connection tracking does that, before the router's rules judge the packet. One fragment alone goes nowhere."""
    with two_tenants() as cloud:
        web, *_ = actors(cloud)
        assert web.pings("10.0.0.3", size=4000) and web.pings("fd00::3", size=4000)
        assert web.pings("10.0.0.1", size=4000) and web.pings("fd00::1", size=4000)


@isolated
def test_without_our_rules_the_forgeries_would_arrive() -> None:
    """The positive control of the test above: what stops them are the rules, not the frames' making."""
    with two_tenants() as cloud:
        _, forged = frames_of(cloud)
        nft = cloud.fabric._tenant(cloud.tenants["acme"]).nft
        nft.run(f"flush chain bridge {cloud.fabric.naming.prefix} prerouting")
        nft.run(f"chain bridge {cloud.fabric.naming.prefix} prerouting {{ policy accept; }}")
        nft.run(f"flush chain bridge {cloud.fabric.naming.prefix} forward")
        call_in(cloud.inside("acme"), lambda: sysctl.write(dict.fromkeys(sysctl.BRIDGE_FILTERS, "0")))
        stopped = [name for name, make in forged.items() if not arrives(cloud, make, SOON)]
        assert stopped == []


@isolated
def test_no_ipv6_leaves_an_instance_on_a_network_without_it() -> None:
    with two_tenants(subnet6=None) as cloud:
        web, db, a, b = actors(cloud)
        assert web.do(lambda: sysctl.read("ipv6/conf/eth0/disable_ipv6")) == "1"
        sniffer, mark = db.sniffer(), os.urandom(6)
        for source in (link_local(a), "fd00::2", "::"):
            web.send_frame(ethernet(b, a, IPV6, udp(source, ALL_NODES, mark)))
        assert not sniffer.sees(mark, 0.1)
        web.send_frame(ethernet(b, a, IP, udp("10.0.0.2", "10.0.0.3", mark)))
        assert sniffer.sees(mark, SOON)


@isolated
def test_a_bridge_cannot_be_taught_where_a_neighbour_lives() -> None:
    """Frames to the bridge's own group (IEEE 802.1D) pass no prerouting hook, but a bridge would learn from them."""
    with two_tenants() as cloud:
        web, db, _, b = actors(cloud)
        for group in range(16):
            web.send_frame(ethernet(f"01:80:c2:00:00:{group:02x}", b, 0x88CC, bytes(46)))
        gateway = cloud.inside("acme")
        spy, mark = web.sniffer(), os.urandom(6)
        with call_in(gateway, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            victim = db.sniffer()
            sock.sendto(mark, ("10.0.0.3", 9))
            assert victim.sees(mark, SOON)
            assert not spy.sees(mark, 0.1)


@isolated
def test_floods_of_forgeries_reach_nobody_and_neighbours_do_not_notice() -> None:
    with town() as here:
        _, forged = frames_of(here.cloud)
        marks = {name: os.urandom(4) for name in forged}
        spies = [here.cloud.instances["acme", name].sniffer() for name in ("db", "third")]
        spies += [here.cloud.instances["globex", name].sniffer() for name in ("web", "db")]
        frames = [make(marks[name]) for name, make in forged.items()]
        here.contains("forgeries", frames)
        arrived = set().union(*(arrivals(spy, marks) for spy in spies))
        for frame in frames:  # once more, while no other frames fill the sniffers
            here.web.send_frame(frame)
        assert arrived.union(*(arrivals(spy, marks) for spy in spies)) == set()


def arrivals(spy: Sniffer, marks: dict[str, bytes]) -> set[str]:
    """The names of the marks in frames that have come."""
    found = set()
    spy.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            frame = spy.socket.recv(65536)
            found |= {name for name, mark in marks.items() if mark in frame}
    return found
