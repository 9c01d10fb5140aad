"""Options of `podman run` and `docker run`: mounts, users, rights, limits, namespaces.

Each asserts what a program inside sees; where it is refused something, the same without the option is the control.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.peers import IMAGE, Engine


def run(engine: Engine, *options: str, script: str) -> str:
    """The output of a shell script, on both streams, in a container with these options."""
    result = engine.run("run", "--rm", *options, IMAGE, "sh", "-c", f"exec 2>&1; {script}")
    return result.out.rstrip("\n") or result.err


def test_read_only_root(engine: Engine) -> None:
    write = "echo x > /file && cat /file"
    assert run(engine, script=write) == "x"
    assert "Read-only file system" in run(engine, "--read-only", script=write)


def test_bind_mounts(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("outside")
    assert run(engine, f"-v={tmp_path}:/data", script="cat /data/file; echo inside > /data/new") == "outside"
    assert (tmp_path / "new").read_text() == "inside\n"
    assert "Read-only file system" in run(engine, f"-v={tmp_path}:/data:ro", script="echo x > /data/file")
    assert run(engine, f"-v={tmp_path}/file:/etc/one", script="cat /etc/one") == "outside"


def test_propagation(engine: Engine, tmp_path: Path) -> None:
    """Docker's rshared and rslave take a shared source; private is what there is without."""
    script = "grep ' /data ' /proc/self/mountinfo"
    assert "master:" not in run(engine, f"-v={tmp_path}:/data", script=script)
    assert " /data " in run(engine, f"-v={tmp_path}:/data:rprivate", script=script)


def test_tmpfs(engine: Engine) -> None:
    line = run(
        engine, "--tmpfs=/scratch:size=1m,mode=1777,noexec", script="grep ' /scratch ' /proc/mounts; touch /scratch/x"
    )
    assert "tmpfs" in line
    assert "size=1024k" in line
    assert "noexec" in line


def test_user(engine: Engine) -> None:
    script = "id -u; id -g; grep CapEff /proc/self/status"
    assert run(engine, "--user=1000:1000", script=script).split() == ["1000", "1000", "CapEff:", "0" * 16]
    assert run(engine, "--user=user", script="id -un") == "user"
    assert "1234" in run(engine, "--user=user", "--group-add=1234", script="id -G").split()


def test_capabilities(engine: Engine) -> None:
    chown = "chown 7 /tmp && stat -c %u /tmp"
    assert run(engine, script=chown) == "7"
    assert "Operation not permitted" in run(engine, "--cap-drop=CHOWN", script=chown)
    effective = "grep -E 'Cap(Eff|Bnd)' /proc/self/status | cut -f 2"
    assert set(run(engine, "--cap-drop=ALL", script=effective).split()) == {"0" * 16}
    assert set(run(engine, "--cap-drop=ALL", "--cap-add=NET_ADMIN", script=effective).split()) == {f"{1 << 12:016x}"}


def test_seccomp(engine: Engine, tmp_path: Path) -> None:
    mode = "grep Seccomp: /proc/self/status | cut -f 2"
    assert run(engine, "--security-opt=seccomp=unconfined", script=mode) == "0"
    profile = tmp_path / "profile.json"
    profile.write_text(
        '{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],'
        ' "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}'
    )
    assert run(engine, f"--security-opt=seccomp={profile}", script=mode) == "2"
    assert run(engine, script="mkdir /tmp/x && echo made") == "made"
    assert "Operation not permitted" in run(engine, f"--security-opt=seccomp={profile}", script="mkdir /tmp/x")


def test_default_seccomp(engine: Engine) -> None:
    result = run(engine, script="grep Seccomp: /proc/self/status | cut -f 2; unshare -m true")
    assert result.startswith("2" if engine.name == "docker" else ("0", "2")), result


def test_no_new_privileges(engine: Engine) -> None:
    script = "grep NoNewPrivs /proc/self/status | cut -f 2"
    assert run(engine, script=script) == "0"
    assert run(engine, "--security-opt=no-new-privileges", script=script) == "1"


def test_masked_and_read_only_paths(engine: Engine) -> None:
    assert run(engine, script="wc -c < /proc/keys; wc -c < /proc/timer_list") == "0\n0"
    assert "Read-only file system" in run(engine, script="echo 1 > /proc/sys/vm/drop_caches")


def test_privileged(engine: Engine, runtime: str) -> None:
    everything = "CapBnd:\t000001ffffffffff" in Path("/proc/self/status").read_text()
    if not everything and (runtime, engine.name) == ("runc", "docker"):
        pytest.skip("docker asks for all capabilities, and root has fewer here; runc does not go without")
    script = "mount -t tmpfs none /tmp && echo mounted; readlink /dev/ptmx; test -c /dev/tty && echo device"
    assert run(engine, "--privileged", script=script).split() == ["mounted", "pts/ptmx", "device"]


