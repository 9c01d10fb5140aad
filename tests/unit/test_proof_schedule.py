"""When a tenant is proven after changes: soon, and not too often."""

from __future__ import annotations

import itertools

from insula.control.proof_schedule import LEAST, MOST, ProofSchedule


def test_a_change_is_proven_at_once_and_nobody_else() -> None:
    schedule = ProofSchedule()
    assert schedule.due() is None
    schedule.changed("acme", 5.0)
    schedule.changed("acme", 5.2)
    assert schedule.due() == 5.0
    assert schedule.take(5.3) == ["acme"]
    assert schedule.due() is None and schedule.take(9.0) == []


def proofs_of_changes_without_end(seconds: int) -> list[float]:
    """The times of the proofs of a tenant that changes ten times a second."""
    schedule, found = ProofSchedule(), []
    for tenth in range(seconds * 10):
        now = tenth / 10
        schedule.changed("acme", now)
        found += [now] * len(schedule.take(now))
    return found


def test_changes_without_end_have_fewer_and_fewer_proofs() -> None:
    times = proofs_of_changes_without_end(600)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert min(pauses) >= LEAST
    assert max(pauses) <= MOST + 0.2
    assert pauses == sorted(pauses)
    assert len(times) < 30


def test_after_some_calm_a_change_is_proven_at_once_again() -> None:
    schedule = ProofSchedule()
    last = proofs_of_changes_without_end(60)[-1]
    schedule.changed("acme", last)
    assert schedule.take(last) == ["acme"]
    for now in (last + 2 * MOST, last + 4 * MOST):
        schedule.changed("acme", now)
        assert schedule.due() == now
        assert schedule.take(now) == ["acme"]


def test_one_tenant_does_not_delay_another() -> None:
    schedule = ProofSchedule()
    for now in (0.0, 0.5):
        schedule.changed("busy", now)
        schedule.take(now)
    schedule.changed(None, 0.6)
    assert schedule.take(0.6) == [None]
