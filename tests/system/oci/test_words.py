"""Lines that callers of runc look for: steps with --debug, and the words of errors and warnings."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import pytest

from insula.kernel import cgroups
from tests.system.oci.conftest import NAME, Box

STEPS = ["nsexec container setup", "child process in init()"]
CREATED = [*STEPS, "init: closing the pipe to signal completion"]
JOINED = [*STEPS, "setns_init: about to exec"]


def told(lines: str, wanted: list[str]) -> None:
    """Every one of `wanted` is in a line of its own, in their order."""
    debug = [line for line in lines.splitlines() if "level=debug" in line]
    found = [next((words for words in wanted if words in line), None) for line in debug]
    assert [words for words in found if words] == wanted, lines


def test_steps_are_logged_with_debug_only(box: Box) -> None:
    """runc(8): --debug, or --log-level debug. Without a --log they go to standard error."""
    box.script("echo ran")
    options: list[tuple[str, ...]] = [("--debug",), ("--log-level", "debug"), ()]
    quiet: list[bool] = []
    for some in options:
        result = box.oci.run(*some, "run", "--bundle", box.path, NAME)
        assert (result.status, result.out) == (0, "ran\n"), result
        quiet.append(result.err == "")
        if some:
            told(result.err, CREATED)
    assert quiet == [False, False, True]


def test_steps_in_the_log(box: Box, tmp_path: Path) -> None:
    log = tmp_path / "log"
    box.start()
    result = box.oci.run("--debug", "--log", log, "--log-format", "json", "exec", NAME, "echo", "joined")
    assert (result.status, result.out, result.err) == (0, "joined\n", "")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {entry["level"] for entry in entries} == {"debug"}
    told("\n".join(f"level=debug {entry['msg']}" for entry in entries), JOINED)


def test_the_initial_affinity_of_exec_is_logged(box: Box) -> None:
    """`execCPUAffinity.initial` holds before the program does: only this line shows it."""
    first = min(os.sched_getaffinity(0))
    box.process["execCPUAffinity"] = {"initial": str(first)}
    box.start()
    assert f"]: affinity: {1 << first:#x}" in box.oci.run("--debug", "exec", NAME, "true").err
    assert "affinity" not in box.oci.run("exec", NAME, "true").err


def test_flags_of_the_seccomp_filter_are_logged(box: Box) -> None:
    """seccomp(2): LOG is 2, SPEC_ALLOW 4."""
    box.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    box.script("true")
    for names, number in (([], 0), (["LOG"], 2), (["LOG", "SPEC_ALLOW"], 6)):
        box.linux["seccomp"]["flags"] = [f"SECCOMP_FILTER_FLAG_{name}" for name in names]
        box.write(box.config)
        assert f'msg="seccomp filter flags: {number}"' in box.oci.run("--debug", "run", "-b", box.path, NAME).err


def test_an_ambient_capability_that_is_not_inheritable_is_a_warning(box: Box) -> None:
    """capabilities(7): what is ambient is permitted and inheritable, too."""
    sets = {key: ["CAP_KILL", "CAP_CHOWN"] for key in ("bounding", "effective", "permitted")}
    box.process["capabilities"] = {**sets, "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL", "CAP_CHOWN"]}
    result = box.run("grep CapAmb /proc/self/status")
    assert result.out.split() == ["CapAmb:", f"{1 << 5:016x}"]
    words = "can't raise ambient capability CAP_CHOWN: it must be permitted and inheritable, too"
    assert result.err == f"warning: {words}\n"


def test_a_missing_seccomp_agent(box: Box) -> None:
    rule = {"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}
    profile: dict[str, Any] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    box.linux["seccomp"] = {**profile, "listenerPath": str(box.path / "nobody.sock")}
    assert "failed to connect with seccomp agent: No such file or directory" in box.refused()
    rule["names"] = ["write"]
    assert "SCMP_ACT_NOTIFY cannot be used for the write syscall" in box.refused()


def test_a_hook_that_the_filter_kills(box: Box) -> None:
    """The signal has its name: 31 is SIGSYS."""
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL"}
    box.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    hook = {"path": "/bin/mkdir", "args": ["mkdir", "/tmp/hook"]}
    box.config["hooks"] = {"startContainer": [hook]}
    where = "hooks.startContainer[0]: error running startContainer hook #0: /bin/mkdir"
    assert f"{where}: startContainer hook failed with signal 31 (bad system call)" in box.refused()


def test_a_deadline_on_some_processors(box: Box) -> None:
    """sched_setattr(2): EPERM unless a thread may run on all processors."""
    tree = cgroups.hierarchy()
    if len(os.sched_getaffinity(0)) < 2 or not (tree.unified or "cpuset" in tree.controllers):
        pytest.skip("this host has one processor for the tests, or no cpuset")
    times = {"runtime": 42_000, "deadline": 1_000_000, "period": 1_000_000}
    box.process["scheduler"] = {"policy": "SCHED_DEADLINE", **times}
    box.linux["resources"]["cpu"] = {"cpus": str(min(os.sched_getaffinity(0)))}
    assert "process scheduler can't be used together with AllowedCPUs" in box.refused()


def test_control_groups_below_by_several_options(box: Box) -> None:
    """runc-exec(8): --cgroup may be given once for some controllers, and once for others."""
    if cgroups.hierarchy().unified:
        pytest.skip("control groups of version 2 are one tree: --cgroup is given once")
    box.start()
    directories = box.group.directories()
    for controller in ("memory", "pids"):
        os.mkdir(f"{directories[controller]}/{controller}-worker")
    options = [f"--cgroup={controller}:{controller}-worker" for controller in ("memory", "pids")]
    found = box.oci.ok("exec", *options, NAME, "cat", "/proc/self/cgroup").splitlines()
    by_controller = {line.split(":")[1]: line.split(":")[2].rsplit("/")[-1] for line in found}
    assert by_controller["memory"] == "memory-worker" and by_controller["pids"] == "pids-worker"
    assert not any(path.endswith("worker") for name, path in by_controller.items() if name not in ("memory", "pids"))


def test_beside_version_1_there_is_a_group_of_version_2(box: Box) -> None:
    """The version 2 tree of a hybrid host (cgroups(7)): programs that search it find the container, also processes of
    exec."""
    top = cgroups.hierarchy().beside
    if top is None:
        pytest.skip("this host is not hybrid")
    first = box.start()
    box.oci.ok("exec", "--detach", "--pid-file", box.path / "pid", NAME, "sleep", "600")
    joined = int((box.path / "pid").read_text())
    path = Path(top, box.group.path)
    assert [int(pid) for pid in (path / "cgroup.procs").read_text().split()] == sorted([first, joined])
    for pid in (first, joined):
        assert f"0::/{box.group.path}\n" in Path(f"/proc/{pid}/cgroup").read_text()
    box.oci.ok("delete", "--force", NAME)
    assert not path.exists()
    other = f"box-{secrets.token_hex(3)}"  # the control: nothing is made by looking
    assert cgroups.Cgroup(other).frozen_at() is None and not Path(top, other).exists()


@pytest.mark.parametrize(
    ("annotation", "name", "refused"),
    [
        (None, "no_such_call", False),
        ("0", "no_such_call", False),
        ("1", "no_such_call", True),
        ("1", "no such call", True),
        ("1", "arm_fadvise64_64", False),  # of another architecture
        ("1", "mkdir", False),
    ],
)
def test_an_unknown_system_call(box: Box, annotation: str | None, name: str, refused: bool) -> None:
    """The spec lets a filter name it; an annotation of crun doesn't."""
    rule = {"names": ["chmod", name], "action": "SCMP_ACT_ERRNO"}
    box.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    if annotation:
        box.config["annotations"] = {"run.oci.seccomp_fail_unknown_syscall": annotation}
    if refused:
        assert f"seccomp syscalls[0].names: there is no system call '{name}'" in box.refused()
    else:
        assert box.out("echo ran") == "ran\n"
