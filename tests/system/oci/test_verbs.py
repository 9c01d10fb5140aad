"""state, list, ps, kill, pause, resume, update and events on processes and control groups of this kernel."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from insula.kernel.cgroups import hierarchy
from insula.oci.state import Container
from tests.support.machine import Run
from tests.support.oci import Oci, Resident
from tests.support.wait import patiently, until

BUSY = "trap 'exit 7' USR1; trap '' TERM; sleep infinity & while :; do echo x; usleep 2000; done"
CONFIG: dict[str, Any] = {"linux": {"namespaces": [{"type": "pid"}], "resources": {"memory": {"limit": 64 << 20}}}}
VERSION = hierarchy().version

Factory = Callable[..., Resident]


@pytest.fixture
def oci(run_: Run, tmp_path: Path) -> Oci:
    return Oci(tmp_path / "root")


@pytest.fixture
def make(oci: Oci, run_: Run) -> Iterator[Factory]:
    made: list[Resident] = []

    def resident(name: str = "web", script: str = BUSY, config: dict[str, Any] = CONFIG) -> Resident:
        made.append(Resident(oci, name, f"{run_.name}oci/{name}", ["busybox", "sh", "-c", script], config))
        until(made[-1].output.stat, "it runs")
        return made[-1]

    yield resident
    for each in made:
        each.close()


@pytest.fixture
def web(make: Factory) -> Resident:
    resident = make()
    until(resident.grows, "it prints")
    return resident


# -- state, list, ps ---------------------------------------------------------------------------------------------------


def test_state_is_that_of_the_spec(oci: Oci, web: Resident) -> None:
    assert oci.json("state", "web") == {
        "ociVersion": "1.3.0",
        "id": "web",
        "status": "running",
        "pid": web.process.pid,
        "bundle": "/bundle",
        "rootfs": "/bundle/rootfs",
        "created": "2023-11-14T22:13:20.250000000Z",
        "owner": "root",
        "annotations": {"org.example.key": "value"},
    }


def test_the_status_is_read_from_the_kernel(oci: Oci, web: Resident) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as waiting:
        web.container.at_start_socket(waiting.bind)
        waiting.listen()
        assert oci.status("web") == "created"
    assert oci.status("web") == "running", "the name alone says nothing"
    web.group.freeze()
    assert oci.status("web") == "paused"
    web.group.thaw()
    web.process.kill()
    until(lambda: oci.status("web") == "stopped", "a zombie is stopped")
    assert oci.json("state", "web")["pid"] == 0
    web.process.wait()
    assert oci.status("web") == "stopped"


def test_a_pid_that_was_used_again_is_another_process(oci: Oci, web: Resident) -> None:
    web.container.save({**web.record, "start_time": web.record["start_time"] - 1})
    assert oci.status("web") == "stopped"
    assert "container not running" in oci.fails("kill", "web", "KILL")
    assert web.process.poll() is None
    web.container.save(web.record)


def test_list(oci: Oci, make: Factory) -> None:
    assert "there is no such directory" in oci.fails("list"), "a --root that was mistyped"
    oci.root.mkdir()
    assert oci.json("list", "--format", "json") == []
    make("b"), make("a")
    (oci.root / "half").mkdir()  # what a create that was killed leaves
    assert oci.ok("list", "-q") == "a\nb\n"
    assert [state["id"] for state in oci.json("list", "-f", "json")] == ["a", "b"]
    heading, first, _ = oci.ok("list").splitlines()
    assert heading.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert first.split()[::2] == ["a", "running", "2023-11-14T22:13:20.250000000Z"]


def test_ps(oci: Oci, web: Resident) -> None:
    pids = oci.json("ps", "--format", "json", "web")
    assert web.process.pid in pids and len(pids) >= 2
    lines = oci.ok("ps", "web").splitlines()
    assert "PID" in lines[0] and any(str(web.process.pid) in line for line in lines[1:])

    def same() -> bool:
        before, listed = oci.json("ps", "-f", "json", "web"), oci.ok("ps", "web").splitlines()[1:]
        return {int(line.split()[1]) for line in listed} <= {*before, *oci.json("ps", "-f", "json", "web")}

    until(same, "the same processes: some live for a moment only")
    assert str(web.process.pid) in oci.ok("ps", "web", "-o", "pid")
    assert "no column PID" in oci.fails("ps", "web", "-o", "comm")


@pytest.mark.parametrize("verb", ["state", "kill", "pause", "resume", "ps", "update --memory 64m", "events"])
def test_no_such_container(oci: Oci, verb: str) -> None:
    assert "does not exist" in oci.fails(*verb.split(), "nobody")
    assert "can't name a container" in oci.fails(*verb.split(), "../web")


def test_a_damaged_state_is_an_error_of_one_line(oci: Oci, web: Resident) -> None:
    Path(web.container.path, "state.json").write_text("{")
    assert "is damaged" in oci.fails("state", "web")


# -- kill --------------------------------------------------------------------------------------------------------------


def test_kill_sends_the_signal_that_was_asked_for(oci: Oci, web: Resident) -> None:
    oci.ok("kill", "web")  # TERM, which it ignores
    until(web.grows, "it prints still")
    oci.ok("kill", "web", "SIGUSR1")
    assert web.process.wait(patiently(10)) == 7
    assert "container not running" in oci.fails("kill", "web", "USR1")


def test_kill_goes_to_the_first_process_only(oci: Oci, web: Resident) -> None:
    oci.ok("kill", "web", "9")
    assert web.process.wait(patiently(10)) == -signal.SIGKILL
    assert web.group.processes(), "its children have lost it, and live: here there is no PID namespace to take them"
    oci.ok("kill", "--all", "web", "KILL")
    until(lambda: not web.group.processes(), "they are gone")


def test_kill_all(oci: Oci, web: Resident) -> None:
    oci.ok("kill", "--all", "web", "STOP")
    until(lambda: not web.grows(), "it stands still")
    oci.ok("kill", "--all", "web", "CONT")
    until(web.grows, "it goes on")
    oci.ok("kill", "--all", "web", "KILL")
    assert web.process.wait(patiently(10)) == -signal.SIGKILL
    until(lambda: not web.group.processes(), "all are gone")
    oci.ok("kill", "--all", "web", "KILL")  # for what may be left of a container whose first process has ended


def test_without_a_pid_namespace_of_its_own_a_kill_means_all(oci: Oci, make: Factory) -> None:
    web = make(config={"linux": {"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}})
    until(lambda: len(web.group.processes()) > 1, "it has children")
    oci.ok("kill", "web", "KILL")
    web.process.wait(patiently(10))
    until(lambda: not web.group.processes(), "all are gone")


def test_a_paused_container_can_be_killed(oci: Oci, web: Resident) -> None:
    oci.ok("pause", "web")
    oci.ok("kill", "web", "KILL")
    assert web.process.wait(patiently(10)) == -signal.SIGKILL


def test_kill_does_not_wait(oci: Oci, web: Resident) -> None:
    """A hook that hangs holds the container's lock."""
    with Container(str(oci.root), "web"):
        oci.ok("kill", "web", "KILL")
    assert web.process.wait(patiently(10)) == -signal.SIGKILL


