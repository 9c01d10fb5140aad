"""Differences of the link layer: frames that go to another host, network or instance than they should."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final, Literal

from insula.network.endpoints import port_name
from insula.network.intent import TenantIntent
from insula.network.interpreter.delivery import NetworkPlace
from insula.network.interpreter.links import UNKNOWN_MAC, LinkLayer, TunnelEnd
from insula.network.interpreter.space import UDP
from insula.network.proof.findings import FindingKind, ProofFinding, Witness, label
from insula.network.reference.links import links, owner, remotes

_NO_ONE = "02:00:00:00:00:00"
"""A MAC address that nobody has."""
_BROADCAST = "ff:ff:ff:ff:ff:ff"
_FLAGS: Final[Mapping[str, tuple[tuple[FindingKind, str], tuple[FindingKind, str]]]] = {
    "hairpin": (
        ("overheard", "sends frames back to where they came from"),
        ("blocked", "does not send back what its instance sends to itself through the router"),
    ),
    "learning": (
        ("overheard", "learns addresses: frames for others may come there"),
        ("blocked", "does not learn the MAC addresses that its instance may take over"),
    ),
    "broadcast": (
        ("overheard", "gets broadcasts that should stay on this host"),
        ("blocked", "gets no broadcasts of its network"),
    ),
    "multicast": (
        ("overheard", "gets multicasts that should stay on this host"),
        ("blocked", "gets no multicasts of its network"),
    ),
    "isolated": (
        ("blocked", "is isolated: no frames go between it and other isolated ports"),
        ("leak", "is not isolated"),
    ),
    "suppress": (
        ("blocked", "gets no requests for addresses: the bridge keeps them (neigh_suppress)"),
        ("blocked", "has nobody who answers requests for addresses behind it (neigh_suppress)"),
    ),
}
"""What it means if a flag of a device is set, and if it is not, and should be otherwise."""


def findings(intent: TenantIntent, found: LinkLayer, running: Collection[int]) -> Iterator[ProofFinding]:
    """Yield the differences of the links from what the tenant wants; `running` are the indices of plugged ports."""
    wanted = links(intent, running)
    yield from _tunnels(intent, found, wanted)
    yield from _neighbours(intent, found, wanted)
    yield from _ports(intent, found, wanted)


def _tunnels(intent: TenantIntent, found: LinkLayer, wanted: LinkLayer) -> Iterator[ProofFinding]:
    for network, mac in dict.fromkeys([*found.tunnels, *wanted.tunnels]):
        have, right = (each.tunnels.get((network, mac), frozenset()) for each in (found, wanted))
        what = f"{_what(network)} for {_name(intent, network, mac)}"
        for end in sorted(have - right):
            why = "of another network" if end.vni not in {each.vni for each in right} and right else "and should not"
            text = f"{intent.tenant.name}: frames of {what} go to {_end(end)}, {why}"
            yield _finding(intent, network, mac, "leak", f"host {end.host}", text)
        for end in sorted(right - have):
            text = f"{intent.tenant.name}: frames of {what} should go to {_end(end)}, and don't"
            yield _finding(intent, network, mac, "blocked", f"host {end.host}", text)


def _neighbours(intent: TenantIntent, found: LinkLayer, wanted: LinkLayer) -> Iterator[ProofFinding]:
    for (network, address), mac in wanted.neighbours.items():
        have = found.neighbours.get((network, address))
        if have == mac:
            continue
        tenant, name = intent.tenant.name, _name(intent, network, mac)
        if have is None:
            text = f"{tenant}: nobody answers in {_what(network)} for {address} of {name}"
            yield _finding(intent, network, mac, "blocked", f"{tenant}/{name}", text, address)
        else:
            to = _name(intent, network, have)
            text = f"{tenant}: packets to {address} of {name} go to the MAC address of {to}"
            yield _finding(intent, network, mac, "leak", f"{tenant}/{to}", text, address)


def _ports(intent: TenantIntent, found: LinkLayer, wanted: LinkLayer) -> Iterator[ProofFinding]:
    for place, have in found.ports.items():
        right = wanted.ports.get(place)
        if right is None or have.network != right.network:
            yield _on_a_bridge(intent, place, have.network)
            continue
        for flag, (too_much, too_little) in _FLAGS.items():
            if (is_set := getattr(have, flag)) != getattr(right, flag):
                kind, says = too_much if is_set else too_little
                yield _about(intent, place, have.network, kind, says)


def _on_a_bridge(intent: TenantIntent, place: NetworkPlace, network: str) -> ProofFinding:
    return _about(intent, place, network, "overheard", f"is on the bridge of network {network}, and should not be")


def _about(intent: TenantIntent, place: NetworkPlace, network: str, kind: FindingKind, says: str) -> ProofFinding:
    """Return a finding about a device on a bridge; a broadcast of another instance there is its witness."""
    tenant, name = intent.tenant.name, label(intent.tenant.name, place)
    names = [port_name(port) for port in intent.ports if port.network == network]
    others = [each for each in names if place != NetworkPlace("port", each)]
    source = f"{tenant}/{others[0]}" if others else tenant
    packet = Witness(0, "", _BROADCAST, 0) if others else None
    return ProofFinding(tenant, kind, source, name, 1, packet, f"{tenant}: {name} {says}")


def _finding(
    intent: TenantIntent,
    network: str,
    mac: str,
    kind: Literal["leak", "blocked"],
    target: str,
    text: str,
    address: str | None = None,
) -> ProofFinding:
    """Return a finding with a packet of an instance of the network, if there is one, as its witness."""
    tenant, sender = intent.tenant.name, next((port for port in intent.ports if port.network == network), None)
    if sender is None:
        return ProofFinding(tenant, kind, tenant, target, 1, None, text)
    source = f"{tenant}/{sender.instance}"
    if address is None and (of := next((r for r in remotes(intent) if (r.network, r.mac) == (network, mac)), None)):
        address = next(iter(of.addresses), None)
    if address is None:  # a frame for nobody
        return ProofFinding(tenant, "overheard", source, target, 1, Witness(0, "", _no_one(mac), 0), text)
    own = sender.address6 or "" if ":" in address else sender.address
    packet = Witness(6 if ":" in address else 4, own, address, UDP, 40000, 9)
    return ProofFinding(tenant, kind, source, target, 1, packet, f"{text}: {packet.text}")


def _what(network: str) -> str:
    """Return what a name is of: a network, or a peering or device, which say so."""
    return network if " " in network else f"network {network}"


def _no_one(mac: str) -> str:
    return _NO_ONE if mac == UNKNOWN_MAC else mac


def _name(intent: TenantIntent, network: str, mac: str) -> str:
    if mac == UNKNOWN_MAC:
        return "addresses without an entry"
    port = owner(intent, network, mac)
    return port.instance if port else f"{mac}, which nobody has"


def _end(end: TunnelEnd) -> str:
    return f"host {end.host} with VNI {end.vni}"
