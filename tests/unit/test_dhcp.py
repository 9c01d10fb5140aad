"""Answers to DHCP, DHCPv6 and router solicitations: hostile messages, sizes, and what clients may ask."""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from insula.network.dhcp import advertisement, frames, v4, v6
from insula.network.dhcp.lease import PortLease
from insula.network.packets import checksum

LEASE = PortLease(
    mac="02:10:00:00:00:02",
    gateway_mac="02:01:00:00:00:01",
    name="web",
    domain="acme.internal",
    mtu=1500,
    subnet="10.0.0.0/24",
    gateway="10.0.0.1",
    address="10.0.0.2",
    subnet6="fd00::/64",
    gateway6="fd00::1",
    address6="fd00::2",
    routes=(),
    first=True,
)
COOKIE = bytes([99, 130, 83, 99])
OFFER, ACK, NAK = 2, 5, 6


def message(*options: tuple[int, bytes], own: str = "0.0.0.0", flags: int = 0, relay: str = "0.0.0.0") -> bytes:
    head = struct.pack("!BBBBIHH4s4s4s4s16s192s4s", 1, 1, 6, 0, 7, 0, flags, socket.inet_aton(own), b"", b"",
                       socket.inet_aton(relay), bytes.fromhex(LEASE.mac.replace(":", "")), b"", COOKIE)  # fmt: skip
    return head + b"".join(bytes([code, len(value)]) + value for code, value in options) + b"\xff"


def find(mac: str, lease: PortLease = LEASE) -> PortLease | None:
    return lease if mac == lease.mac else None


def told(data: bytes, lease: PortLease = LEASE) -> tuple[dict[int, bytes], str, bytes]:
    """Options, target and `yiaddr` of the answer."""
    found = v4.answer(data, lambda mac: find(mac, lease))
    assert found
    payload = found[1].payload
    options: dict[int, bytes] = {}
    at = 240
    while payload[at] != 255:
        options[payload[at]] = options.get(payload[at], b"") + payload[at + 2 : at + 2 + payload[at + 1]]
        at += 2 + payload[at + 1]
    return options, found[1].target, payload[16:20]


def kind(data: bytes) -> int:
    return told(data)[0][53][0]


def test_each_kind_of_message_has_its_answer() -> None:
    mine, other = (socket.inet_aton(each) for each in ("10.0.0.2", "10.0.0.9"))
    us = (54, socket.inet_aton("10.0.0.1"))
    assert kind(message((53, b"\1"))) == OFFER
    assert kind(message((53, b"\1"), (80, b""))) == ACK, "rapid commit, RFC 4039"
    assert kind(message((53, b"\3"), us, (50, mine))) == ACK
    assert kind(message((53, b"\3"), us, (50, other))) == NAK
    assert kind(message((53, b"\3"), (50, other))) == NAK, "after a reboot in another network"
    assert kind(message((53, b"\3"), own="10.0.0.2")) == ACK, "renewal"
    assert kind(message((53, b"\3"), own="10.0.0.9")) == NAK
    options, target, yours = told(message((53, b"\x08"), own="10.0.0.2"))
    assert options[53] == bytes([ACK]) and 51 not in options and yours == bytes(4) and target == "10.0.0.2"
    for silent in (message((53, b"\4")), message((53, b"\7")), message((53, b"\3"), (54, other)), message(),
                   message((53, b"\1"), relay="10.0.0.9"), message((53, b"\1"))[:200]):  # fmt: skip
        assert v4.answer(silent, find) is None


def test_answers_go_where_the_client_can_take_them() -> None:
    assert told(message((53, b"\1")))[1] == "10.0.0.2"
    assert told(message((53, b"\1"), flags=0x8000))[1] == v4.EVERYBODY
    assert told(message((53, b"\3"), own="10.0.0.9"))[1] == v4.EVERYBODY, "a refusal"


def test_only_what_fits_and_is_wanted_is_told() -> None:
    assert set(told(message((53, b"\1"), (55, b"\1\3")))[0]) == {53, 54, 51, 58, 59, 1, 3, 6}
    many = dataclasses.replace(LEASE, routes=tuple(f"172.{number}.0.0/16" for number in range(16, 90)))
    small, large = message((53, b"\1")), message((53, b"\1"), (57, b"\x05\xdc"))
    answers = [v4.answer(each, lambda mac: find(mac, many)) for each in (small, large)]
    sizes = [len(found[1].payload) + 28 for found in answers if found]
    assert sizes[0] <= 576 < sizes[1] <= 1500
    assert 121 not in told(small, many)[0], "routes that don't fit are left out, and the router's address is there"
    assert len(told(large, many)[0][121]) == 5 + 74 * 7


def test_a_further_port_has_no_default_route() -> None:
    other = dataclasses.replace(LEASE, first=False, routes=("10.7.0.0/16", "fd20::/32"))
    options = told(message((53, b"\1")), other)[0]
    assert 3 not in options and options[121] == bytes([16, 10, 7, 10, 0, 0, 1])


def ask6(number: int, *options: tuple[int, bytes], lease: PortLease = LEASE) -> bytes | None:
    body = b"".join(struct.pack("!HH", code, len(value)) + value for code, value in options)
    return v6.answer(bytes([number]) + b"abc" + body, lease)


def test_dhcpv6_follows_the_rules_about_servers_identifiers() -> None:
    client, us, other = (1, b"id"), (2, b"\0\3\0\1\2\1\0\0\0\1"), (2, b"another")
    association = (3, bytes(12))
    assert ask6(1, client, association) and ask6(3, client, us, association) and ask6(5, client, us, association)
    for silent in (ask6(1, association), ask6(1, client, us), ask6(3, client), ask6(3, client, other), ask6(2, client),
                   ask6(11, other), ask6(6, client, us)):  # fmt: skip
        assert silent is None
    assert ask6(1, client, lease=dataclasses.replace(LEASE, address6=None)) is None
    prefixes = ask6(1, client, (25, bytes(12)))
    assert prefixes and struct.pack("!HHH", 13, 2, 6) in prefixes, "no prefix is available"
    there, elsewhere = (
        (3, bytes(12) + struct.pack("!HH", 5, 24) + socket.inet_pton(socket.AF_INET6, address) + bytes(8))
        for address in ("fd00::9", "fd99::9")
    )
    assert struct.pack("!HHH", 13, 2, 0) in (ask6(4, client, there) or b"")
    assert struct.pack("!HHH", 13, 2, 4) in (ask6(4, client, elsewhere) or b""), "not on this link"


@given(st.binary(max_size=600))
def test_no_message_is_too_strange(data: bytes) -> None:
    always: Callable[[str], PortLease] = lambda _: LEASE  # noqa: E731
    v4.answer(data, always)
    v4.answer(message()[:-1] + data, always)
    v6.answer(data, LEASE)
    for number in range(14):
        v6.answer(bytes([number]) + data, LEASE)
    advertisement.is_solicitation(data)


@given(st.binary(max_size=64))
def test_frames_have_right_checksums(payload: bytes) -> None:
    macs = ("02:01:00:00:00:01", "02:10:00:00:00:02")
    packet = frames.udp(macs, ("10.0.0.1", "10.0.0.2"), (67, 68), payload)[14:]
    assert checksum(packet[:20]) == 0
    assert checksum(packet[12:20] + struct.pack("!HH", 17, len(packet) - 20) + packet[20:]) == 0
    six = frames.icmpv6(macs, ("fe80::1", "ff02::1"), b"\x86\0\0\0" + payload)[14:]
    assert checksum(six[8:40] + struct.pack("!II", len(six) - 40, 58) + six[40:]) == 0