def test_pids_limit(engine: Engine) -> None:
    burst = "i=0; while [ $i -lt 12 ]; do sleep 600 & i=$((i+1)); done; echo done"
    assert run(engine, script=burst) == "done"
    assert "Resource temporarily unavailable" in run(engine, "--pids-limit=8", script=burst)


def test_memory_limit(engine: Engine) -> None:
    """tail keeps the whole of a line without end in memory."""
    result = engine.run("run", "--rm", "--memory=32m", "--memory-swap=32m", IMAGE, "tail", "/dev/zero")
    assert result.status == 137, result


def test_limits_seen_inside(engine: Engine) -> None:
    options = ("--memory=48m", "--cpus=0.5", "--cpu-shares=512", "--cpuset-cpus=0", "--pids-limit=77")
    v1 = Path("/sys/fs/cgroup/memory").exists()
    files = (
        "memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us cpu/cpu.shares cpuset/cpuset.cpus pids/pids.max"
        if v1
        else "memory.max cpu.max cpuset.cpus pids.max"
    )
    wanted = [str(48 << 20), "50000", "512", "0", "77"] if v1 else [str(48 << 20), "50000", "100000", "0", "77"]
    assert run(engine, *options, script=f"cd /sys/fs/cgroup && cat {files}").split() == wanted


def test_init(engine: Engine) -> None:
    """podman's own is catatonit, which Debian only recommends; any other will do."""
    other = ["--init-path=/usr/bin/tini-static"] if engine.name == "podman" else []
    assert run(engine, "--init", *other, script="cat /proc/1/comm") in ("docker-init", "podman-init")


def test_names(engine: Engine) -> None:
    assert run(engine, "--hostname=island", script="hostname; cat /etc/hostname") == "island\nisland"


def test_environment_and_directory(engine: Engine) -> None:
    assert run(engine, "-e=COLOUR=blue", "-w=/tmp", script="pwd; echo $COLOUR") == "/tmp\nblue"


def test_resource_limits(engine: Engine) -> None:
    assert run(engine, "--ulimit=nofile=512:600", "--ulimit=nproc=99:99", script="ulimit -Sn; ulimit -Hn") == "512\n600"
    assert run(engine, "--oom-score-adj=500", script="cat /proc/self/oom_score_adj") == "500"


def test_sysctl(engine: Engine) -> None:
    assert run(engine, "--sysctl=kernel.msgmax=4096", script="cat /proc/sys/kernel/msgmax") == "4096"


def test_shared_memory_size(engine: Engine) -> None:
    assert "size=4096k" in run(engine, "--shm-size=4m", script="grep ' /dev/shm ' /proc/mounts")


def test_devices(engine: Engine) -> None:
    """/dev/fuse is nobody's by default, and with --device it is there and may be opened."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("this kernel has no /dev/fuse")
    assert "No such file" in run(engine, script="ls /dev/fuse")
    assert run(engine, "--device=/dev/fuse", script=": < /dev/fuse && echo opened") == "opened"
    assert "Operation not permitted" in run(
        engine, "--device=/dev/fuse:/dev/fuse:w", script=": < /dev/fuse && echo opened"
    )


def test_device_nodes_cannot_be_used(engine: Engine) -> None:
    """Even where mknod is allowed, the device cgroup is not."""
    assert "Operation not permitted" in run(engine, script="mknod /tmp/mem c 1 1; cat /tmp/mem | wc -c")


@pytest.mark.parametrize(("option", "kind"), [("--pid", "pid"), ("--ipc", "ipc"), ("--uts", "uts")])
def test_the_host_s_namespace(engine: Engine, option: str, kind: str) -> None:
    ours = os.readlink(f"/proc/self/ns/{kind}")
    read = f"readlink /proc/self/ns/{kind}"
    assert run(engine, script=read) != ours
    assert run(engine, f"{option}=host", script=read) == ours


@pytest.mark.parametrize(("option", "kind"), [("--pid", "pid"), ("--ipc", "ipc"), ("--network", "net")])
def test_another_container_s_namespace(engine: Engine, option: str, kind: str) -> None:
    """A namespace by its path."""
    shared = ["--ipc=shareable"] if kind == "ipc" else []
    engine.ok("run", "-d", "--name=first", *shared, IMAGE, "sleep", "1000")
    read = f"readlink /proc/self/ns/{kind}"
    second = engine.ok("run", "--rm", f"{option}=container:first", IMAGE, "sh", "-c", read)
    assert second == engine.ok("exec", "first", "sh", "-c", read)
