"""Pause: no process runs, nothing is lost, and the meaning of other verbs then. As docker-pause(1)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import cgroups
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until
from tests.system.conftest import TenantFactory

COUNT = "trap 'echo done; exit 3' TERM; i=0; while :; do i=$((i+1)); echo $i > /count; usleep 1000; done"


def state(cli: Cli, name: str = "web") -> str:
    [view] = cli.json("inspect", name)
    found: str = view["status"]["state"]
    return found


def count(cli: Cli, name: str = "web") -> int:
    """How far it has counted; read without running anything inside."""
    pid = cli.json("inspect", name)[0]["status"]["pid"]
    text = Path(f"/proc/{pid}/root/count").read_text()
    return int(text or 0)


def goes_on(cli: Cli, name: str = "web") -> None:
    before = count(cli, name)
    until(lambda: count(cli, name) > before, "it counts")


@pytest.fixture
def web(cli: Cli) -> Iterator[Cli]:
    """An instance `web` that counts."""
    cli.ok("run", "-d", "--name", "web", "busybox", "sh", "-c", COUNT)
    until_it_counts(cli)
    yield cli


def until_it_counts(cli: Cli) -> None:
    def begun() -> bool:
        try:
            return count(cli) > 0
        except FileNotFoundError:
            return False

    until(begun, "it has begun to count")


def stands_still(cli: Cli, name: str = "web") -> None:
    """Not one turn in a time that is enough for a hundred."""
    before = count(cli, name)
    time.sleep(0.1)
    assert count(cli, name) == before


def test_pause_stops_it_and_unpause_resumes_it(web: Cli) -> None:
    assert web.ok("pause", "web") == "web"
    assert state(web) == "paused"
    assert "paused" in web.ok("ps")
    stands_still(web)
    pid = web.json("inspect", "web")[0]["status"]["pid"]
    assert web.ok("unpause", "web") == "web"
    assert state(web) == "running"
    goes_on(web)
    assert web.json("inspect", "web")[0]["status"]["pid"] == pid, "the same process"


def test_resume_is_an_alias_of_unpause(web: Cli) -> None:
    web.ok("pause", "web")
    assert web.ok("resume", "web") == "web"
    goes_on(web)


def test_pausing_in_the_wrong_state_is_an_error(web: Cli) -> None:
    assert "not paused" in web.fails("unpause", "web")
    web.ok("pause", "web")
    assert "paused already" in web.fails("pause", "web")
    web.ok("kill", "web")
    web.ok("wait", "web")
    assert "not running" in web.fails("pause", "web")
    assert "not paused" in web.fails("unpause", "web")
    web.fails("pause", "nobody")


def test_exec_attach_and_start_are_refused_while_paused(web: Cli) -> None:
    web.ok("pause", "web")
    for words, status in ((("exec", "web", "true"), 125), (("attach", "web"), 1), (("start", "web"), 1)):
        assert "web is paused" in web.fails(*words, status=status)
    web.ok("unpause", "web")
    web.ok("exec", "web", "true")


def test_a_running_exec_waits_and_others_are_served(web: Cli) -> None:
    web.ok("run", "-d", "--name", "near", "busybox", "sleep", "600")
    command = web.start("exec", "web", "sh", "-c", "until [ -e /go ]; do usleep 1000; done; echo went")
    try:
        until(lambda: any("until" in process["command"] for process in web.json("top", "web")), "it runs")
        web.ok("pause", "web")
        assert web.ok("exec", "near", "echo", "well") == "well"
        assert web.ok("run", "--rm", "busybox", "echo", "new") == "new"
        web.ok("unpause", "web")
        web.ok("exec", "web", "touch", "/go")
        assert command.communicate(timeout=patiently(20)) == ("went\n", "")
    finally:
        command.kill()
        command.wait()


def test_files_can_be_copied(web: Cli, tmp_path: Path) -> None:
    web.ok("pause", "web")
    web.ok("cp", "web:/count", tmp_path / "count")
    assert int((tmp_path / "count").read_text() or 0) == count(web), "as it was when it was frozen"
    (tmp_path / "note").write_text("for later")
    web.ok("cp", tmp_path / "note", "web:/note")
    web.ok("unpause", "web")
    assert web.ok("exec", "web", "cat", "/note") == "for later"


def test_a_paused_instance_can_be_inspected(web: Cli) -> None:
    web.ok("pause", "web")
    assert any("sh" in process["command"] for process in web.json("top", "web"))
    assert "paused" in web.ok("explain", "web")
    web.ok("update", "web", "--pids", "77")
    assert state(web) == "paused"


def test_stop_resumes_it(web: Cli) -> None:
    web.ok("pause", "web")
    web.ok("stop", "web")
    [view] = web.json("inspect", "web")
    assert (view["status"]["state"], view["status"]["exit"]["exit_status"]) == ("exited", 3), "its own handler ran"
    assert web.ok("logs", "web") == "done"


@pytest.mark.parametrize(("signal", "status"), [("KILL", "137"), ("TERM", "3")])
def test_a_fatal_signal_resumes_it(web: Cli, signal: str, status: str) -> None:
    web.ok("pause", "web")
    web.ok("kill", "-s", signal, "web")
    assert web.ok("wait", "web") == status


def test_other_signals_wait_until_unpause(cli: Cli) -> None:
    script = "trap 'echo hup' HUP; echo ready; while :; do usleep 1000; done"
    cli.ok("run", "-d", "--name", "web", "busybox", "sh", "-c", script)
    until(lambda: cli.ok("logs", "web") == "ready", "it is ready")
    cli.ok("pause", "web")
    cli.ok("kill", "-s", "HUP", "web")
    assert (state(cli), cli.ok("logs", "web")) == ("paused", "ready")
    cli.ok("unpause", "web")
    until(lambda: cli.ok("logs", "web") == "ready\nhup", "the signal is taken")


def test_rm(web: Cli) -> None:
    web.ok("pause", "web")
    assert "is paused" in web.fails("rm", "web")
    web.ok("rm", "-f", "web")
    assert web.json("ps", "-a") == []


def test_restart(web: Cli) -> None:
    web.ok("pause", "web")
    web.ok("restart", "web")
    assert state(web) == "running"
    until_it_counts(web)


def test_the_restart_policy_ignores_a_pause(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "--restart", "always", "busybox", "sh", "-c", COUNT)
    until_it_counts(cli)
    cli.ok("pause", "web")
    assert cli.json("inspect", "web")[0]["status"]["restarts"] == 0
    cli.ok("kill", "web")

    def again() -> bool:
        status = cli.json("inspect", "web")[0]["status"]
        return bool(status["state"] == "running" and status["restarts"] == 1)

    until(again, "it runs again, and is not paused")


def test_an_instance_with_many_processes(cli: Cli) -> None:
    script = "for i in $(seq 12); do (while :; do usleep 500; done) & done; echo ready; wait"
    cli.ok("run", "-d", "--name", "web", "busybox", "sh", "-c", script)
    until(lambda: cli.ok("logs", "web") == "ready", "it is ready")
    for _ in range(3):
        cli.ok("pause", "web")
        cli.ok("unpause", "web")
    cli.ok("exec", "web", "true")


def test_pause_and_unpause_are_events(web: Cli, daemon: Daemon) -> None:
    revision = web.json("status")["revision"]
    web.ok("pause", "web")
    web.ok("update", "web", "--pids", "99")
    web.ok("unpause", "web")
    wanted = ["paused", "update", "unpaused"]
    events = web.start("events", "--from-revision", str(revision))
    patience = threading.Timer(patiently(20), events.kill)
    patience.start()
    try:
        assert events.stdout is not None
        seen: list[str] = []
        for line in events.stdout:
            if f"{web.tenant}/web" in line:
                seen.append(line.split()[2])
            if len(seen) >= len(wanted):
                break
        assert seen == wanted
    finally:
        patience.cancel()
        events.kill()
        events.communicate()


def test_a_neighbour_is_not_affected(web: Cli, tenants: TenantFactory) -> None:
    web.ok("run", "-d", "--name", "near", "busybox", "sh", "-c", COUNT)
    web.ok("pause", "web")
    other = tenants()
    other.ok("run", "-d", "--name", "web", "busybox", "sh", "-c", COUNT)
    until_it_counts(other)
    goes_on(other)
    assert web.ok("exec", "near", "echo", "well") == "well"


# -- the daemon comes and goes ---------------------------------------------------------------------------------------


def test_the_next_daemon_reads_the_paused_state_from_the_kernel(fresh: Daemon) -> None:
    cli = fresh.cli
    for name in ("web", "other", "doomed"):
        cli.ok("run", "-d", "--name", name, "busybox", "sh", "-c", COUNT)
    until_it_counts(cli)
    cli.ok("pause", "web", "doomed")
    for kill in (True, False):
        if kill:
            for process in ("insulad", "monitor", "zygote"):
                fresh.kill(process)
        else:
            fresh.stop()
        fresh.start()
        assert (state(cli), state(cli, "other")) == ("paused", "running")
        stands_still(cli)
    cli.ok("rm", "-f", "doomed")
    cli.ok("unpause", "web")
    goes_on(cli)


def test_down_ends_paused_instances(fresh: Daemon) -> None:
    fresh.cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    fresh.cli.ok("pause", "web")
    assert fresh.snapshot().cgroups
    fresh.down()
    assert not fresh.snapshot().cgroups


def test_an_instance_frozen_in_a_foreign_group_is_reported_and_ends_when_thawed(fresh: Daemon) -> None:
    """Version 1: SIGKILL waits for the thaw of whatever group a process was moved into."""
    freezer = cgroups.hierarchy().controllers.get("freezer")
    if freezer is None:
        pytest.skip("with cgroup version 2 what is frozen dies of SIGKILL")
    cli, foreign = fresh.cli, Path(freezer, f"{fresh.prefix}-foreign")
    for name in ("web", "usual"):
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
    pid = cli.json("inspect", "web")[0]["status"]["pid"]
    foreign.mkdir()
    try:
        (foreign / "cgroup.procs").write_text(str(pid))
        (foreign / "freezer.state").write_text("FROZEN")
        refused = cli.run("rm", "-f", "web")
        assert refused.status and f"process {pid} of instance web does not die" in refused.err
        assert f"frozen group {foreign.name}; hint: thaw" in refused.err
        cli.ok("rm", "-f", "usual")
        assert [view["instance"]["name"] for view in cli.json("ps", "-a")] == ["web"], "it can't be removed yet"
        (foreign / "freezer.state").write_text("THAWED")
        until(lambda: cli.json("ps", "-a") == [], "it is removed as soon as it can die")
    finally:
        (foreign / "freezer.state").write_text("THAWED")
        until(lambda: not (foreign / "cgroup.procs").read_text(), "nobody is in it")
        foreign.rmdir()
    until(lambda: os.listdir(fresh.root / "instances") == [], "with its files")