# -- pause and resume --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(VERSION == 2, reason="with cgroup v2 what is frozen dies of SIGKILL")
def test_delete_of_a_process_in_a_frozen_group_of_others(oci: Oci, web: Resident, run_: Run) -> None:
    """There it doesn't die; other processes of that group stay frozen."""
    other = Path(hierarchy().controllers["freezer"]) / f"{run_.name}frozen"
    other.mkdir()
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        for pid in (web.process.pid, bystander.pid):
            (other / "cgroup.procs").write_text(str(pid))
        (other / "freezer.state").write_text("FROZEN")
        until(lambda: (other / "freezer.state").read_text() == "FROZEN\n", "they stand still")
        oci.ok("delete", "--force", "web")
        assert web.process.wait(patiently(10)) == -signal.SIGKILL
        assert (other / "cgroup.procs").read_text() == f"{bystander.pid}\n"
        assert (other / "freezer.state").read_text() == "FROZEN\n"
    finally:
        bystander.kill()
        (other / "freezer.state").write_text("THAWED")
        bystander.wait(patiently(10))
        until(lambda: (other / "cgroup.procs").read_text() == "", "nobody is left in it")
        other.rmdir()


def test_pause_and_resume(oci: Oci, web: Resident) -> None:
    assert "is running" in oci.fails("resume", "web")
    oci.ok("pause", "web")
    assert not web.grows()
    assert oci.status("web") == "paused"
    assert "is paused" in oci.fails("pause", "web")
    oci.ok("resume", "web")
    until(web.grows, "it goes on")
    assert oci.status("web") == "running"


