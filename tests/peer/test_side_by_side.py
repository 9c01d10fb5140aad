"""Small behaviours that callers notice, compared between insula-oci, runc and crun."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from insula.kernel.cgroups import Cgroup
from tests.support.runtimes import NAME, Runtime
from tests.support.wait import until

SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
NET_ADMIN = 1 << 12


@pytest.mark.parametrize(("uid", "with_it"), [(0, {"CapPrm", "CapEff", "CapBnd"}), (1000, {"CapBnd"})])
def test_a_capability_that_exec_adds_is_not_inherited(oci: Runtime, uid: int, with_it: set[str]) -> None:
    """Inheritable, it would outlive a change of user (CVE-2022-29162)."""
    oci.process["capabilities"] = {}
    oci.start()
    words = ("--user", f"{uid}:{uid}", "--cap", "CAP_NET_ADMIN", NAME, "grep", "^Cap", "/proc/self/status")
    lines = oci.do("exec", *words).ok().splitlines()
    found = {name.rstrip(":"): int(mask, 16) for name, mask in (line.split() for line in lines)}
    if oci.name == "crun" and uid:
        with_it = with_it | {"CapPrm", "CapEff", "CapInh", "CapAmb"} if found["CapInh"] else with_it  # before 1.9
    assert {name for name in SETS if found[name]} == with_it and set(found.values()) == {0, NET_ADMIN}


def test_signal_0_tests_whether_it_runs(oci: Runtime) -> None:
    oci.start("sleep 600 & wait")
    oci.do("kill", NAME, "0").ok()
    assert oci.do("exec", NAME, "true").status == 0
    oci.do("kill", NAME, "KILL").ok()


def test_kill_reaches_those_whose_first_process_has_ended(oci: Runtime) -> None:
    """Without a PID namespace of its own nothing ends with a container's first process."""
    oci.linux["namespaces"] = [entry for entry in oci.linux["namespaces"] if entry["type"] != "pid"]
    oci.start("sleep 601 & sleep 602 & exec sleep 603")
    group = Cgroup(oci.group)
    until(lambda: len(group.processes()) == 3, "all run")
    first = json.loads(oci.do("state", NAME).ok())["pid"]
    os.kill(first, signal.SIGKILL)
    until(lambda: len(group.processes()) == 2, "the first has ended")
    result = oci.do("kill", NAME, "KILL")
    if oci.name == "insula-oci":
        assert result.status == 0, result
        until(lambda: group.processes() == [], "the others have ended")


def test_a_namespace_without_path_may_say_so(oci: Runtime) -> None:
    if oci.name == "crun":
        pytest.skip("crun takes the empty path for a file's")
    oci.linux["namespaces"] = [{**entry, "path": ""} for entry in oci.linux["namespaces"]]
    assert oci.out("echo $$") == "1\n"


def test_a_frozen_group_is_refused(oci: Runtime) -> None:
    """A process that joins it would be frozen, and its callers would wait."""
    if oci.name == "crun":
        pytest.skip("crun waits for ever")
    group = Cgroup(oci.group)
    group.create()
    group.freeze()
    try:
        result = oci.run("true")
        assert result.status == 1 and "cgroup unexpectedly frozen" in result.err, result
        if oci.name == "runc":
            return  # below a frozen group it waits for ever
        oci.linux["cgroupsPath"] = f"/{oci.group}/below"
        assert "cgroup unexpectedly frozen" in oci.run("true").err
        group.thaw()
        oci.out("true")  # the groups may be there; only frozen ones are refused
    finally:
        group.thaw()
        group.remove()


def test_time_for_real_time_scheduling(oci: Runtime) -> None:
    """Version 1: a new group has none, so those above must have it, wherever a container comes to be by itself."""
    if not Path("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").exists():
        pytest.skip("this kernel has no CONFIG_RT_GROUP_SCHED, or cgroup v2")
    if oci.name != "insula-oci":
        oci.linux["cgroupsPath"] = f"/{oci.group.replace('/', '-')}"  # runc and crun don't care for groups above
    oci.linux["resources"]["cpu"] = {"realtimeRuntime": 1000, "realtimePeriod": 100000}
    oci.start()
    path = Path("/sys/fs/cgroup/cpu", oci.linux["cgroupsPath"].lstrip("/"))
    assert (path / "cpu.rt_runtime_us").read_text() == "1000\n"
    assert (path / "cpu.rt_period_us").read_text() == "100000\n"
