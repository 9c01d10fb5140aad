"""Probes and announcements: correct to the last bit, recognised if complete; receivers never fail."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.network import packets
from insula.network.packets import DSCP, PROTOCOLS, Probe, ProbeCodec

PAIRS = [("10.0.0.2", "10.0.0.3"), ("fd00::2", "fd00::3")]
NUMBERS = {("icmp", 4): 1, ("icmp", 6): 58, ("udp", 4): 17, ("udp", 6): 17, ("tcp", 4): 6, ("tcp", 6): 6}


def made(protocol: str, source: str, target: str) -> tuple[ProbeCodec, Probe]:
    mint = ProbeCodec()
    return mint, mint.probe("me", protocol, source, target)


def parts(packet: bytes) -> tuple[int, int, int, str, str, bytes]:
    """(DSCP, hop limit, protocol, source, target, what follows) of an IP packet."""
    if packet[0] >> 4 == 6:
        first, length, number, hops = struct.unpack_from("!IHBB", packet)
        assert length == len(packet) - 40
        sender, receiver = ip_address(packet[8:24]), ip_address(packet[24:40])
        return first >> 22 & 0x3F, hops, number, str(sender), str(receiver), packet[40:]
    assert packet[0] == 0x45 and struct.unpack_from("!H", packet, 2)[0] == len(packet)
    assert packets.checksum(packet[:20]) == 0
    sender, receiver = ip_address(packet[12:16]), ip_address(packet[16:20])
    return packet[1] >> 2, packet[8], packet[9], str(sender), str(receiver), packet[20:]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_probe_is_a_valid_packet_that_goes_nowhere(protocol: str, source: str, target: str) -> None:
    _, probe = made(protocol, source, target)
    dscp, hops, number, sender, receiver, upper = parts(probe.packet)
    assert (dscp, hops, sender, receiver) == (0x3F, 4, source, target)
    assert DSCP == 0x3F
    assert number == NUMBERS[protocol, 6 if ":" in source else 4]
    pseudo = ip_address(source).packed + ip_address(target).packed + struct.pack("!II", len(upper), number)
    assert packets.checksum((b"" if number == 1 else pseudo) + upper) == 0
    if protocol == "icmp":
        assert upper[0] == (128 if ":" in source else 8)
    else:
        assert struct.unpack_from("!HH", upper) == (40000, 9)
    if protocol == "udp":
        assert struct.unpack_from("!H", upper, 4)[0] == len(upper)
    if protocol == "tcp":
        assert upper[13] == 2, "a SYN and nothing else"


@pytest.mark.parametrize(
    ("protocol", "source", "header", "upper"),
    [
        ("icmp", 4, "45fc002300000000 0401a1da", "08003ac600090001"),
        ("icmp", 6, "6fc00000 000f3a04", "8000c87500090001"),
        ("udp", 4, "45fc002300000000 0411a1ca", "9c400009000f9252"),
        ("udp", 6, "6fc00000 000f1104", "9c400009000fac50"),
        ("tcp", 4, "45fc002f00000000 0406a1c9", "9c400009 00000001 00000000 5002faf0 476c0000"),
        ("tcp", 6, "6fc00000 001b0604", "9c400009 00000001 00000000 5002faf0 616a0000"),
    ],
)
def test_every_bit_of_a_probe(protocol: str, source: int, header: str, upper: str) -> None:
    """RFC 791, 8200, 792, 4443, 768 and 9293: no fragment, no option, a header as long as it says."""
    sender, receiver = PAIRS[source == 6]
    ends = ip_address(sender).packed + ip_address(receiver).packed
    made = packets.ip_packet(protocol, sender, receiver, b"payload")
    assert made.hex() == (bytes.fromhex(header) + ends + bytes.fromhex(upper) + b"payload").hex()


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_probe_is_recognised_behind_routers_and_by_its_whole_content_only(
    protocol: str, source: str, target: str
) -> None:
    mint, probe = made(protocol, source, target)
    other = mint.probe("me", protocol, source, target)
    assert mint.find(probe.packet) is probe and mint.find(other.packet) is other
    routed = bytearray(probe.packet)
    routed[7 if ":" in source else 8] -= 1
    assert mint.find(bytes(routed)) is probe and probe.is_same(bytes(routed))
    assert not probe.is_same(other.packet)
    token = probe.packet[-24:]
    for stranger in (
        packets.ip_packet(protocol, target, source, token),
        packets.ip_packet(protocol, source, source, token),
        packets.ip_packet("udp" if protocol == "icmp" else "icmp", source, target, token),
        probe.packet + b"x",
        probe.packet[:-1] + bytes([probe.packet[-1] ^ 1]),
    ):
        assert not probe.is_same(stranger)
    translated = packets.ip_packet(protocol, "198.18.0.1" if ":" not in source else "2001:470::1", target, token)
    assert mint.find(translated) is probe and probe.is_to_same(translated) and not probe.is_same(translated)
    assert not probe.is_to_same(packets.ip_packet(protocol, target, source, token))
    assert ProbeCodec().find(probe.packet) is None, "tokens of another run mean nothing"


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_only_an_echo_reply_from_where_it_was_sent_is_an_answer(source: str, target: str) -> None:
    mint, probe = made("icmp", source, target)
    asked = packets.ip_packet("icmp", target, source, probe.packet[-24:])
    at = 40 if ":" in source else 20
    reply = asked[:at] + bytes([129 if ":" in source else 0]) + asked[at + 1 :]
    assert mint.find(reply) is probe and probe.is_answer(reply)
    assert not probe.is_answer(asked), "a request is no answer"
    assert not probe.is_answer(probe.packet)
    elsewhere = packets.ip_packet("icmp", source, source, probe.packet[-24:])
    assert not probe.is_answer(elsewhere[:at] + reply[at : at + 1] + elsewhere[at + 1 :])


def whatever(mint: ProbeCodec, probe: Probe, data: bytes) -> None:
    mint.find(data)
    packets.is_tcp(data)
    if packets.sender(data) is not None:  # what is asked of a packet only when it has a sender
        probe.is_same(data)
        probe.is_to_same(data)
        probe.is_answer(data)


@given(st.binary(max_size=120), st.sampled_from(PAIRS), st.sampled_from(PROTOCOLS))
def test_no_bytes_at_all_make_a_receiver_fail(data: bytes, pair: tuple[str, str], protocol: str) -> None:
    mint, probe = made(protocol, *pair)
    whatever(mint, probe, data)
    whatever(mint, probe, data + probe.packet[-24:])
    whatever(mint, probe, probe.packet[-24:] + data)


@given(st.sampled_from(PAIRS), st.sampled_from(PROTOCOLS), st.data())
def test_no_probe_that_was_cut_or_changed_makes_a_receiver_fail(
    pair: tuple[str, str], protocol: str, data: st.DataObject
) -> None:
    mint, probe = made(protocol, *pair)
    start = data.draw(st.integers(0, len(probe.packet)))
    whatever(mint, probe, probe.packet[start:])
    whatever(mint, probe, probe.packet[:start])
    changed = bytearray(probe.packet)
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    whatever(mint, probe, bytes(changed))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_tcp_segment_is_told_from_the_rest(source: str, target: str) -> None:
    for protocol in PROTOCOLS:
        packet = packets.ip_packet(protocol, source, target, bytes(16))
        assert packets.is_tcp(packet) == (protocol == "tcp")
        assert packets.sender(packet) == source
        header = 40 if ":" in source else 20
        assert packets.sender(packet[:header]) is None, "a header alone is no packet"
        assert packets.sender(packet[: header + 1]) == source
    assert packets.sender(b"") is None and not packets.is_tcp(b"")
    assert packets.sender(b"\x55" + bytes(60)) is None, "of no known version"
    assert packets.sender(b"\x44" + bytes(60)) is None, "an IPv4 header has five words or more"


def test_a_frame_has_the_type_of_its_packet() -> None:
    for (source, target), kind in zip(PAIRS, ("0800", "86dd"), strict=True):
        packet = packets.ip_packet("udp", source, target, b"x")
        frame = packets.frame("02:10:00:00:00:01", "02:10:00:00:00:02", packet)
        assert frame == bytes.fromhex(f"021000000001021000000002{kind}") + packet
    other = packets.frame("02:10:00:00:00:01", "02:10:00:00:00:02", packet, 0x8100)
    assert other[12:14].hex() == "8100" and other[14:] == packet


@given(st.binary(max_size=60))
def test_the_checksum_is_the_one_of_the_rfc(data: bytes) -> None:
    """RFC 1071, added the slow way: ones' complement, an odd byte padded with zero on the right."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        total = total % 0x10000 + total // 0x10000
    assert packets.checksum(data) == 0xFFFF - total


def test_announcements_are_those_of_the_rfcs() -> None:
    arp = packets.announcement("02:10:00:00:00:07", "10.0.0.7")
    assert arp.hex() == (
        "ffffffffffff" "021000000007" "0806"
        "0001" "0800" "06" "04" "0001" "021000000007" "0a000007" "000000000000" "0a000007"
    )  # fmt: skip
    advertisement = packets.announcement("02:10:00:00:00:07", "fd00::7")
    assert advertisement[:14].hex() == "333300000001" "021000000007" "86dd"  # fmt: skip
    assert advertisement[14:22].hex() == "600000000020" "3a" "ff", "a hop limit of 255, or it is ignored"  # fmt: skip
    assert ip_address(advertisement[22:38]) == ip_address("fd00::7")
    assert ip_address(advertisement[38:54]) == ip_address("ff02::1")
    message = advertisement[54:]
    assert message[:2] == b"\x88\0" and message[4:8].hex() == "20000000", "unsolicited, overriding"
    assert ip_address(message[8:24]) == ip_address("fd00::7") and message[24:].hex() == "0201021000000007"
    assert packets.checksum(advertisement[22:54] + struct.pack("!II", len(message), 58) + message) == 0