def test_only_a_running_container_can_be_paused(oci: Oci, web: Resident) -> None:
    web.process.kill()
    web.process.wait()
    assert "is stopped" in oci.fails("pause", "web")
    assert "is stopped" in oci.fails("resume", "web")


# -- update ------------------------------------------------------------------------------------------------------------


def memory(web: Resident) -> int:
    return int(web.value("memory.max" if VERSION == 2 else "memory.limit_in_bytes"))


def pids(web: Resident) -> str:
    return web.value("pids.max")


def limits(web: Resident) -> Any:
    return json.loads(Path(web.container.path, "config.json").read_text())["linux"]["resources"]


def test_update_by_options(oci: Oci, web: Resident) -> None:
    assert memory(web) == 64 << 20
    oci.ok("update", "--memory", "80m", "--pids-limit", "50", "web")
    assert (memory(web), pids(web)) == (80 << 20, "50")
    oci.ok("update", "--pids-limit", "-1", "web")
    assert (memory(web), pids(web)) == (80 << 20, "max")
    assert limits(web) == {"memory": {"limit": 80 << 20}, "pids": {"limit": -1}}
    oci.ok("update", "--cpu-quota", "20000", "--cpu-period", "50000", "web")
    quota = (
        web.value("cpu.max") if VERSION == 2 else f"{web.value('cpu.cfs_quota_us')} {web.value('cpu.cfs_period_us')}"
    )
    assert quota == "20000 50000"


def test_update_by_a_file_or_the_standard_input(oci: Oci, web: Resident, tmp_path: Path) -> None:
    file = tmp_path / "resources.json"
    file.write_text('{"pids": {"limit": 40}, "memory": null}')
    oci.ok("update", "--resources", file, "web")
    assert (memory(web), pids(web)) == (64 << 20, "40")
    oci.ok("update", "--resources", "-", "web", input='{"pids": {"limit": 41}}')
    assert pids(web) == "41"


def test_zeros_of_engines_mean_no_change(oci: Oci, web: Resident) -> None:
    """dockerd sends every field, whatever was asked for."""
    sent = {
        "memory": {"limit": 0, "reservation": 0, "kernel": 0},
        "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": ""},
        "blockIO": {"weight": 0},
        "pids": {"limit": 30},
    }
    oci.ok("update", "--resources", "-", "web", input=json.dumps(sent))
    assert (memory(web), pids(web)) == (64 << 20, "30")
    assert limits(web) == {"memory": {"limit": 64 << 20}, "pids": {"limit": 30}}


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        ('{"pids": {"limit": "x"}}', "resources.pids.limit: 'x' is not a whole number"),
        ('{"pids": {"limit": 20}, "memory": {"swap": 1048576}}', "resources.memory.swap: 1048576 is below limit"),
        ("[]", "resources: an array is not an object"),
        ("{", "is no JSON"),
    ],
)
def test_a_wrong_update_changes_nothing(oci: Oci, web: Resident, sent: str, complaint: str) -> None:
    before = (memory(web), pids(web), limits(web))
    assert complaint in oci.fails("update", "--resources", "-", "web", input=sent)
    assert (memory(web), pids(web), limits(web)) == before


def test_an_update_that_fails_half_way_is_undone(oci: Oci, web: Resident) -> None:
    before = (memory(web), pids(web), limits(web))
    oci.fails("update", "--memory", "70m", "--pids-limit", "50", "--cpuset-cpus", "60000", "web")
    assert (memory(web), pids(web), limits(web)) == before


