"""Insula's processes supervise each other, also when one of them can't be started for a while."""

from __future__ import annotations

import os
from collections.abc import Callable

from tests.support.daemon import Daemon
from tests.support.wait import until

ZYGOTE, MONITOR = "insula-zygote: it ends", "IsADirectoryError"


def fails(daemon: Daemon, what: str) -> Callable[[], bool]:
    """Whether the log has told that at least three times more than now."""
    before = daemon.log.read_text().count(what)
    return lambda: daemon.log.read_text().count(what) >= before + 3


def works(daemon: Daemon) -> bool:
    return daemon.cli.run("run", "--rm", "busybox", "echo", "out").out == "out\n"


def test_a_zygote_that_fails_to_start_for_a_while(fresh: Daemon) -> None:
    """A monitor that gave up, or lost sight of it, would never launch anything again."""
    cli, layers = fresh.cli, fresh.run / "layers"
    cli.ok("run", "-d", "--name", "before", "busybox", "sleep", "600")
    layers.rmdir()  # where its mounts are: in its own view only
    layers.touch()
    failed = fails(fresh, ZYGOTE)
    fresh.kill("zygote")
    until(failed, "the next ones can't start")
    [view] = cli.json("ps")
    assert view["status"]["state"] == "running"
    layers.unlink()
    assert works(fresh)
    assert fresh.pid("zygote")
    log = fresh.log.read_text()
    assert "FileExistsError" in log, "and the log says why"
    cli.ok("stop", "-t", "0", "before")
    assert cli.ok("wait", "before") == "137"


def test_a_monitor_that_fails_to_start_for_a_while(fresh: Daemon) -> None:
    cli, lock = fresh.cli, fresh.run / "keeper.lock"
    cli.ok("run", "-d", "--name", "before", "busybox", "sh", "-c", "until [ -e /go ]; do sleep 0.05; done; echo late")
    lock.unlink()
    lock.mkdir()
    failed = fails(fresh, MONITOR)
    fresh.kill("monitor")
    until(failed, "the next ones can't start")
    until(lambda: any("monitor" in problem for problem in cli.json("status")["problems"]), "that is told")
    lock.rmdir()
    assert works(fresh)
    cli.run("exec", "before", "touch", "/go")  # PID 1 may take it along when it ends
    assert cli.ok("wait", "before") == "0"
    assert cli.ok("logs", "before") == "late"
    until(lambda: not any("monitor" in problem for problem in cli.json("status")["problems"]), "it is solved")


def test_insulad_answers_without_monitor_and_zygote(fresh: Daemon) -> None:
    """Both are dead and neither starts: what needs them waits, and the rest is served."""
    cli, lock = fresh.cli, fresh.run / "keeper.lock"
    cli.ok("run", "-d", "--name", "before", "busybox", "sleep", "600")
    for name in ("insulad", "monitor", "zygote"):
        fresh.kill(name)
    lock.unlink()
    lock.mkdir()
    fresh.launch()
    fresh.wait_until_it_answers()
    until(lambda: any("monitor" in problem for problem in cli.json("status")["problems"]), "the trouble is told")
    assert [view["instance"]["name"] for view in cli.json("ps")] == ["before"]
    cli.ok("network", "create", "more", "--subnet", "10.9.0.0/24")
    lock.rmdir()
    assert works(fresh)
    fresh.wait_until_it_is_reconciled()
    assert cli.ok("exec", "before", "echo", "here") == "here"


def test_a_damaged_spare_is_no_end_of_the_zygote(fresh: Daemon) -> None:
    """Each start of a zygote reads the remains of the previous one."""
    spares = fresh.run / "spares"
    os.mkfifo(spares / "fifo")
    (spares / "directory").mkdir()
    (spares / "garbage").write_bytes(b"\0\xff")
    (spares / "root").write_text(fresh.prefix)  # a group that is no spare's is not removed
    fresh.cli.ok("run", "-d", "--name", "before", "busybox", "sleep", "600")
    fresh.kill("zygote")
    assert works(fresh)
    assert fresh.cli.ok("exec", "before", "echo", "here") == "here"
