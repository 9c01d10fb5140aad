"""Attributes of `process` in a config, in a container of insula-oci: by run, create and start, and exec."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from insula.kernel import syscall_numbers
from tests.support.agent import ANSWER, agent
from tests.support.wait import until
from tests.system.oci.conftest import NAME, Box

ROOT = 70_000  # who is root inside, where there is a user namespace


def status(text: str, name: str) -> str:
    found = re.search(rf"^{name}:[ \t]*(.*)$", text, re.MULTILINE)
    assert found, name
    return found[1].strip()


@pytest.mark.parametrize("user_namespace", [False, True])
def test_scheduling_is_given_inside_and_outside_of_a_user_namespace(box: Box, user_namespace: bool) -> None:
    """Going first takes a right of the host, which nobody in a user namespace has: the runtime gives it from outside.

    Real-time policies are the same, but a kernel with CONFIG_RT_GROUP_SCHED has them where the control group may.
    """
    if user_namespace:
        box.map_ids((0, ROOT, 65536))
    box.process |= {
        "scheduler": {"policy": "SCHED_BATCH", "nice": -5},
        "ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 3},
        "oomScoreAdj": 123,
        "user": {"uid": 5, "gid": 6, "additionalGids": [7, 8], "umask": 0o077},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}],
    }
    pid = box.start("umask; ulimit -n; cat /proc/self/status /proc/self/oom_score_adj; exec sleep 600")
    until(lambda: box.output.endswith("\n123\n"), "it printed")
    assert box.output.split()[:2] == ["0077", "77"]
    assert status(box.output, "Uid").split()[0] == "5"
    assert status(box.output, "Gid").split()[0] == "6"
    assert status(box.output, "Groups") == "7 8"
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, pid) == -5
    assert os.popen(f"ionice -p {pid}").read() == "realtime: prio 3\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="uname(2) says i686 on x86-64 only")
def test_personality_is_of_all_its_processes(box: Box) -> None:
    box.linux["personality"] = {"domain": "LINUX32"}
    box.start()
    assert box.oci.ok("exec", NAME, "uname", "-m") == "i686\n"


def test_an_unknown_capability_is_a_warning(box: Box) -> None:
    names = ["CAP_KILL", "CAP_FLY"]
    box.process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), names)
    log = box.path / "log"
    box.script("grep CapPrm /proc/self/status")
    command = ["--log", log, "--log-format", "json", "run", "--bundle", box.path, NAME]
    done = box.oci.run(*command)
    assert done.status == 0
    assert int(status(done.out, "CapPrm"), 16) == 1 << 5
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert {entry["level"] for entry in told} == {"warning"}
    assert all("CAP_FLY" in entry["msg"] for entry in told)


def test_a_capability_that_the_runtime_lacks_is_a_warning(box: Box) -> None:
    names = ["CAP_KILL", "CAP_SYS_TIME"]
    box.process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), names)
    script = "grep CapPrm /proc/self/status"
    full = box.run(script)
    assert (status(full.out, "CapPrm"), full.err) == (f"{1 << 5 | 1 << 25:016x}", "")  # the control
    box.oci.ok("delete", "--force", NAME)
    box.oci.program = ["setpriv", "--bounding-set", "-sys_time", *box.oci.program]
    less = box.run(script)
    assert status(less.out, "CapPrm") == f"{1 << 5:016x}"
    assert "capabilities that cannot be granted: CAP_SYS_TIME" in less.err
    box.oci.ok("delete", "--force", NAME)
    box.start()
    joined = box.oci.run("exec", NAME, "sh", "-c", script)
    assert (joined.status, status(joined.out, "CapPrm")) == (0, f"{1 << 5:016x}")
    assert "capabilities that cannot be granted: CAP_SYS_TIME" in joined.err


def test_the_affinity_of_the_caller_is_not_the_containers(box: Box) -> None:
    """An engine that is pinned to a processor does not pin its containers: their control group says where they run."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this host has one processor for the tests")
    words = ["grep", "Cpus_allowed_list", "/proc/self/status"]
    free = box.out(" ".join(words))
    box.oci.program = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *box.oci.program]
    assert box.out(" ".join(words)) == free
    box.start()
    assert box.oci.ok("exec", NAME, *words) == free


def test_a_control_group_below_the_containers(box: Box) -> None:
    box.start()
    first, *_ = sorted(set(box.group.directories().values()))
    os.mkdir(f"{first}/worker")
    groups = box.oci.ok("exec", "--cgroup", "/worker", NAME, "cat", "/proc/self/cgroup")
    assert sum(line.endswith("/worker") for line in groups.splitlines()) == 1
    controller = next(name for name, directory in box.group.directories().items() if directory == first)
    if controller:
        only = box.oci.ok("exec", "--cgroup", f"{controller}:worker", NAME, "cat", "/proc/self/cgroup")
        assert only == groups
        assert "worker: No such file" in box.oci.fails("exec", "--cgroup", "pids,freezer:worker", NAME, "true")
        assert "unknown controller odd" in box.oci.fails("exec", "--cgroup", "odd:worker", NAME, "true")
    refusal = box.oci.fails("exec", "--cgroup", "/nosuch", NAME, "true")
    assert "error adding pid to cgroups: nosuch: No such file" in refusal
    for path in ("a/../..", "a/..", "./a/../a", "../outside"):
        refusal = box.oci.fails("exec", "--cgroup", path, NAME, "true")
        assert f"'{path}': bad sub cgroup path: `..` components are not allowed" in refusal


