"""What is promised is never more than what there is, in any order of requests; refusals tell what is left."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.networks.admission import MOST_FLOORS, MOST_INSTANCES, Capacity, check_admitted
from insula.control.networks.shaping import floors_of, kinds_of_floors, shaping_of
from insula.model.errors import Conflict, InsulaError, Invalid
from insula.model.guarantees import FLOORS, Guarantee
from insula.model.objects import Limits, Tenant
from insula.model.units import format_rate, parse_rate
from insula.network.linux.guarantees import tree

HOST = Capacity(link=1_000_000_000, cpus=8, memory=64 << 30)
LEFT = re.compile(r"can't be promised: (\S+) is left")
amounts = st.one_of(st.none(), st.integers(1, 120))
tenants = st.sampled_from(["acme", "globex", "initech"])
who = st.sampled_from([None, "a", "b"])
requests = st.lists(st.tuples(tenants, who, amounts, amounts, amounts, amounts), max_size=30)


def guarantee(tenant: str, instance: str | None, *percent: int | None) -> Guarantee:
    whole = (HOST.link or 0, HOST.link or 0, HOST.cpus, HOST.memory)
    values = {
        name: None if part is None else (all_ * part / 100 if name == "cpus" else all_ * part // 100)
        for name, all_, part in zip(FLOORS, whole, percent, strict=True)
    }
    return Guarantee(tenant=tenant, instance=instance, created=0.0, **values)  # type: ignore[arg-type]


@given(requests)
def test_sums_never_exceed_what_there_is(wanted: list[tuple[str, str | None, int, int, int, int]]) -> None:
    have = dict[tuple[str, str | None], Guarantee]()
    for tenant, instance, *percent in wanted:
        new = guarantee(tenant, instance, *percent)
        others = [each for key, each in have.items() if key != (tenant, instance)]
        try:
            check_admitted(new, others, Limits(), HOST)
        except Conflict:
            continue
        have[tenant, instance] = new
    for name in FLOORS:
        wholes = {tenant: getattr(each, name) or 0 for (tenant, instance), each in have.items() if instance is None}
        assert sum(wholes.values()) <= (HOST.promisable(name) or 0) + 1e-6
        for tenant in {tenant for tenant, _ in have}:
            parts = [getattr(each, name) or 0 for (owner, i), each in have.items() if owner == tenant and i is not None]
            assert sum(parts) <= wholes.get(tenant, 0) + 1e-6
    root = tree.root_class(HOST.link)
    assert sum(each.floor_out or 0 for each in have.values() if each.instance is None) <= root.rate


@given(st.lists(st.integers(8_000, 10**9), max_size=5), st.integers(8_000, 10**9))
def test_a_refusal_tells_what_would_be_admitted(taken: list[int], wanted: int) -> None:
    others = [Guarantee(tenant=f"t{n}", floor_out=each, created=0.0) for n, each in enumerate(taken)]
    new = Guarantee(tenant="acme", floor_out=wanted, created=0.0)
    left = int(1e9 * 0.95) - sum(taken)
    if wanted <= left:
        check_admitted(new, others, Limits(), HOST)
        return
    with pytest.raises(Conflict) as caught:
        check_admitted(new, others, Limits(), HOST)
    match = LEFT.search(caught.value.message)
    assert match
    assert match[1] == format_rate(max(left, 0))


def test_without_a_known_link_nothing_is_promised_but_limited() -> None:
    unknown = Capacity(link=None, cpus=8, memory=1 << 30)
    check_admitted(Guarantee(tenant="acme", ceiling_out=8_000, created=0.0), [], Limits(), unknown)
    with pytest.raises(Conflict, match="no known speed") as caught:
        check_admitted(Guarantee(tenant="acme", floor_in=8_000, created=0.0), [], Limits(), unknown)
    assert 'link = "1gbit"' in (hint := caught.value.hint or "") and "[network]" in hint and "--ceil-out" in hint
    check_admitted(Guarantee(tenant="acme", cpus=0.5, ceiling_out=100_000_000, created=0.0), [], Limits(), unknown)


def test_a_floor_lies_below_its_ceiling_and_the_limits() -> None:
    below = Guarantee(tenant="acme", floor_in=9_000, ceiling_in=8_000, created=0.0)
    with pytest.raises(Invalid, match="above the ceiling"):
        check_admitted(below, [], Limits(), HOST)
    limits: tuple[tuple[Guarantee, Limits], ...] = (
        (Guarantee(tenant="acme", floor_in=9_000, created=0.0), Limits(bandwidth=8_000)),
        (Guarantee(tenant="acme", cpus=2.0, created=0.0), Limits(cpus=1.0)),
        (Guarantee(tenant="acme", memory=2 << 20, created=0.0), Limits(memory=1 << 20)),
    )
    for each, limit in limits:
        with pytest.raises(InsulaError, match="is limited to"):
            check_admitted(each, [], limit, HOST)


def test_a_tenant_is_shaped_if_anybody_has_a_floor_or_it_has_a_ceiling() -> None:
    acme = Tenant(name="acme", index=1, id_base=0, created=0.0)
    limited = Tenant(name="acme", index=1, id_base=0, limits=Limits(bandwidth=10_000_000), created=0.0)
    floor = Guarantee(tenant="globex", floor_out=8_000, created=0.0)
    ceiling = Guarantee(tenant="acme", ceiling_out=20_000_000, created=0.0)
    assert shaping_of(acme, [], [], 10**9) is None
    assert shaping_of(acme, [Guarantee(tenant="globex", ceiling_in=8_000, created=0.0)], [], 10**9) is None
    shared = shaping_of(acme, [floor], [], 10**9)
    assert shared is not None
    assert (shared.link, shared.out.floor) == (10**9, None)
    alone = shaping_of(limited, [ceiling], [], 10**9)
    assert alone is not None
    assert (alone.link, alone.out.ceiling, alone.in_.ceiling) == (None, 10_000_000, 10_000_000)
    assert kinds_of_floors([ceiling]) == (False, False)
    assert kinds_of_floors([floor, ceiling]) == (True, False)
    assert kinds_of_floors([Guarantee(tenant="globex", cpus=1.0, created=0.0)]) == (False, True)
    floors = floors_of(acme, [Guarantee(tenant="globex", cpus=1.0, memory=5, created=0.0)], [])
    assert (floors.cpus, floors.shared, floors.all_memory) == (None, True, 5)


@given(st.integers(1, 10**12))
def test_rates_are_shown_as_they_are_given(bits: int) -> None:
    shown = parse_rate(format_rate(bits))
    assert bits * 0.999 - 1 <= shown <= bits


def test_a_tenant_has_not_too_many_guarantees() -> None:
    whole = Guarantee(tenant="acme", floor_out=10**8, created=0.0)
    floors = [Guarantee(tenant="acme", instance=f"i{n}", floor_out=8_000, created=0.0) for n in range(MOST_FLOORS)]
    ceiling = Guarantee(tenant="acme", instance="x", ceiling_out=8_000, created=0.0)
    check_admitted(ceiling, [whole, *floors], Limits(), HOST)
    with pytest.raises(Conflict, match="have floors of bandwidth"):
        check_admitted(
            Guarantee(tenant="acme", instance="x", floor_in=8_000, created=0.0), [whole, *floors], Limits(), HOST
        )
    many = [Guarantee(tenant="acme", instance=f"i{n}", packets_in=10, created=0.0) for n in range(MOST_INSTANCES)]
    with pytest.raises(Conflict, match="have guarantees"):
        check_admitted(ceiling, [whole, *many], Limits(), HOST)
    other = Guarantee(tenant="globex", instance="x", ceiling_out=8_000, created=0.0)
    check_admitted(other, [whole, *many], Limits(), HOST)
