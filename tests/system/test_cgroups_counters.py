"""Counters of control groups, from which accounts are made: what they include, and when they end."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from insula.kernel.cgroups import Cgroup
from tests.support import groups
from tests.support.groups import inside, running, spin
from tests.support.machine import Run
from tests.support.wait import until

TREES = groups.trees()


@pytest.fixture(params=TREES)
def either(run_: Run, request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    with groups.made(run_.name, TREES[request.param]) as group:
        yield group


def test_counters_of_a_group(either: Cgroup) -> None:
    """They include what has ended, and another group of the same name is another one."""
    first, used, _ = either.counters()
    inside(either, lambda: sum(range(2_000_000)))
    again, after, _ = either.counters()
    assert again == first and after > used + 1_000_000
    whole = Cgroup(either.path.rpartition("/")[0], either.tree)
    before = whole.counters()[1]
    assert before >= after, "the parent has it, too"
    either.remove()
    with pytest.raises(FileNotFoundError):
        either.counters()
    assert whole.counters()[1] == before, "and keeps it"
    either.create()
    inode, used, _ = either.counters()
    assert inode != first and used < 1_000_000


def test_a_group_is_emptied_and_stays_with_its_counters(either: Cgroup) -> None:
    either.empty()  # nothing happens
    with running(either, spin) as process:
        until(lambda: either.counters()[1] > 1_000_000, "it works")
        either.empty()
        assert process.end() == -signal.SIGKILL
    assert either.processes() == [] and either.counters()[1] > 1_000_000


@pytest.mark.parametrize("below", [False, True])
def test_a_group_is_empty_when_all_processes_have_ended(either: Cgroup, *, below: bool) -> None:
    """Those of its subgroups count as well."""
    group = Cgroup(f"{either.path}/below", either.tree) if below else either
    group.create()
    assert either.is_empty()
    with running(group, spin) as process:
        assert not either.is_empty()
        either.kill()
        assert process.end() == -signal.SIGKILL
    assert either.is_empty() and either.processes() == []
    either.remove()
    assert either.is_empty(), "it is gone"
