"""Meters: totals over readings of counters that begin anew, are read twice, or are not read at all."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from insula.control.accounting.ledger import after_boot, now
from insula.control.accounting.meters import (
    LONGEST,
    accrue,
    add,
    advance,
    baseline,
    finish,
    hold,
    sample,
    subtract,
    totals,
)
from insula.control.keys import LEDGERS
from insula.model.accounting import (
    Account,
    Checkpoint,
    Ledger,
    MemoryMeter,
    ReservedTotals,
    UsageMeter,
    UsedTotals,
)


class Life(NamedTuple):
    """The readings of one incarnation, in their order; each is repeated some times."""

    steps: list[int]
    repeats: int


LIVES = st.lists(st.builds(Life, st.lists(st.integers(0, 1 << 62), min_size=1, max_size=5), st.integers(1, 3)))


@given(LIVES)
def test_a_total_is_the_sum_of_the_last_readings(lives: list[Life]) -> None:
    """However often each was read, and whatever another incarnation had counted."""
    meter = UsageMeter()
    for number, life in enumerate(lives):
        raw = 0
        for step in life.steps:
            raw += step
            for _ in range(life.repeats):
                before = meter.total
                meter = advance(meter, f"boot-{number}", raw)
                assert meter.total >= before
    assert meter.total == sum(sum(life.steps) for life in lives)


@given(st.lists(st.integers(0, 1 << 40), min_size=1), st.data())
def test_readings_that_are_lost_change_nothing(raws: list[int], data: st.DataObject) -> None:
    """Those of a killed daemon: only the last reading of an incarnation counts."""
    readings = sorted(raws)
    kept = [each for each in readings[:-1] if data.draw(st.booleans())] + [readings[-1]]
    meters = UsageMeter(), UsageMeter()
    for meter, some in zip(meters, (readings, kept), strict=True):
        for raw in some:
            meter = advance(meter, "one", raw)
        assert meter.total == readings[-1]


@given(LIVES, st.integers(0, 1 << 40))
def test_what_was_used_before_a_baseline_is_not_counted(lives: list[Life], before: int) -> None:
    meter = baseline("warm", before)
    assert advance(meter, "warm", before).total == 0
    assert advance(meter, "warm", before + 7).total == 7
    assert advance(meter, "other", before + 7).total == before + 7, "the container was lost, and another was made"


def test_a_reading_that_is_smaller_in_the_same_incarnation_adds_nothing() -> None:
    meter = advance(UsageMeter(), "one", 100)
    late = advance(meter, "one", 60)
    assert late.total == 100 and advance(late, "one", 110).total == 110


# -- memory --------------------------------------------------------------------------------------------------------


def test_memory_is_the_area_between_samples() -> None:
    meter = sample(MemoryMeter(), "one", at=100.0, used=10, ran=3.0)
    assert (meter.total, meter.sampled, meter.unsampled) == (0.0, 0.0, 3.0)
    meter = sample(meter, "one", at=110.0, used=30, ran=13.0)
    assert (meter.total, meter.sampled, meter.unsampled) == (200.0, 10.0, 3.0)
    assert sample(meter, "one", at=110.0, used=30, ran=13.0) == meter, "read twice"
    ended = finish(meter, "one", at=114.0, ran=17.0)
    assert (ended.total, ended.sampled, ended.unsampled) == (200.0, 10.0, 7.0)
    assert finish(ended, "one", at=999.0, ran=902.0) == replace(ended, at=999.0), "read again after a crash"
    assert sample(ended, "one", at=1000.0, used=5, ran=0.0) == ended
    again = sample(ended, "two", at=2000.0, used=5, ran=1.0)
    assert (again.total, again.sampled, again.unsampled) == (200.0, 10.0, 8.0)


def test_a_gap_is_told_and_not_filled() -> None:
    meter = sample(MemoryMeter(), "one", at=0.0, used=1000, ran=0.0)
    near, far = sample(meter, "one", LONGEST, 1000, 0.0), sample(meter, "one", LONGEST + 1, 1000, 0.0)
    assert (near.total, near.sampled, near.unsampled) == (1000 * LONGEST, LONGEST, 0.0)
    assert (far.total, far.sampled, far.unsampled) == (0.0, 0.0, LONGEST + 1)


def test_a_short_life_without_a_sample_is_told() -> None:
    ended = finish(MemoryMeter(), "one", at=50.0, ran=4.0)
    assert (ended.total, ended.sampled, ended.unsampled) == (0.0, 0.0, 4.0)


def test_a_sample_that_was_found_unchanged_is_held() -> None:
    meter = sample(MemoryMeter(), "one", at=0.0, used=10, ran=0.0)
    held = hold(meter, 100.0)
    assert (held.total, held.sampled) == (1000.0, 100.0)
    assert hold(held, 100.0) == held and hold(held, 50.0) == held
    ended = finish(held, "one", at=100.0, ran=100.0)
    assert hold(ended, 200.0) == ended


@given(st.lists(st.tuples(st.floats(0, 60), st.integers(0, 1 << 40), st.booleans())))
def test_time_is_sampled_or_not_and_never_both(steps: list[tuple[float, int, bool]]) -> None:
    meter, at = sample(MemoryMeter(), "one", 0.0, 0, 0.0), 0.0
    for seconds, used, unchanged in steps:
        at += seconds
        meter = hold(meter, at) if unchanged else sample(meter, "one", at, used, at)
        assert meter.sampled + meter.unsampled == pytest.approx(at)
    most = max([0, *(used for _, used, _ in steps)])
    assert 0 <= meter.total <= most * meter.sampled * (1 + 1e-9)


# -- reservations --------------------------------------------------------------------------------------------------


def test_reservations_are_exact_between_changes_and_stop_with_the_host() -> None:
    ledger = Ledger(boot="a", at=10.0, instances=2, cpus=1.5, memory=100)
    later = accrue(ledger, "a", 20.0)
    assert later.reserved == ReservedTotals(instances=20.0, cpus=15.0, memory=1000.0)
    assert accrue(later, "a", 20.0) == later
    rebooted = accrue(later, "b", 5.0)
    assert rebooted.reserved == later.reserved and (rebooted.boot, rebooted.at) == ("b", 5.0)
    assert accrue(rebooted, "b", 6.0).reserved.instances == 22.0


def test_after_a_boot_the_time_until_the_last_checkpoint_counts() -> None:
    old = Ledger(boot="old", at=100.0, instances=1, cpus=1.0, memory=1)
    mine = Ledger(boot=now().boot, at=1.0)
    for checkpoint, seconds in (
        (Checkpoint(boot="old", at=160.0), 60.0),
        (Checkpoint(boot="old", at=90.0), 0.0),
        (Checkpoint(boot="older", at=160.0), 0.0),
        (None, 0.0),
    ):
        [put] = after_boot([("acme", old), ("globex", mine)], checkpoint)
        assert put.key == LEDGERS.key("acme")
        stored = msgspec.json.decode(put.value, type=Ledger)
        assert stored.reserved.instances == seconds and stored.boot == now().boot


def test_sums_and_differences() -> None:
    one = totals(Account(cpu=UsageMeter(incarnation="a", raw=5, total=7)))
    assert one == UsedTotals(cpu=7)
    both = add((one, UsedTotals(cpu=1, memory=2.5)))
    assert both == UsedTotals(cpu=8, memory=2.5)
    assert subtract(both, one) == UsedTotals(cpu=1, memory=2.5)
    assert subtract(one, both) == UsedTotals()
