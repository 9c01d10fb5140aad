"""insulad starts over the remains of fifty hostile or damaged instances (tests.support.zoo).

It answers before it has looked at any of them, serves others, tells of each that is not as it should be, and can
remove all of them.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import suppress

import pytest

from insula.store.sqlite import SqliteStore
from tests.support.daemon import Daemon
from tests.support.machine import Run
from tests.support.wait import until
from tests.support.zoo import TENANT, Zoo, leave

LISTENING = "insula.daemon: listening"
LOOKED_AT = re.compile(r"insula\.reconcile: instance \S+: ")


@pytest.fixture(scope="module")
def zoo(run_: Run) -> Iterator[Zoo]:
    daemon = Daemon(run_)
    try:
        daemon.start()
        with Zoo.open(daemon) as zoo:
            yield zoo
    finally:
        daemon.remove()


def log_since(daemon: Daemon, offset: int) -> str:
    return daemon.log.read_text(errors="replace")[offset:]


def test_it_answers_first_and_serves_others(zoo: Zoo) -> None:
    daemon, cli = zoo.daemon, zoo.daemon.cli
    assert len(zoo.ids) >= 50
    before = len(daemon.log.read_text(errors="replace"))
    daemon.launch()
    daemon.wait_until_it_answers()
    assert cli.run("run", "--rm", "busybox", "echo", "served").out == "served\n"
    assert {view["tenant"]["name"] for view in cli.json("tenant", "ls")} >= {"default", TENANT, "sound"}
    daemon.wait_until_it_is_reconciled()
    log = log_since(daemon, before)
    assert LISTENING in log
    looked = [match.start() for match in LOOKED_AT.finditer(log)]
    assert len(looked) >= 40, "the positive control: it tells when it looks at one"
    assert log.index(LISTENING) < min(looked)
    assert "Traceback" not in log, log


def test_each_problem_is_told(zoo: Zoo) -> None:
    cli = zoo.daemon.cli

    def told() -> bool:
        for problems in (cli.json("status")["problems"], [check["detail"] for check in cli.json("doctor")]):
            missing = [what for what in zoo.problems if not any(what in problem for problem in problems)]
            assert not missing, problems
        return True

    until(told, "every problem is told by status and by doctor")


def test_those_that_can_run_on_do(zoo: Zoo) -> None:
    views = {view["instance"]["name"]: view["status"] for view in zoo.daemon.cli.of(TENANT).json("ps", "-a")}
    shown = {name for name, status in views.items() if status["error"] == "its record is damaged"}
    assert shown == {name for name in zoo.lost if not name.startswith("orphan")}
    for name in zoo.running:
        assert views[name]["state"] in ("running", "paused"), (name, views[name])
        assert views[name]["pid"] == zoo.pids[name], name
    assert {status["state"] for name, status in views.items() if name.startswith("killed")} == {"exited"}
    again = {name: status for name, status in views.items() if name.startswith("again")}
    assert all(status["state"] == "running" and status["pid"] != zoo.pids[name] for name, status in again.items())
    assert not [name for name in views if name.endswith("removed")]


def test_all_can_be_used_and_removed(zoo: Zoo) -> None:
    """Whatever was damaged: lost records are made again, and after the removal nothing is left."""
    daemon, cli = zoo.daemon, zoo.daemon.cli.of(TENANT)
    for view in cli.json("ps", "-a"):
        name = view["instance"]["name"]
        if name in zoo.lost:
            continue
        if not name.startswith(("usual", "stopped", "traced", "threads", "paused")):
            assert cli.run("restart", "-t", "0", name).status == 0, name
            assert cli.ok("exec", name, "echo", "here") == "here"
            cli.run("logs", name)
        assert cli.run("rm", "-f", name).status == 0, name
    lost = {zoo.ids[name] for name in zoo.lost}
    assert set(os.listdir(daemon.run / "containers")) <= lost, "nothing is left but of those that nobody knows"
    assert set(os.listdir(daemon.root / "instances")) == lost, "whose files are kept"


def test_leftovers_of_nobody_are_swept(fresh: Daemon) -> None:
    """Obstacles are reported, and everything else is removed; an instance beside them stays."""
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "kept", "busybox", "sleep", "600")
    [own] = os.listdir(fresh.root / "instances")
    fresh.kill("insulad")
    fresh.kill("zygote")
    stuck = leave(fresh)
    fresh.start()
    until(lambda: set(os.listdir(fresh.root / "instances")) == {own, *stuck}, "the rest is removed")
    until(lambda: set(os.listdir(fresh.run / "containers")) == {own}, "so is what is in memory")
    for name in stuck:
        until(lambda name=name: any(name in problem for problem in cli.json("status")["problems"]), "it is told")  # type: ignore[misc]
    assert cli.ok("exec", "kept", "echo", "here") == "here"
    assert cli.run("run", "--rm", "busybox", "true").status == 0


def test_a_record_that_can_not_be_read_stops_sweeping(fresh: Daemon) -> None:
    """Nobody knows what it owned: its files, its network and its image stay, until the record is whole again."""
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "precious", "busybox", "sleep", "600")
    cli.ok("exec", "precious", "sh", "-c", "echo data > /root/data")
    fresh.kill("insulad")
    key = "/instances/default/precious"
    whole = exchange(fresh, key, b"{")
    fresh.start()
    assert [view["instance"]["id"] for view in cli.json("ps", "-a")] == [""]
    assert key in str(cli.json("status")["problems"])
    assert "is damaged" in cli.fails("inspect", "precious")
    cli.ok("run", "-d", "--name", "other", "busybox", "sleep", "600")
    fresh.kill("insulad")
    exchange(fresh, key, whole)
    fresh.start()
    assert cli.ok("exec", "precious", "cat", "/root/data") == "data"
    assert cli.run("exec", "other", "ping", "-c", "1", "-W", "20", "precious").status == 0
    assert key not in str(cli.json("status")["problems"])


def test_it_starts_over_a_disk_that_is_full(small: Daemon) -> None:
    """Running instances are adopted and can be used; failed writes are reported; with free space all is well again."""
    cli = small.cli
    for name in ("first", "second"):
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
    small.kill("insulad")
    ballast = small.root / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with (small.root / "rest").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x")
    assert os.statvfs(small.root).f_bavail == 0
    small.start()
    assert {view["status"]["state"] for view in cli.json("ps")} == {"running"}
    assert cli.ok("exec", "first", "echo", "here") == "here"
    assert "full" in cli.fails("network", "create", "more", "--subnet", "10.9.0.0/24")
    assert "full" in cli.fails("rm", "-f", "first"), "it is not killed before that is written down"
    assert cli.ok("exec", "first", "echo", "here") == "here"
    ballast.unlink()
    cli.ok("rm", "-f", "first", "second")
    assert cli.ok("run", "--rm", "busybox", "echo", "out") == "out"


def exchange(daemon: Daemon, key: str, value: bytes) -> bytes:
    """Write that into the store of a daemon that is dead; what was there."""

    async def write() -> bytes:
        store = SqliteStore(daemon.root / "state.db")
        try:
            found = await store.get(key)
            assert found
            await store.put(key, value)
            return found.value
        finally:
            await store.close()

    return asyncio.run(write())
