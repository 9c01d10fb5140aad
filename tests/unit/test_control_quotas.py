"""Quotas: exceeding a sum is refused, also with concurrent requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.allocation.quotas import (
    add,
    change,
    check_covers,
    check_limits,
    check_resources,
    exchange,
    merge,
    subtract,
)
from insula.control.allocation.transaction import guarded
from insula.control.keys import USAGE
from insula.model.errors import Conflict, Invalid, QuotaExceeded
from insula.model.objects import Limits, Resources, Tenant
from insula.model.views import LimitsPatch, ResourcesPatch, Usage
from insula.store.protocol import Compare, Put, TransactionConflict
from insula.store.sqlite import SqliteStore
from insula.store.typed import Found


def tenant(**limits: Any) -> Tenant:
    return Tenant(name="acme", index=1, id_base=1 << 30, limits=Limits(**limits), created=0.0)


def of(resources: Resources) -> Usage:
    """What an instance with these limits counts, but for its log."""
    return Usage(instances=1, cpus=resources.cpus or 0.0, memory=resources.memory or 0)


@pytest.mark.parametrize(
    ("limits", "resources", "word"),
    [
        ({"instances": 3}, Resources(), "3 instances"),
        ({"cpus": 2.0}, Resources(cpus=0.51), "2 CPUs"),
        ({"memory": 100 << 20}, Resources(memory=41 << 20), "100M"),
    ],
)
def test_exceeding_a_limit_is_refused(limits: dict[str, float | int | None], resources: Resources, word: str) -> None:
    usage = Usage(instances=3, cpus=1.5, memory=60 << 20)
    with pytest.raises(QuotaExceeded, match=word) as refusal:
        add(tenant(**limits), usage, of(resources))
    assert refusal.value.hint
    assert add(tenant(), usage, of(resources)).instances == 4


def test_reaching_a_limit_is_allowed() -> None:
    usage = Usage(instances=3, cpus=1.5, memory=60 << 20)
    total = add(tenant(instances=4, cpus=2, memory=100 << 20), usage, of(Resources(cpus=0.5, memory=40 << 20)))
    assert total == Usage(instances=4, cpus=2.0, memory=100 << 20)


def test_without_a_limit_of_its_own_an_instance_counts_as_one() -> None:
    assert add(tenant(cpus=1, memory=10 << 20, instances=1), Usage(), of(Resources())) == Usage(instances=1)


@given(st.lists(st.builds(Resources, cpus=st.none() | st.floats(0.01, 64), memory=st.none() | st.integers(1, 1 << 40))))
def test_subtract_is_the_inverse_of_add(all_resources: list[Resources]) -> None:
    usage = Usage()
    for resources in all_resources:
        usage = add(tenant(), usage, of(resources))
    for resources in all_resources:
        usage = subtract(usage, of(resources))
    assert (usage.instances, usage.memory) == (0, 0)
    assert usage.cpus == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("after", "word"),
    [
        (Resources(cpus=1.51, memory=40 << 20), "2 CPUs and has 0.5 in use, 1.51 asked"),
        (Resources(cpus=1.0, memory=81 << 20), "100M of memory and has 20M in use, 81M asked"),
        (Resources(cpus=0.1, memory=81 << 20), "100M of memory"),
    ],
)
def test_a_change_is_refused_if_a_limit_rises_too_far(after: Resources, word: str) -> None:
    usage, before = Usage(instances=2, cpus=1.5, memory=60 << 20), Resources(cpus=1.0, memory=40 << 20)
    acme = tenant(cpus=2, memory=100 << 20, instances=2)
    with pytest.raises(QuotaExceeded, match=word):
        change(acme, usage, of(before), of(after))
    most = Resources(cpus=1.5, memory=80 << 20)
    assert change(acme, usage, of(before), of(most)) == Usage(instances=2, cpus=2.0, memory=100 << 20)


def test_a_refused_change_of_a_number_tells_how_many_there_are() -> None:
    """As of images, which change all together by one name more."""
    acme, there = tenant(images=8), Usage(images=8)
    with pytest.raises(QuotaExceeded, match="may have 8 images and has 8: 0 left"):
        change(acme, there, there, Usage(images=9))
    assert change(acme, there, there, Usage(images=8)) == there


def test_lowering_a_limit_is_never_refused() -> None:
    """Also of a tenant that has more in use than it may: by an update that was taken back, say."""
    usage, before = Usage(instances=2, cpus=3.0, memory=200 << 20), Resources(cpus=1.0, memory=150 << 20, pids=9)
    acme = tenant(cpus=2, memory=100 << 20, instances=1)
    assert change(acme, usage, of(before), of(Resources(cpus=0.5, memory=150 << 20))).cpus == 2.5
    assert change(acme, usage, of(before), of(Resources())) == Usage(instances=2, cpus=2.0, memory=50 << 20)
    with pytest.raises(QuotaExceeded):
        change(acme, usage, of(before), of(Resources(cpus=1.01)))


_RESOURCES = st.builds(Resources, cpus=st.none() | st.integers(1, 64), memory=st.none() | st.integers(1, 1 << 40))


@given(_RESOURCES, _RESOURCES, _RESOURCES)
def test_a_change_that_is_taken_back_leaves_nothing(other: Resources, before: Resources, after: Resources) -> None:
    usage = add(tenant(), add(tenant(), Usage(), of(other)), of(before))
    changed = change(tenant(), usage, of(before), of(after))
    assert changed == add(tenant(), add(tenant(), Usage(), of(other)), of(after))
    assert exchange(changed, of(after), of(before)) == usage


@pytest.mark.parametrize(
    ("limits", "word"),
    [(Limits(instances=2), "3 instances"), (Limits(cpus=1.4), "1.5 CPUs"), (Limits(memory=59 << 20), "60M of memory")],
)
def test_limits_below_what_is_in_use(limits: Limits, word: str) -> None:
    usage = Usage(instances=3, cpus=1.5, memory=60 << 20)
    with pytest.raises(QuotaExceeded, match=word):
        check_covers(tenant(), limits, usage)
    check_covers(tenant(), Limits(instances=3, cpus=1.5, memory=60 << 20), usage)
    check_covers(tenant(), Limits(), usage)


def test_a_patch() -> None:
    """RFC 7396: absent stays, null removes."""
    now = Resources(cpus=1.0, memory=64 << 20, pids=9)
    assert merge(now, ResourcesPatch(memory=None, pids=10)) == Resources(cpus=1.0, memory=None, pids=10)
    assert merge(Limits(cpus=1.0), LimitsPatch(cpus=None, instances=3)) == Limits(instances=3)
    with pytest.raises(Invalid, match="nothing to change"):
        merge(now, ResourcesPatch())


def test_the_last_place_is_taken_once(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        acme = tenant(instances=5)

        async def launch(number: int) -> None:
            async def attempt(guard: Found[Usage]) -> None:
                usage = add(acme, guard.value, of(Resources()))
                await store.transact(
                    [Compare(USAGE.key("acme"), guard.revision)], [USAGE.put(usage, "acme"), Put(f"/i/{number}", b"")]
                )

            await guarded(store, "acme", attempt)

        outcomes = await asyncio.gather(*(launch(i) for i in range(12)), return_exceptions=True)
        assert sum(outcome is None for outcome in outcomes) == 5
        assert sum(isinstance(outcome, QuotaExceeded) for outcome in outcomes) == 7
        assert len((await store.list("/i/")).entries) == 5
        found = await USAGE.get(store, "acme")
        assert found is not None and found.value.instances == 5
        await store.close()

    asyncio.run(main())


def test_a_guard_that_always_changes_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")

        async def attempt(guard: Found[Usage]) -> None:
            await store.transact([], [USAGE.put(guard.value, "acme")])  # somebody is always faster
            await store.transact([Compare(USAGE.key("acme"), guard.revision)], [Put("/never", b"")])

        with pytest.raises(Conflict, match="too many concurrent changes"):
            await guarded(store, "acme", attempt)
        assert await store.get("/never") is None
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "limits",
    [Limits(cpus=0), Limits(cpus=-1.0), Limits(cpus=float("nan")), Limits(memory=5), Limits(instances=-1),
     Limits(bandwidth=1), Limits(memory=1 << 63), Limits(pids=0), Limits(pids=1 << 23)],
)  # fmt: skip
def test_invalid_limits_are_refused(limits: Limits) -> None:
    with pytest.raises(Invalid):
        check_limits(limits)


@pytest.mark.parametrize(
    "resources", [Resources(cpus=0.001), Resources(memory=1024), Resources(pids=0), Resources(pids=1 << 40)]
)
def test_invalid_resources_are_refused(resources: Resources) -> None:
    with pytest.raises(Invalid):
        check_resources(resources)
    assert check_resources(Resources(cpus=0.01, memory=6 << 20, pids=1))


GREATEST = (1 << 63) - 1


@pytest.mark.parametrize(
    ("name", "least", "below", "most", "above"),
    [
        ("cpus", 0.01, 0.0099, 65536.0, 65536.5),
        ("memory", 6 << 20, (6 << 20) - 1, GREATEST, GREATEST + 1),
        ("pids", 1, 0, 1 << 22, (1 << 22) + 1),
        ("instances", 0, -1, 1_000_000, 1_000_001),
        ("bandwidth", 8000, 7999, GREATEST, GREATEST + 1),
    ],
)
def test_the_least_and_the_most_of_each_limit(name: str, least: float, below: float, most: float, above: float) -> None:
    kinds = [(Limits, check_limits), (Resources, check_resources)] if name in ("cpus", "memory", "pids") else []
    for kind, check in kinds or [(Limits, check_limits)]:
        for value in (least, most, None):
            limits = kind(**{name: value})
            assert check(limits) is limits  # type: ignore[operator]
        for value in (below, above):
            with pytest.raises(Invalid) as refused:
                check(kind(**{name: value}))  # type: ignore[operator]
            assert refused.value.hint


def test_a_limit_of_zero_allows_nothing() -> None:
    """0 is a limit, and not the lack of one."""
    with pytest.raises(QuotaExceeded, match="may have 0 instances and has 0"):
        add(tenant(instances=0), Usage(), of(Resources()))
    with pytest.raises(QuotaExceeded):
        check_covers(tenant(), Limits(instances=0), Usage(instances=1))
    check_covers(tenant(), Limits(instances=0), Usage())


_USAGE = st.builds(
    Usage, instances=st.integers(0, 9), cpus=st.integers(0, 800).map(lambda n: n / 100), memory=st.integers(0, 1 << 40)
)
_ANY = st.builds(
    Resources,
    cpus=st.none() | st.integers(1, 800).map(lambda n: n / 100),
    memory=st.none() | st.integers(1, 1 << 40),
)


@given(_USAGE, _ANY, st.sampled_from([("instances", 1), ("cpus", 0.01), ("memory", 1)]))
def test_each_limit_is_met_to_the_last_unit(usage: Usage, resources: Resources, limit: tuple[str, float]) -> None:
    name, unit = limit
    total = add(tenant(), usage, of(resources))
    assert (total.instances, total.memory) == (usage.instances + 1, usage.memory + (resources.memory or 0))
    assert total.cpus == pytest.approx(usage.cpus + (resources.cpus or 0))
    exact = getattr(total, name)
    assert add(tenant(**{name: exact}), usage, of(resources)) == total
    if name == "instances" or getattr(resources, name) is not None:
        with pytest.raises(QuotaExceeded):
            add(tenant(**{name: exact - unit}), usage, of(resources))
    else:
        assert add(tenant(**{name: 0}), usage, of(resources)) == total, "what it doesn't ask for is not counted"
    check_covers(tenant(), Limits(**{name: exact}), total)
    if exact >= unit:
        with pytest.raises(QuotaExceeded):
            check_covers(tenant(), Limits(**{name: exact - unit}), total)


def test_usage_is_never_negative() -> None:
    """A damaged sum allows no more than the limits."""
    assert subtract(Usage(), of(Resources(cpus=1.0, memory=1))) == Usage()
    assert subtract(Usage(instances=1, cpus=0.5, memory=5), of(Resources(cpus=0.5, memory=5))) == Usage()


def test_other_failures_are_not_retried(tmp_path: Path) -> None:
    """Such as a name that is taken: a retry would fail again."""

    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        await store.transact([], [Put("/taken", b"")])
        attempts = 0

        async def attempt(guard: Found[Usage]) -> None:
            nonlocal attempts
            attempts += 1
            await store.transact([Compare("/taken", 0)], [Put("/taken", b"mine")])

        with pytest.raises(TransactionConflict) as conflict:
            await guarded(store, "acme", attempt)
        assert (conflict.value.key, attempts) == ("/taken", 1)
        await store.close()

    asyncio.run(main())
