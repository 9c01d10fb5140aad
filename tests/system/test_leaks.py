"""Nothing is left of fifty containers, of failed launches, and of Insula as a whole after `down`."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest

from tests.support.cli import Cli
from tests.support.daemon import PROCESSES, Daemon
from tests.support.machine import Run
from tests.support.snapshot import Snapshot, assert_unchanged
from tests.support.wait import until

NAMESPACES_EACH = 7  # cgroup, ipc, mnt, net, pid, user, uts


def all_of(cli: Cli, *commands: tuple[str, ...]) -> None:
    """Runs the commands, a few at a time; each must succeed."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda command: cli.ok(*command), commands))


def launch_and_remove(cli: Cli, stem: str, count: int) -> None:
    names = [f"{stem}{number}" for number in range(count)]
    all_of(cli, *(("run", "-d", "--name", name, "busybox", "sleep", "600") for name in names))
    assert sorted(view["instance"]["name"] for view in cli.json("ps")) == sorted(names)
    all_of(cli, *(("rm", "-f", name) for name in names))


def no_more_descriptors(daemon: Daemon, before: dict[str, int]) -> None:
    """Soon only as many descriptors are open as before, or a few more for kept connections."""

    def few() -> bool:
        now = {name: daemon.descriptors(name) for name in before}
        assert all(now[name] <= before[name] + 4 for name in before), (before, now)
        return True

    until(few, "descriptors are closed")


def but_files(daemon: Daemon) -> Snapshot:
    return replace(daemon.snapshot(), files=frozenset())


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.long)])
def test_many_containers_twice(fresh: Daemon, count: int) -> None:
    cli = fresh.cli
    empty = but_files(fresh)
    launch_and_remove(cli, "first", count)
    assert_unchanged(empty, partial(but_files, fresh))
    # files that are made once are there now, also those for so many at a time
    before, descriptors = fresh.snapshot(), {name: fresh.descriptors(name) for name in PROCESSES}
    launch_and_remove(cli, "second", count)
    assert_unchanged(before, fresh.snapshot)
    no_more_descriptors(fresh, descriptors)


def test_verify(fresh: Daemon) -> None:
    cli = fresh.cli
    for name in ("one", "two"):
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
    for _ in range(2):  # threads and libraries are there now
        cli.ok("verify")
    before, descriptors = fresh.snapshot(), {"insulad": fresh.descriptors("insulad")}
    for _ in range(4):
        cli.ok("verify")
    assert_unchanged(before, fresh.snapshot)
    no_more_descriptors(fresh, descriptors)  # a measurement has some for each instance


def test_the_snapshot_sees_a_container(fresh: Daemon) -> None:
    """The positive control: what the other tests look for does show while a container runs."""
    fresh.cli.ok("run", "--rm", "busybox", "true")
    before = fresh.snapshot()
    fresh.cli.ok("run", "-d", "--name", "one", "busybox", "sleep", "600")
    kinds = [line.split(":")[0] for line in before.difference(fresh.snapshot())]
    assert kinds.count("namespaces") >= NAMESPACES_EACH
    assert {"processes", "cgroups", "files"} <= set(kinds)
    fresh.cli.ok("rm", "-f", "one")
    assert_unchanged(before, fresh.snapshot)


def test_launches_that_fail(fresh: Daemon) -> None:
    cli = fresh.cli
    cli.ok("run", "--rm", "busybox", "true")
    before = fresh.snapshot()
    for _ in range(5):
        assert cli.run("run", "--rm", "busybox", "no-such-program").status == 127
        assert cli.run("run", "--rm", "busybox", "/etc").status == 126
        assert cli.run("run", "--rm", "--user", "nobody-such", "busybox", "true").status == 125
        assert cli.run("run", "--rm", "--ip", "192.0.2.77", "busybox", "true").status == 125
    assert_unchanged(before, fresh.snapshot)


def test_clients_that_go_away(fresh: Daemon) -> None:
    """kill -9 of the command line during `run`, `exec`, `attach` and `logs -f`."""
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "here", "busybox", "sleep", "600")
    cli.ok("exec", "here", "true")
    before = fresh.snapshot()
    descriptors = {"insulad": fresh.descriptors("insulad")}
    for command in (("exec", "here", "cat"), ("attach", "here"), ("logs", "-f", "here")) * 3:
        with cli.start(*command) as client:
            with suppress(subprocess.TimeoutExpired):
                client.wait(0.2)
            client.kill()
    assert_unchanged(before, fresh.snapshot)
    no_more_descriptors(fresh, descriptors)
    assert [view["instance"]["name"] for view in cli.json("ps")] == ["here"]


def test_down_leaves_nothing_but_the_state(run_: Run) -> None:
    daemon = Daemon(run_)
    try:
        before = but_files(daemon)
        daemon.start()
        daemon.cli.ok("tenant", "create", "acme")
        daemon.cli.of("acme").ok("network", "create", "default", "--subnet", "10.0.0.0/24")
        daemon.cli.of("acme").ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
        daemon.cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
        assert before.difference(but_files(daemon))
        daemon.down()
        assert_unchanged(before, partial(but_files, daemon))
        daemon.start()
        assert "acme" in [view["tenant"]["name"] for view in daemon.cli.json("tenant", "ls")]
        daemon.down()
        assert_unchanged(before, partial(but_files, daemon))
    finally:
        daemon.remove()
