"""Instances that send without end: the others of their network, and other tenants, hear little of it.

What is asserted is what arrives, by number: times of a busy machine say nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable

from insula.network.addresses import gateway_mac
from insula.network.linux import bridge_rules
from tests.support.frames import BROADCAST, advertisement, arp, ethernet, udp
from tests.support.lab import SOON, Instance, World, isolated, two_tenants
from tests.system.hostile.attack import town
from tests.system.test_network_dhcp import discover, udhcpc

ARP, IP, IPV6 = 0x0806, 0x0800, 0x86DD
FRAMES = 20_000
_RECEIVED = 1 << 24  # bytes of a sniffer's buffer, so that nothing is lost there


def received(sniffer: socket.socket, mark: bytes) -> int:
    """How many frames with this mark have come to a packet socket."""
    sniffer.settimeout(0.3)
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            frame, (_, _, kind, *_) = sniffer.recvfrom(65536)
            count += kind != socket.PACKET_OUTGOING and mark in frame
    return count


def flood(sender: Instance, frame: bytes) -> None:
    with sender.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        for _ in range(FRAMES):
            with contextlib.suppress(OSError):  # its own queue is full
                sock.send(frame)


STORMS: dict[str, Callable[[str, str, bytes], bytes]] = {
    "ARP": lambda a, b, mark: ethernet(
        BROADCAST, a, ARP, arp(1, a, "10.0.0.2", "00:00:00:00:00:00", "10.0.0.3") + mark
    ),
    "ARP to one instance": lambda a, b, mark: ethernet(b, a, ARP, arp(2, a, "10.0.0.2", b, "10.0.0.3") + mark),
    "NDP to one instance": lambda a, b, mark: ethernet(
        b, a, IPV6, advertisement("fd00::2", "fd00::3", "fd00::2", mark)
    ),
    "broadcast": lambda a, b, mark: ethernet(BROADCAST, a, IP, udp("10.0.0.2", "10.0.0.255", mark)),
    "multicast": lambda a, b, mark: ethernet("01:00:5e:00:00:fb", a, IP, udp("10.0.0.2", "224.0.0.251", mark)),
    "multicast of IPv6": lambda a, b, mark: ethernet("33:33:00:00:00:fb", a, IPV6, udp("fd00::2", "ff02::fb", mark)),
}


@isolated
def test_a_storm_of_frames_to_everybody_stays_at_the_port() -> None:
    with town() as here:
        sniffer = here.db.sniffer().socket
        sniffer.setsockopt(socket.SOL_SOCKET, 33, _RECEIVED)  # SO_RCVBUFFORCE
        for number, (kind, make) in enumerate(STORMS.items()):
            here.cloud.fabric._tenant(here.cloud.tenants["acme"]).nft.run(
                "flush set bridge lab storms\nflush set bridge lab resolving"
            )
            mark = os.urandom(4)
            frame = make(here.web.port.mac, here.db.port.mac, mark)
            here.web.send_frame(frame)
            assert received(sniffer, mark) == 1, f"{kind}: the control: one arrives"
            flood(here.web, frame)
            assert bridge_rules.GROUP_BURST / 2 < received(sniffer, mark) < FRAMES / 2, kind
            if number == 0:
                here.meet("after it")


@isolated
def test_neighbours_go_on_in_a_storm() -> None:
    with town() as here:
        a, b = here.web.port.mac, here.db.port.mac
        for kind, make in STORMS.items():
            here.contains(kind, [make(a, b, bytes(400))])
        here.contains("DHCP", [discover(here.web)])
        assert udhcpc(here.db), "its neighbour is answered"


@isolated
def test_frames_to_one_instance_are_no_storm() -> None:
    with two_tenants() as cloud:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        sniffer, mark = db.sniffer().socket, os.urandom(8)
        sniffer.setsockopt(socket.SOL_SOCKET, 33, _RECEIVED)
        flood(web, ethernet(db.port.mac, web.port.mac, IP, udp("10.0.0.2", "10.0.0.3", mark)))
        assert received(sniffer, mark) > FRAMES * 0.9


@isolated
def test_a_flood_of_packets_of_an_overlay_stays_in_its_network() -> None:
    """VXLAN from inside, with a frame of another tenant in each packet."""
    World()
    with town() as here:
        theirs = here.cloud.instances["globex", "db"]
        spies = [here.cloud.instances[tenant, "db"].sniffer() for tenant in here.cloud.tenants]
        sender = here.cloud.instances["globex", "web"]
        inner = ethernet(theirs.port.mac, sender.port.mac, IP, udp("10.0.0.2", "10.0.0.3", b"inside"))
        frames = []
        for vni in range(1, 4):
            packet = struct.pack("!II", 0x08000000, vni << 8) + inner
            for target in ("10.0.0.1", "100.64.0.2", "100.64.0.4", World.ADDRESS):
                forged = udp("10.0.0.2", target, packet, 4789, 4789)
                frames.append(ethernet(gateway_mac(1), here.web.port.mac, IP, forged))
        here.contains("VXLAN", frames)
        assert not any(spy.sees(b"inside") for spy in spies)
        sender.send_frame(inner)
        assert spies[1].sees(b"inside", SOON), "the control"
