"""The reference model: what it computes for many ports and services at once is what it computes for each alone."""

from __future__ import annotations

from hypothesis import given, settings

from insula.network.intent import TenantIntent
from insula.network.interpreter.alike import representatives
from insula.network.interpreter.program import Program
from insula.network.interpreter.space import Boundaries, Space
from insula.network.reference.expectation import Expectation
from insula.network.reference.model import ReferenceModel
from tests.support.policies import intents


def models(intent: TenantIntent) -> list[tuple[ReferenceModel, Boundaries]]:
    running = {port.index for port in intent.ports}
    made = [(ReferenceModel(intent, version, (), running), Boundaries(version)) for version in (4, 6)]
    for model, boundaries in made:
        model.cut(boundaries)
    return made


def cells(found: Expectation, space: Space, source: int, service: int) -> list[tuple[str, object, int]]:
    """Where packets of one source and one service come, and have to come: destinations as bits."""
    picked = []
    for name, ends in (("permitted", found.permitted), ("required", found.required)):
        for place, bits in ends.items():
            row = space.row(bits, source)
            there = [row >> space.cell(0, target) + service & 1 for target in range(len(space.targets))]
            if any(there):
                picked.append((name, place, int("".join(map(str, there)), 2)))
    return sorted(picked, key=str)


@settings(max_examples=15)
@given(intents())
def test_ports_that_share_a_row_have_their_own(intent: TenantIntent) -> None:
    for model, boundaries in models(intent):
        targets, services, senders = boundaries.addresses.atoms(), boundaries.services(), model.senders()
        services = services[:: max(1, len(services) // 12)]
        space = Space(len(senders), targets, services)
        together = model.of_ports(space, senders)
        for number, sender in enumerate(senders):
            one = Space(1, targets, services)
            alone = model.of_ports(one, [sender])
            for service in range(len(services)):
                assert cells(together, space, number, service) == cells(alone, one, 0, service)


@settings(max_examples=15)
@given(intents())
def test_services_that_the_model_does_not_tell_apart_fare_alike(intent: TenantIntent) -> None:
    for model, boundaries in models(intent):
        targets, services, senders = boundaries.addresses.atoms(), boundaries.services(), model.senders()[:2]
        space = Space(len(senders), targets, services)
        found = model.of_ports(space, senders)
        numbers = {each: number for number, each in enumerate(services)}
        for one in representatives(Program(), boundaries):
            mine = [cells(found, space, n, numbers[one._replace(alike=())]) for n in range(len(senders))]
            for other in one.alike[:3]:
                assert [cells(found, space, n, numbers[other]) for n in range(len(senders))] == mine, (one[:4], other)
