"""Failed attempts beyond a number a minute: which are lines, which are counted, and that none is forgotten."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.audit import floods
from insula.audit.floods import FIRST, FIRST_OF_ALL, OF_PRINCIPAL, OTHERS, SOURCES, WINDOW, Floods
from insula.audit.reader import read
from insula.audit.writer import AuditLog
from tests.support.wait import until


def lines(made: Floods, source: str, count: int, *, proved: bool = False, now: float = 0.0) -> int:
    """How many of `count` failed attempts are lines."""
    return sum(made.admit(source, "401", now, proved=proved) for _ in range(count))


def test_the_first_of_a_source_are_lines_and_a_principal_has_more() -> None:
    assert (FIRST, OF_PRINCIPAL, FIRST_OF_ALL) == (10, 120, 200), "as docs/audit.md says"
    made = Floods()
    assert lines(made, "uid 1", 100) == 10
    assert lines(made, "uid 2", 100) == 10, "another source has its own"
    assert lines(made, "ann", 500, proved=True) == 120


def test_sources_without_a_proof_share_a_number() -> None:
    made = Floods()
    assert sum(lines(made, f"192.0.{n}.0/24", 10) for n in range(50)) == 200
    assert lines(made, "ann", 10, proved=True) == 10, "who has proved who it is, is not pushed out by them"


def test_so_many_strangers_hide_no_principal() -> None:
    """Neither its lines nor what is counted of it."""
    made = Floods()
    for n in range(10_000):
        made.admit(f"source {n}", "401", 0.0)
    assert lines(made, "ann", 130, proved=True) == 120
    [of_ann] = [each for each in made.take(WINDOW) if each["source"] == "ann"]
    assert of_ann["failed"] == 10


def test_after_a_minute_it_begins_again() -> None:
    made = Floods()
    assert lines(made, "uid 1", 25) == 10
    assert made.due() == WINDOW and made.take(WINDOW - 1) == []
    assert made.take(WINDOW) == [{"failed": 15, "source": "uid 1", "results": {"401": 15}}]
    assert made.due() is None and made.take(WINDOW) == [], "once"
    assert lines(made, "uid 1", 25, now=WINDOW) == 10
    assert [each["failed"] for each in made.take(WINDOW + 1, end=True)] == [15], "also at the end"


def test_a_minute_without_a_count_ends_too() -> None:
    made = Floods()
    assert [lines(made, "uid 1", 10, now=n * WINDOW) for n in range(3)] == [10, 10, 10]


def test_what_is_counted_takes_bounded_memory() -> None:
    made = Floods()
    for n in range(100_000):
        made.admit(f"source {n}", str(n), 0.0)
    counted = made.take(WINDOW)
    assert len(counted) == SOURCES + 1 and counted[-1]["source"] == OTHERS
    assert sum(each["failed"] for each in counted) == 100_000 - FIRST_OF_ALL
    assert max(len(each["results"]) for each in counted) == SOURCES + 1


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.floats(0, 40)), max_size=200))
def test_each_attempt_is_a_line_or_counted(attempts: list[tuple[int, bool, float]]) -> None:
    made, now = Floods(), 0.0
    admitted, counted = Counter[str](), Counter[str]()

    def take(*, end: bool = False) -> None:
        for each in made.take(now, end=end):
            counted[each["source"]] += each["failed"]

    for source, proved, pause in attempts:
        now += pause
        take()
        admitted[f"{source} {proved}"] += made.admit(f"{source} {proved}", "404", now, proved=proved)
    take(end=True)
    assert admitted + counted == Counter(f"{source} {proved}" for source, proved, _ in attempts)


def test_the_count_is_written_when_its_minute_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the writer itself: nothing else happens."""
    monkeypatch.setattr(floods, "WINDOW", 0.5)
    log = AuditLog(tmp_path / "log")
    try:
        for _ in range(1000):
            log.record_failure({"time": "2026", "status": 401}, "uid 1", proved=False)

        def written() -> list[str]:
            return [each["source"] for each in read(tmp_path / "log", 0) if "failed" in each]

        until(lambda: written() != [], "the count is a line")
        assert set(written()) == {"uid 1"}
    finally:
        log.close()
