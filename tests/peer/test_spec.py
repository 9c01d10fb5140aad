"""runtime.md and config.md of the runtime-spec, section by section: all three runtimes do what it says MUST be."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from insula.kernel.cgroups import Cgroup, hierarchy
from tests.support.runtimes import NAME, Runtime
from tests.support.wait import until


def state(oci: Runtime) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(oci.do("state", NAME).ok())
    return found


def create(oci: Runtime, script: str = "exec sleep 600") -> None:
    oci.write(script)
    oci.do("create", "--bundle", oci.path, NAME).ok()


# -- runtime.md: state, lifecycle, operations --------------------------------------------------------------------------


def test_the_life_of_a_container(oci: Runtime) -> None:
    """created, running, stopped; the program runs at start, not before; deleted, there is none of that name."""
    oci.config["annotations"] = {"org.example.key": "value"}
    create(oci, "touch /tmp/ran; exec sleep 600")
    found = state(oci)
    assert (found["id"], found["status"], found["bundle"]) == (NAME, "created", str(oci.path))
    assert found["annotations"]["org.example.key"] == "value" and found["pid"] > 0 and found["ociVersion"]
    assert not (oci.rootfs / "tmp/ran").exists()
    oci.do("start", NAME).ok()
    until((oci.rootfs / "tmp/ran").exists, "the program runs")
    assert state(oci)["status"] == "running" and state(oci)["pid"] == found["pid"]
    oci.do("kill", NAME, "KILL").ok()
    until(lambda: state(oci)["status"] == "stopped", "it has ended")
    oci.do("delete", NAME).ok()
    assert oci.do("state", NAME).status != 0


def test_operations_at_the_wrong_time_are_errors_and_change_nothing(oci: Runtime) -> None:
    for verb in ("start", "kill", "delete", "state"):
        assert oci.do(verb, NAME).status != 0, verb
    create(oci)
    assert oci.do("create", "--bundle", oci.path, NAME).status != 0, "the ID is taken"
    assert state(oci)["status"] == "created"
    oci.do("start", NAME).ok()
    pid = state(oci)["pid"]
    assert oci.do("start", NAME).status != 0
    assert oci.do("delete", NAME).status != 0
    assert (state(oci)["status"], state(oci)["pid"]) == ("running", pid)
    oci.do("kill", NAME, "KILL").ok()
    until(lambda: state(oci)["status"] == "stopped", "it has ended")
    assert oci.do("kill", NAME, "TERM").status != 0
    assert oci.do("start", NAME).status != 0


def test_the_config_at_create_is_the_one_that_applies(oci: Runtime) -> None:
    """Changes of config.json after create have no effect."""
    create(oci, "echo first > /tmp/said; exec sleep 600")
    oci.write("echo second > /tmp/said; exec sleep 600")
    oci.do("start", NAME).ok()
    until(lambda: (oci.rootfs / "tmp/said").read_text(), "the program runs")
    assert (oci.rootfs / "tmp/said").read_text() == "first\n"


def test_kill_sends_the_signal_that_is_named(oci: Runtime) -> None:
    oci.start("trap 'touch /tmp/hup' HUP; touch /tmp/ready; while :; do sleep 0.05; done")
    until((oci.rootfs / "tmp/ready").exists, "the trap is set")
    oci.do("kill", NAME, str(int(signal.SIGHUP))).ok()
    until((oci.rootfs / "tmp/hup").exists, "it came")
    assert state(oci)["status"] == "running"


# -- config.md: process, hostname, hooks -------------------------------------------------------------------------------


def test_the_process(oci: Runtime) -> None:
    oci.process |= {
        "user": {"uid": 1000, "gid": 1001, "umask": 0o27, "additionalGids": [7, 8]},
        "cwd": "/tmp",
        "env": ["PATH=/bin", "A=b=c d"],
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 55, "hard": 66}],
        "oomScoreAdj": 500,
    }
    oci.config["hostname"] = "inner"
    script = 'id -u; id -g; id -G; umask; pwd; echo "$A"; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; hostname'
    said = oci.out(script).split("\n")
    groups = {int(gid) for gid in said.pop(2).split()}
    assert groups == {1001, 7, 8}
    assert said == ["1000", "1001", "0027", "/tmp", "b=c d", "55", "66", "500", "inner", ""]


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer", "startContainer"])
def test_a_failed_hook_ends_the_container(oci: Runtime, kind: str) -> None:
    oci.config["hooks"] = {
        kind: [{"path": "/bin/false"}],
        "poststop": [{"path": "/bin/touch", "args": ["touch", f"{oci.path}/poststop"]}],
    }
    (oci.path / "poststop").unlink(missing_ok=True)
    result = oci.run("touch /tmp/ran")
    assert result.status != 0 and not (oci.rootfs / "tmp/ran").exists()


def test_hooks_get_the_state(oci: Runtime) -> None:
    told = oci.path / "told"
    oci.config["annotations"] = {"a": "b"}
    oci.config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", f"cat > {told}"]}]}
    create(oci)
    found = json.loads(told.read_text())
    assert (found["id"], found["bundle"], found["pid"]) == (NAME, str(oci.path), state(oci)["pid"])
    assert found["annotations"]["a"] == "b" and found["status"] in ("creating", "created")


# -- config-linux.md: control groups, seccomp, sysctl, masked and read-only paths --------------------------------------


def test_resources(oci: Runtime) -> None:
    oci.linux["resources"] |= {
        "memory": {"limit": 64 << 20, "reservation": 32 << 20},
        "cpu": {"shares": 512, "quota": 20000, "period": 50000},
        "pids": {"limit": 77},
    }
    oci.start()
    group = Cgroup(oci.group)
    found = {name: value for name, value in group.values().items() if "current" not in name and "usage" not in name}
    if hierarchy().unified:
        assert (found["memory.max"], found["pids.max"], found["cpu.max"]) == (str(64 << 20), "77", "20000 50000")
    else:
        assert found["memory.limit_in_bytes"] == str(64 << 20) and found["pids.max"] == "77"
        assert (found["cpu.cfs_quota_us"], found["cpu.cfs_period_us"]) == ("20000", "50000")
        assert found["cpu.shares"] == "512"


def test_devices_of_the_control_group(oci: Runtime) -> None:
    """Denied, except what is allowed and what every container has."""
    oci.linux["resources"]["devices"] = [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 1, "minor": 9, "access": "r"},
    ]
    oci.linux["devices"] = [
        {"path": f"/dev/{name}", "type": "c", "major": major, "minor": minor, "fileMode": 0o666, "uid": 0, "gid": 0}
        for name, major, minor in (("allowed", 1, 9), ("denied", 1, 11))
    ]
    script = "for d in null allowed denied; do head -c 1 /dev/$d > /dev/null 2>&1; echo $?; done"
    assert oci.out(script).split() == ["0", "0", "1"]


def test_seccomp(oci: Runtime) -> None:
    oci.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"},
        ],
    }
    assert "No space left" in oci.run("mkdir /tmp/x 2>&1; hostname other; echo $?").out
    assert oci.out("hostname other 2>/dev/null; echo $?") == "159\n"  # 128 + SIGSYS


def test_sysctl_of_the_namespaces(oci: Runtime) -> None:
    oci.linux["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.shmmax": "1234567"}
    assert oci.out("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax") == "1\n1234567\n"
    oci.linux["sysctl"] = {"kernel.pid_max": "12345"}
    before = Path("/proc/sys/kernel/pid_max").read_text()
    assert oci.run("true").status != 0, "it would be the host's"
    assert Path("/proc/sys/kernel/pid_max").read_text() == before


def test_masked_and_read_only_paths(oci: Runtime) -> None:
    (oci.rootfs / "tmp/secret").write_text("secret\n")
    oci.linux["maskedPaths"] = ["/tmp/secret", "/nosuch"]
    oci.linux["readonlyPaths"] = ["/etc", "/nosuch"]
    assert oci.out("cat /tmp/secret; touch /etc/x 2>/dev/null || echo refused; touch /tmp/x && echo made") == (
        "refused\nmade\n"
    )


def test_time_offsets(oci: Runtime) -> None:
    if oci.name != "insula-oci":
        pytest.skip("runc 1.1 has no time namespaces, and crun 1.8 fails here: write to sync socket: Broken pipe")
    oci.linux["namespaces"].append({"type": "time"})
    oci.linux["timeOffsets"] = {"boottime": {"secs": 10_000_000, "nanosecs": 0}}
    inside = float(oci.out("cat /proc/uptime").split()[0])
    outside = float(Path("/proc/uptime").read_text().split()[0])
    assert 9_999_000 < inside - outside < 10_001_000
