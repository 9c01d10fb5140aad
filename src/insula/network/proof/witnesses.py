"""Send the witnesses of findings: each is one packet, of which is told where it was seen last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import Final

from insula.network.addresses import OUTSIDE, OUTSIDE6
from insula.network.fabric import ProbePoints, RouterPoints, Station
from insula.network.interpreter.space import ICMP, ICMPV6, TCP, UDP
from insula.network.live import LivePacket, LiveTest, in_words
from insula.network.proof.findings import ProofFinding, Witness

_MOST: Final = 16
"""Witnesses that are sent: each takes a part of a second."""
_NAMES: Final = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmp"}


def send(findings: Sequence[ProofFinding], points: Sequence[ProbePoints]) -> dict[int, str]:
    """Send the witnesses of the first findings. Return in words where each was seen, by the finding's place.

    Unavailable if this kernel can't inject packets.
    """
    found: dict[int, str] = {}
    wanted = list(_sendable(findings, points))[:_MOST]
    if wanted:
        with LiveTest(points) as test:
            for number, start, packet, macs in wanted:
                if isinstance(start, Station):
                    seen = test.from_port(start, packet, macs)
                else:
                    seen = test.from_uplink(start, packet)
                found[number] = in_words(seen)
    return found


def _sendable(
    findings: Sequence[ProofFinding], points: Sequence[ProbePoints]
) -> Iterator[tuple[int, Station | RouterPoints, LivePacket, list[str]]]:
    stations = {station.key: station for one in points for station in one.stations}
    routers = {one.router.tenant: one.router for one in points}
    for number, finding in enumerate(findings):
        if finding.witness is None:
            continue
        start = _start(finding, stations, routers)
        if start is not None and (packet := _packet(finding.witness, start)) is not None:
            yield number, start, packet, _macs(finding, start, stations)


def _start(
    finding: ProofFinding, stations: Mapping[str, Station], routers: Mapping[str, RouterPoints]
) -> Station | RouterPoints | None:
    """Return where the packet of a finding begins: at its source; for a tenant as a whole at any of its instances."""
    if finding.source in stations:
        return stations[finding.source]
    if finding.source in routers:
        return next((one for key, one in stations.items() if key.startswith(f"{finding.source}/")), None)
    if finding.source in ("outside", "host"):
        return routers.get(finding.target.partition("/")[0])
    return None


def _packet(witness: Witness, start: Station | RouterPoints) -> LivePacket | None:
    """Return the packet, with addresses in place of those that don't matter; None if it can't be made."""
    six = witness.version == 6
    name = _NAMES.get(witness.protocol, "udp" if witness.protocol == 0 else None)
    source, target = witness.source, witness.target
    if isinstance(start, Station):
        same = [each.address for each in start.endpoints if (each.version == 6) == six]
        gateways = [each for each in start.gateways if (":" in each) == six]
        if witness.version == 0 or not target:  # about the link alone
            target = gateways[0] if gateways else ""
        source = source if source in same or witness.target == "" else next(iter(same), "")
    source = source or (OUTSIDE6 if six else OUTSIDE)
    if name is None or not target:
        return None
    return LivePacket(source, target, name, witness.source_port or 40000, witness.port or 9)


def _macs(finding: ProofFinding, start: Station | RouterPoints, stations: Mapping[str, Station]) -> list[str]:
    """Return the MAC addresses that the packet is sent to: those of the target and of the router."""
    if not isinstance(start, Station) or finding.witness is None:
        return []
    if finding.kind == "overheard":
        return [finding.witness.target]
    if (everybody := _group_mac(finding.witness.target, start)) is not None:
        return [everybody]
    target = stations.get(finding.target)
    near = target is not None and target.endpoints[0].network == start.endpoints[0].network
    return [target.mac] if target and near else []


def _group_mac(target: str, start: Station) -> str | None:
    """Return the MAC address of a broadcast or multicast address (RFC 1112, RFC 2464); None if it is no such one."""
    if not target:
        return None
    one = ip_address(target)
    broadcasts = ("255.255.255.255", *(str(ip_network(subnet)[-1]) for subnet in start.subnets if ":" not in subnet))
    if target in broadcasts:
        return "ff:ff:ff:ff:ff:ff"
    if not one.is_multicast:
        return None
    head, last = (bytes.fromhex("01005e"), one.packed[-3:]) if one.version == 4 else (b"33", one.packed[-4:])
    last = bytes([last[0] & 0x7F, *last[1:]]) if one.version == 4 else last
    return (head + last).hex(":")