def test_nothing_to_update(oci: Oci, web: Resident) -> None:
    assert "nothing to update" in oci.fails("update", "web")
    assert "can't be read" in oci.fails("update", "--resources", "/nonexistent", "web")


# -- events ------------------------------------------------------------------------------------------------------------


def test_statistics_once(oci: Oci, web: Resident) -> None:
    event = oci.json("events", "--stats", "web")
    assert (event["type"], event["id"]) == ("stats", "web")
    data = event["data"]
    assert data["cpu"]["usage"]["total"] > 0
    assert 0 < data["memory"]["usage"]["usage"] <= data["memory"]["usage"]["limit"] == 64 << 20
    assert data["pids"]["current"] >= 2


def test_events_report_out_of_memory_and_end_with_the_container(oci: Oci, make: Factory) -> None:
    eat = "trap 'tail -c 64m /dev/zero; echo survived' USR1; while :; do usleep 2000; done"
    limits = {"memory": {"limit": 8 << 20, "swap": 8 << 20}}
    web = make(script=eat, config={"linux": {"namespaces": [{"type": "pid"}], "resources": limits}})
    watching = oci.start("events", "--interval", "1h", "web")
    try:
        assert watching.stdout
        assert json.loads(watching.stdout.readline())["type"] == "stats"  # it has begun
        oci.ok("kill", "web", "USR1")
        assert json.loads(watching.stdout.readline()) == {"type": "oom", "id": "web"}
        until(lambda: "survived" in web.output.read_text(), "its own process was not the one that was killed")
        oci.ok("kill", "web", "KILL")
        web.process.wait(patiently(10))
        assert watching.wait(patiently(10)) == 0
    finally:
        watching.kill()
        watching.wait()


def test_statistics_at_an_interval(oci: Oci, web: Resident) -> None:
    watching = oci.start("events", "--interval", "10ms", "web")
    try:
        assert watching.stdout
        totals = [json.loads(watching.stdout.readline())["data"]["cpu"]["usage"]["total"] for _ in range(5)]
        assert totals == sorted(totals) and totals[0] < totals[-1]
    finally:
        watching.kill()
        watching.wait()


def test_a_stopped_container_has_no_events(oci: Oci, web: Resident) -> None:
    web.process.kill()
    web.process.wait()
    assert "container not running" in oci.fails("events", "web")
    assert "not positive" in oci.fails("events", "--interval", "0s", "web")


# -- spec and features -------------------------------------------------------------------------------------------------


def test_spec_writes_a_valid_config(oci: Oci, tmp_path: Path) -> None:
    from insula.container.config import check

    for options in ([], ["--rootless"]):
        bundle = tmp_path / f"bundle{len(options)}"
        (bundle / "rootfs").mkdir(parents=True)
        oci.ok("spec", "--bundle", bundle, *options)
        text = (bundle / "config.json").read_text()
        assert check(json.loads(text), bundle=str(bundle))["process"]["args"] == ["sh"]
        assert "exists" in oci.fails("spec", "--bundle", bundle, *options)
        assert (bundle / "config.json").read_text() == text


def test_features_follow_the_spec(oci: Oci) -> None:
    found = oci.json("features")
    assert found["ociVersionMin"] == "1.0.0" and re.fullmatch(r"1\.3\.\d+", found["ociVersionMax"])
    assert {"rro", "idmap", "tmpcopyup", "rslave"} <= set(found["mountOptions"])
    assert len(found["hooks"]) == 6 and "time" in found["linux"]["namespaces"]
    assert not any(found["linux"]["intelRdt"].values())
    assert found["linux"]["netDevices"] == {"enabled": True}
    assert "MPOL_BIND" in found["linux"]["memoryPolicy"]["modes"]
    assert "MPOL_F_STATIC_NODES" in found["linux"]["memoryPolicy"]["flags"]
    assert "SCMP_ACT_NOTIFY" in found["linux"]["seccomp"]["actions"]
