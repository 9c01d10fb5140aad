"""The loop that limits senders: floors hold at the receiver, nothing is lost that could be used, and it recovers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insula.network.linux.guarantees.control import LEAST, USABLE, OverlayFlow, ReceivingHost, decide, share

LINK = 1_000_000_000
MBIT = 1_000_000
tenants = st.sampled_from(["acme", "globex", "initech", "hooli"])
demands = st.dictionaries(tenants, st.integers(0, 3 * LINK), max_size=4)
floors = st.dictionaries(tenants, st.integers(0, int(LINK * USABLE) // 4), max_size=4)


@given(demands, floors)
def test_everybody_gets_its_floor_and_the_link_is_used(wanted: dict[str, int], promised: dict[str, int]) -> None:
    usable = int(LINK * USABLE)
    found = share(wanted, usable, promised)
    assert sum(found.values()) <= usable
    for tenant, demand in wanted.items():
        assert found[tenant] <= demand
        assert found[tenant] >= min(demand, promised.get(tenant, 0)) - 1
    assert sum(found.values()) >= min(usable, sum(wanted.values())) - len(wanted) - 1, "nothing stays unused"


@given(demands, floors, st.integers(1, 3))
def test_ceilings_make_what_arrives_fit(wanted: dict[str, int], promised: dict[str, int], senders: int) -> None:
    offered = {OverlayFlow(t, f"s{n}", "r"): rate // senders for t, rate in wanted.items() for n in range(senders)}
    caps = decide({}, offered, {"r": ReceivingHost(LINK, promised)})
    arrives = sum(min(rate, caps.get(flow, rate)) for flow, rate in offered.items())
    assert arrives <= LINK * USABLE + LEAST * len(offered)
    for tenant, rate in wanted.items():
        mine = sum(min(each, caps.get(flow, each)) for flow, each in offered.items() if flow.tenant == tenant)
        assert mine >= min(rate, promised.get(tenant, 0)) - 2 * senders


def test_a_flood_is_capped_and_what_needs_little_is_not() -> None:
    flood, web = OverlayFlow("globex", "c", "b"), OverlayFlow("acme", "a", "b")
    receivers = {"b": ReceivingHost(500 * MBIT, {"acme": 300 * MBIT})}
    caps = decide({}, {flood: 1_000 * MBIT, web: 250 * MBIT}, receivers)
    assert set(caps) == {flood}
    assert 170 * MBIT <= caps[flood] <= 175 * MBIT, "acme has room up to its floor"
    caps = decide(caps, {flood: caps[flood], web: 450 * MBIT}, receivers)
    assert set(caps) == {flood}, "what has a floor takes most of the rest"
    assert caps[flood] + 450 * MBIT <= 475 * MBIT


def test_ceilings_double_and_go_when_the_overload_is_over() -> None:
    flow = OverlayFlow("globex", "c", "b")
    receivers = {"b": ReceivingHost(500 * MBIT, {})}
    caps, steps = {flow: 20 * MBIT}, 0
    while caps:
        caps = decide(caps, {flow: min(caps[flow], 100 * MBIT)}, receivers)
        steps += 1
    assert steps == 5
    assert decide({}, {}, receivers) == {}


def test_receivers_are_apart() -> None:
    one, other = OverlayFlow("acme", "a", "b"), OverlayFlow("acme", "a", "c")
    caps = decide({}, {one: 2 * LINK, other: LINK // 2}, {"b": ReceivingHost(LINK, {}), "c": ReceivingHost(LINK, {})})
    assert set(caps) == {one}
