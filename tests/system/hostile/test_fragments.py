"""Fragments that never become whole, and IPv6 extension headers: neighbours' own fragments arrive all the same."""

from __future__ import annotations

import socket
import struct

from insula.kernel.netns import call_in
from insula.network.addresses import gateway_mac
from insula.network.linux import sysctl
from tests.support.frames import ethernet, fragment, ipv4, ipv6, udp
from tests.support.lab import isolated
from tests.system.hostile.attack import Town, town

IP, IPV6 = 0x0800, 0x86DD
MANY = 20_000
BIG = 4000  # bytes, more than two fragments


def pieces4(count: int) -> list[bytes]:
    """First fragments, each of another packet, from web to db."""
    found = []
    for number in range(count):
        packet = bytearray(ipv4("10.0.0.2", "10.0.0.3", 17, bytes(1400), more=True))
        packet[4:6] = struct.pack("!H", number & 0xFFFF)
        packet[10:12] = bytes(2)
        total = sum(struct.unpack("!10H", packet[:20]))
        total = (total & 0xFFFF) + (total >> 16)
        packet[10:12] = struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
        found.append(bytes(packet))
    return found


def pieces6(count: int) -> list[bytes]:
    found = []
    for number in range(count):
        packet = bytearray(fragment("fd00::2", "fd00::3", 17, bytes(1400), offset=0, more=True))
        packet[44:48] = struct.pack("!I", number)
        found.append(bytes(packet))
    return found


def headers() -> dict[str, bytes]:
    """IPv6 packets with extension headers (RFC 8200), some of which the port drops."""
    datagram = udp("fd00::2", "fd00::3", b"x")[40:]
    padding = bytes((17, 0, 1, 4, 0, 0, 0, 0))
    many = b"".join(bytes((60, 0, 1, 4, 0, 0, 0, 0)) for _ in range(60)) + padding
    return {
        "hop-by-hop options": ipv6("fd00::2", "fd00::3", 0, padding + datagram),
        "a router alert": ipv6("fd00::2", "fd00::3", 0, bytes((17, 0, 5, 2, 0, 0, 1, 0)) + datagram),
        "a jumbogram": ipv6("fd00::2", "fd00::3", 0, bytes((17, 0, 0xC2, 4, 0, 1, 0, 0)) + datagram),
        "many options": ipv6("fd00::2", "fd00::3", 60, many + datagram),
        "options that are too long": ipv6("fd00::2", "fd00::3", 60, bytes((17, 255, 1, 4)) + bytes(4) + datagram),
        "a routing header": ipv6("fd00::2", "fd00::3", 43, bytes((17, 2, 0, 1)) + bytes(20) + datagram),
        "an atomic fragment": fragment("fd00::2", "fd00::3", 17, datagram, offset=0, more=False),
        "a header of nobody": ipv6("fd00::2", "fd00::3", 140, padding + datagram),
        "mobility": ipv6("fd00::2", "fd00::3", 135, padding + datagram),
        "no next header": ipv6("fd00::2", "fd00::3", 59, datagram),
    }


def send(here: Town, packets: list[bytes], *, to: str | None = None) -> list[bytes]:
    kind = IPV6 if packets[0][0] >> 4 == 6 else IP
    return [ethernet(to or here.db.port.mac, here.web.port.mac, kind, packet) for packet in packets]


@isolated
def test_fragments_that_never_become_whole_keep_no_others_from_it() -> None:
    with town() as here:
        third, globex = here.cloud.instances["acme", "third"], here.cloud.instances["globex", "web"]
        for what, packets in (("IPv4", pieces4(MANY)), ("IPv6", pieces6(MANY))):
            for to in (None, gateway_mac(1)):
                here.contains(f"fragments of {what}", send(here, packets, to=to))
                for client in (third, globex):
                    for address in ("10.0.0.3", "fd00::3"):
                        assert client.pings(address, size=BIG), f"{what}: {client.port.tenant} {address}"


@isolated
def test_without_the_limits_the_fragments_of_others_are_lost() -> None:
    """The control of the test above."""
    usual = {"ipv4/ipfrag_high_thresh": str(4 << 20), "ipv4/ipfrag_time": "30"}
    with town() as here:
        here.cloud.fabric._tenant(here.cloud.tenants["acme"]).nft.run("flush chain bridge lab pieces")
        call_in(here.cloud.inside("acme"), lambda: sysctl.write(usual))
        third, frames = here.cloud.instances["acme", "third"], send(here, pieces4(MANY))
        assert third.pings("10.0.0.3", size=BIG)
        with here.web.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            for frame in frames:
                sock.send(frame)
        assert not third.pings("10.0.0.3", 0.5, size=BIG) and third.pings("10.0.0.3")


@isolated
def test_extension_headers_disturb_nobody() -> None:
    with town() as here:
        here.contains("extension headers", send(here, list(headers().values())))