def test_the_affinity_of_exec(box: Box, tmp_path: Path) -> None:
    box.start()
    last = str(max(os.sched_getaffinity(0)))
    process: dict[str, Any] = {
        "args": ["grep", "Cpus_allowed_list", "/proc/self/status"],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "execCPUAffinity": {"initial": "0", "final": last},
    }
    (tmp_path / "process.json").write_text(json.dumps(process))
    assert box.oci.ok("exec", "--process", tmp_path / "process.json", NAME).split()[1] == last
    everything = box.oci.ok("exec", NAME, "grep", "Cpus_allowed_list", "/proc/self/status").split()[1]
    process["execCPUAffinity"] = {"initial": "0"}
    (tmp_path / "process.json").write_text(json.dumps(process))
    assert box.oci.ok("exec", "--process", tmp_path / "process.json", NAME).split()[1] == everything


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("verb", ["run", "start", "exec"])
def test_an_agent_of_the_host_decides_about_a_call(box: Box, tmp_path: Path, verb: str, restricted: bool) -> None:
    """SCMP_ACT_NOTIFY: the listener leaves the container, whichever command it is that lets a process go."""
    names = ["mkdir", "mkdirat"]
    path = tmp_path / "agent.sock"
    box.process["noNewPrivileges"] = restricted
    box.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": str(path),
        "listenerMetadata": "for the test",
        "syscalls": [{"names": names, "action": "SCMP_ACT_NOTIFY"}],
    }
    made = "mkdir /tmp/made"
    if verb == "exec":
        # the first process has a listener too, and an agent of its own
        with agent(path):
            box.start("mkdir /tmp/first; exec sleep 600")
            until(lambda: os.strerror(ANSWER) in box.output, "the first is answered")
        path.unlink()
    with agent(path) as listening:
        if verb == "run":
            said = box.run(made).err
        elif verb == "start":
            box.start(made)
            until(lambda: "\n" in box.output, "it said something")
            said = box.output
        else:
            said = box.oci.run("exec", NAME, "sh", "-c", made).err
    assert os.strerror(ANSWER) in said
    assert not (box.rootfs / "tmp/made").exists()
    assert set(listening.asked) <= {
        way.value for n in names for way in syscall_numbers.numbers(n, syscall_numbers.native())
    }
    received = listening.received
    assert (received["fds"], received["metadata"]) == (["seccompFd"], "for the test")
    assert (received["state"]["id"], received["state"]["bundle"]) == (NAME, str(box.path))
    assert received["pid"] > 1
    assert (received["pid"] == received["state"]["pid"]) == (verb != "exec")


def test_an_agent_without_notifications_gets_the_listener(box: Box, tmp_path: Path) -> None:
    """`listenerPath` without a rule that notifies, as crun has it: an agent may watch, or wait for another filter."""
    path = tmp_path / "agent.sock"
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": str(path), "listenerMetadata": "for the test"}
    box.linux["seccomp"] = seccomp
    with agent(path) as listening:
        assert box.out("mkdir /tmp/made") == ""
    received = listening.received
    assert (received["fds"], received["metadata"], received["state"]["id"]) == (["seccompFd"], "for the test", NAME)
    assert listening.asked == []
    assert (box.rootfs / "tmp/made").exists()


def test_without_an_agent_nothing_starts(box: Box, tmp_path: Path) -> None:
    box.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": str(tmp_path / "nobody.sock"),
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
    }
    assert "listenerPath" in box.refused()


# -- between create and start ------------------------------------------------------------------------------------------

RIGHTS = ("Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:", "Seccomp:")


def rights(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: line.split(":")[1].strip() for line in lines if line.startswith(RIGHTS)}


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("user", [0, 1000])
def test_a_created_process_has_no_more_rights_than_its_program(box: Box, user: int, restricted: bool) -> None:
    """It lacks the filter, and without no_new_privs it has CAP_SYS_ADMIN to load it. Nothing of the host is open."""
    few = ["CAP_CHOWN", "CAP_KILL"]
    box.process |= {
        "user": {"uid": user, "gid": 1001, "additionalGids": [1002]},
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), few),
        "noNewPrivileges": restricted,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 3, "hard": 3}],
    }
    rule = {"names": ["accept4", "accept", "sethostname"], "action": "SCMP_ACT_KILL_PROCESS"}
    box.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    (box.rootfs / "tmp").chmod(0o1777)
    box.create("exec sleep 600")
    pid = box.oci.json("state", NAME)["pid"]
    waiting = rights(pid)
    opened = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    box.oci.ok("start", NAME)
    running = rights(pid)
    assert running["Seccomp"] == "2" and running["CapBnd"] == "0000000000000021", "the control"
    differing = {name for name in running if running[name] != waiting[name]} - {"CapPrm", "CapEff"}
    assert differing == {"Seccomp"}
    held = 1 << 0 | 1 << 5 | (0 if restricted else 1 << 21)  # execve(2) takes those of an ordinary user
    assert {int(waiting[name], 16) for name in ("CapPrm", "CapEff")} == {held}
    assert [link for fd, link in opened.items() if fd > 2 and not link.startswith("socket:")] == []
    assert len([fd for fd in opened if fd > 2]) == 1, "where it hears of the start"


def test_limits_that_would_prevent_the_start_hold_for_the_program(box: Box) -> None:
    box.process["rlimits"] = [{"type": f"RLIMIT_{kind}", "soft": 3, "hard": 4} for kind in ("NOFILE", "NPROC")]
    box.start("ulimit -n; ulimit -Hn; exec sleep 600")
    until(lambda: box.output.split() == ["3", "4"], "it has told")
