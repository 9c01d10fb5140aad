"""What senders of an overloaded host are told: floors hold there, nothing is lost that could be used, it recovers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.networks.sender_ceilings import LEAST, OVERLOAD, USABLE, decide, is_overloaded, rates, share
from insula.network.fabric import Arrivals, Arrived

MBIT = 1_000_000
LINK = 1_000 * MBIT
ACME, GLOBEX = 1, 2
tenants = st.integers(1, 4)
demands = st.dictionaries(tenants, st.integers(0, 3 * LINK), max_size=4)
floors = st.dictionaries(tenants, st.integers(0, int(LINK * USABLE) // 4), max_size=4)


@given(demands, floors)
def test_everybody_gets_its_floor_and_the_link_is_used(wanted: dict[int, int], promised: dict[int, int]) -> None:
    usable = int(LINK * USABLE)
    found = share(wanted, usable, promised)
    assert sum(found.values()) <= usable
    for tenant, demand in wanted.items():
        assert found[tenant] <= demand
        assert found[tenant] >= min(demand, promised.get(tenant, 0)) - 1
    assert sum(found.values()) >= min(usable, sum(wanted.values())) - len(wanted) - 1, "nothing stays unused"


def arriving(sent: Mapping[int, int]) -> dict[int, int]:
    """What a link lets through of what is sent, in proportion: a queue of the switch drops the rest."""
    part = min(1.0, LINK / max(sum(sent.values()), 1))
    return {tenant: int(rate * part) for tenant, rate in sent.items()}


@given(demands, floors, st.integers(1, 5))
def test_floods_of_any_number_of_hosts_leave_floors_to_others_in_a_few_periods(
    wanted: dict[int, int], promised: dict[int, int], hosts: int
) -> None:
    """Each host sends as much as it can. A tenant that floods gets its share, and one that needs less all it needs."""
    ceilings: dict[int, int] = {}
    for _ in range(12):
        sent = {t: min(rate, hosts * ceilings[t]) if t in ceilings else rate for t, rate in wanted.items()}
        ceilings = decide(ceilings, arriving(sent), promised, LINK)
    sent = {t: min(rate, hosts * ceilings[t]) if t in ceilings else rate for t, rate in wanted.items()}
    assert sum(sent.values()) <= LINK * USABLE * OVERLOAD * 1.05 + LEAST * hosts * len(wanted)
    for tenant, rate in wanted.items():
        assert sent[tenant] >= min(rate, promised.get(tenant, 0)) * 0.95 - LEAST * hosts


@pytest.mark.parametrize("hosts", [1, 4])
def test_a_flood_is_limited_at_once_and_what_has_a_floor_gets_room(hosts: int) -> None:
    promised = {ACME: 600 * MBIT}
    ceilings = decide({}, {GLOBEX: 950 * MBIT, ACME: 50 * MBIT}, promised, LINK)
    assert set(ceilings) == {GLOBEX}
    assert ceilings[GLOBEX] == 350 * MBIT, "acme has room for its whole floor"
    for _ in range(3):
        arrived = {GLOBEX: min(hosts * ceilings[GLOBEX], 700 * MBIT), ACME: 600 * MBIT}
        ceilings = decide(ceilings, arrived, promised, LINK)
    assert 300 * MBIT <= hosts * ceilings[GLOBEX] <= 360 * MBIT


def test_ceilings_rise_and_go_when_the_overload_is_over() -> None:
    ceilings, steps = {GLOBEX: 20 * MBIT}, 0
    while ceilings:
        ceilings = decide(ceilings, {GLOBEX: min(ceilings[GLOBEX], 100 * MBIT)}, {}, LINK)
        steps += 1
    assert steps == 6
    assert decide({}, {}, {}, LINK) == {}


def test_a_full_link_is_no_overload_and_ceilings_rest_there() -> None:
    arrived = {ACME: 600 * MBIT, GLOBEX: 350 * MBIT}
    assert not is_overloaded(arrived, LINK)
    assert decide({}, arrived, {}, LINK) == {}
    assert decide({GLOBEX: 350 * MBIT}, arrived, {}, LINK) == {GLOBEX: 350 * MBIT}


def test_what_was_dropped_and_what_waits_has_arrived_too() -> None:
    def seen(one: Arrived) -> Arrivals:
        return Arrivals(LINK, {}, {ACME: one})

    before, after = seen(Arrived(1_000, 1, 0, 0)), seen(Arrived(2_001_000, 2_001, 1_000, 125_000))
    assert rates(before, after, 1.0) == {ACME: (2_000_000 + 1_000_000 + 125_000) * 8}
    assert rates(after, before, 1.0) == {ACME: 8_000}, "classes that were made again count from nothing"
    assert rates(Arrivals(LINK, {}, {}), before, 1.0) == {ACME: 8_000}
