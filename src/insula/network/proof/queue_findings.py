"""Differences of queues: packets that pass the class of another tenant, or one with other rates than they should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from insula.network.endpoints import port_name
from insula.network.intent import TenantIntent
from insula.network.interpreter.queues import InstalledQueues, PassedClass
from insula.network.interpreter.space import UDP
from insula.network.proof.findings import ProofFinding, Witness
from insula.network.reference.queues import DIRECTIONS, WantedRates, floors, rates

_OUTSIDE: Final = "192.0.2.1"  # RFC 5737
_BYTE: Final = 8  # rates are rounded to bytes a second


def findings(intents: Sequence[TenantIntent], found: InstalledQueues) -> Iterator[ProofFinding]:
    """Yield the differences of all tenants of this host."""
    for intent in intents:
        for direction in DIRECTIONS:
            yield from _of_tenant(intent, intents, direction, found)


def _of_tenant(
    intent: TenantIntent, intents: Sequence[TenantIntent], direction: str, found: InstalledQueues
) -> Iterator[ProofFinding]:
    name, wanted = intent.tenant.name, rates(intent, direction)
    have = found.tenants.get((name, direction))
    others = {
        passed: each.tenant.name
        for each in intents
        if each.tenant.name != name and (passed := found.tenants.get((each.tenant.name, direction))) and passed.number
    }
    if wanted is None:
        if have is not None and have.number:
            yield _finding(intent, direction, f"pass {have.name}, and have no guarantee")
        return
    if (name, direction) in found.unread:
        return
    if have is None or not have.number:
        yield _finding(intent, direction, "pass no class: they have neither floor nor ceiling")
        return
    if have in others:
        yield _finding(intent, direction, f"pass {have.name}, as those of {others[have]} do")
    for what in _wrong(have, wanted):
        yield _finding(intent, direction, f"pass {have.name}, {what}")
    yield from _instances(intent, direction, found, have)
    overlay = bool(found.networks)
    for network in intent.networks if overlay else ():
        passing: Sequence[PassedClass | None] = found.networks.get((network.vni, direction)) or [None]
        for where in [each.name if each else "no class" for each in passing if _is_other(each, have)]:
            yield _finding(intent, direction, f"of network {network.name} between hosts pass {where}, not {have.name}")


def _is_other(passed: PassedClass | None, have: PassedClass) -> bool:
    return passed is None or (passed.device, passed.number) != (have.device, have.number)


def _instances(
    intent: TenantIntent, direction: str, found: InstalledQueues, have: PassedClass
) -> Iterator[ProofFinding]:
    """Yield the differences of instances that have a floor."""
    names = {each.number: index for index, each in (intent.shaping.ports.items() if intent.shaping else ())}
    ports = {port.index: port_name(port) for port in intent.ports}
    rest = found.rests.get((intent.tenant.name, direction))
    others: dict[tuple[str, int], int | None] = {(rest.device, rest.number): None} if rest else {}
    for number, wanted in floors(intent, direction).items():
        whose = f"of {ports.get(names[number], f'guarantee {number}')}"
        for top, leaf in dict.fromkeys(found.instances.get((intent.tenant.name, number, direction), ())):
            if _is_other(top, have):
                yield _finding(intent, direction, f"{whose} pass {top.name}, not {have.name}")
            elif leaf == top or not leaf.number:
                yield _finding(intent, direction, f"{whose} pass no class of their own")
            elif others.setdefault((leaf.device, leaf.number), number) != number:
                yield _finding(intent, direction, f"{whose} pass {leaf.name}, as those of another instance do")
            for what in _wrong(leaf, wanted) if not _is_other(top, have) else ():
                yield _finding(intent, direction, f"{whose} pass {leaf.name}, {what}")


def _wrong(have: PassedClass, wanted: WantedRates) -> Iterator[str]:
    if wanted.floor is not None and have.floor + _BYTE <= wanted.floor:
        yield f"whose floor is {have.floor} bit/s and should be {wanted.floor}"
    if wanted.ceiling is not None and abs(have.ceiling - wanted.ceiling) >= _BYTE:
        yield f"whose ceiling is {have.ceiling} bit/s and should be {wanted.ceiling}"


def _finding(intent: TenantIntent, direction: str, says: str) -> ProofFinding:
    """Return a finding with a packet of the tenant as its witness."""
    tenant = intent.tenant.name
    port = next(iter(intent.ports), None)
    own = port.address if port else ""
    packet = Witness(4, own, _OUTSIDE, UDP, 40000, 9) if direction == "out" and port else None
    text = f"{tenant}: packets {'to' if direction == 'out' else 'from'} the outside {says}"
    return ProofFinding(tenant, "misqueued", tenant, "outside", 1, packet, text)
