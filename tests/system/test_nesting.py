"""Containers in containers: what `--nesting` allows, how it looks from outside, and what stays forbidden."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from insula.kernel import cgroups
from tests.support.cli import Cli
from tests.support.images import Layout, member, tar
from tests.support.wait import until
from tests.system.test_pids import status_field

DEEPER = "unshare -Urpmf --mount-proc"  # one more user, PID and mount namespace
APPLETS = "sh ps cat id hostname mount umount grep sleep unshare"


def libraries(program: str) -> set[str]:
    """The program and what ld.so(8) loads for it."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return {program, *re.findall(r"(?:=> |^\t)(/\S+)", listed, re.MULTILINE)}


@pytest.fixture(scope="module")
def runtime_image(tenant: Cli) -> str:
    """An image with crun(1), and a bundle in /bundle whose root file system has busybox."""
    paths = libraries("/usr/bin/crun")
    busybox = Path("/usr/bin/busybox").read_bytes()
    directories = {str(parent) for path in paths for parent in Path(path).parents} | {"/bin", "/proc", "/run", "/tmp"}
    directories |= {"/bundle", "/bundle/rootfs", *(f"/bundle/rootfs/{name}" for name in ("bin", "proc", "dev", "sys"))}
    layer = tar(
        *(member(f"{path.lstrip('/')}/") for path in sorted(directories - {"/"})),
        *(member(path.lstrip("/"), Path(path).read_bytes(), mode=0o755) for path in sorted(paths)),
        *(member(f"{root}bin/busybox", busybox, mode=0o755) for root in ("", "bundle/rootfs/")),
        *(
            member(f"{root}bin/{name}", linkname="busybox")
            for root in ("", "bundle/rootfs/")
            for name in APPLETS.split()
        ),
    )
    layout = Layout()
    layout.image([layer], process={"Cmd": ["sh"]}, name="runtime:1")
    loaded = tenant.raw("image", "load", "-", stdin=layout.tar())
    assert loaded.returncode == 0, loaded
    return "runtime:1"


def bundle(tmp_path: Path, script: str, *, users: bool) -> str:
    """The config.json that `crun spec` writes, for a shell script, perhaps with a user namespace."""
    subprocess.run(["crun", "spec"], check=True, cwd=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": ["sh", "-c", script]}
    if users:
        config["linux"]["namespaces"].append({"type": "user"})
        mapping = [{"containerID": 0, "hostID": 1000, "size": 100}]
        config["linux"] |= {"uidMappings": mapping, "gidMappings": mapping}
    return json.dumps(config)


@pytest.mark.parametrize("users", [False, True], ids=["with the container's users", "with users of its own"])
def test_another_runtime_runs_inside(cli: Cli, runtime_image: str, tmp_path: Path, users: bool) -> None:
    script = "echo inside; hostname; cat /proc/self/uid_map; ps; mount; ls /sys/class/net"
    config = bundle(tmp_path, script, users=users)
    begin = "cd /bundle && cat > config.json && crun --cgroup-manager=disabled run inner"
    done = cli.run("run", "--rm", "-i", "--nesting", runtime_image, "sh", "-c", begin, stdin=config)
    assert done.status == 0, done
    assert "inside\ncrun\n" in done.out
    assert re.search(r"^\s+0\s+1000\s+100$" if users else r"^\s+0\s+\d+\s+65536$", done.out, re.MULTILINE)
    assert "proc on /proc type proc" in done.out
    without = cli.run("run", "--rm", "-i", runtime_image, "sh", "-c", begin, stdin=config)
    assert without.status != 0 and "inside" not in without.out, "the control: not without --nesting"


def test_several_levels_seen_from_outside(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "deep", "--nesting", "busybox", *f"{DEEPER} {DEEPER} {DEEPER} sleep 620".split())

    def deepest() -> Any:
        found = cli.json("top", "deep")
        return next((p for p in found if p["command"] == "sleep 620" and len(p["pids"]) == 5), None)

    process = until(deepest, "a process five levels deep")
    host = process["pid"]
    assert status_field(host, "NSpid") == [str(pid) for pid in process["pids"]]
    assert process["pids"][-1] == 1
    who = cli.json("whois", str(host))
    assert (who["instance"], who["inside"], who["pids"]) == ("deep", process["pids"][1], process["pids"])
    assert " > ".join(map(str, process["pids"])) in cli.ok("whois", str(host))
    text = cli.ok("explain", "deep")
    assert "LEVEL 4" in text and "by --nesting" in text
    assert re.search(r"\s+".join(map(str, process["pids"])) + r"\s+sleep 620", text)
    cli.ok("kill", "deep")
    until(lambda: not Path(f"/proc/{host}").exists(), "the levels below end with the one above")


def test_each_level_sees_its_own(cli: Cli) -> None:
    second = 'sh -c "echo 2: \\$\\$; cat /proc/1/comm; true"'
    script = f"{DEEPER} sh -c 'echo 1: $(ls -d /proc/[0-9]* | wc -l); {DEEPER} {second}'"
    out = cli.ok("run", "--rm", "--nesting", "busybox", "sh", "-c", script)
    assert re.fullmatch(r"1: [34]\n2: 1\nsh", out), out


def test_without_the_option_nothing_of_this_is_possible(cli: Cli) -> None:
    for command in (
        f"{DEEPER} true",
        "unshare -p true",
        "unshare -U true",
        "mount -t tmpfs none /mnt",
        "ls /dev/.insula",
    ):
        done = cli.run("run", "--rm", "busybox", *command.split())
        assert done.status != 0, done
        if not command.startswith("ls"):
            assert "ermi" in done.err, done  # Operation not permitted, permission denied


def test_masks_stay_for_ordinary_programs(cli: Cli) -> None:
    count = "wc -c < /proc/keys; mount | grep -c 'proc on /proc/sys type proc (ro'"
    read = f"cat /proc/timer_list /proc/keys /proc/locks /proc/cmdline; {count}"
    out = cli.ok("run", "--rm", "--nesting", "busybox", "sh", "-c", read)
    assert out == "0\n1"


def test_the_host_is_out_of_reach(cli: Cli) -> None:
    """Root inside may take mounts and masks of its own away: behind them are the host's files, and these refuse."""
    script = """
        umount /proc/sys/kernel/pty && umount /proc/sys && echo unmasked
        echo 0 > /proc/sys/net/ipv4/ip_forward && echo namespaced
        whole=/dev/.insula/proc
        for file in /proc/sys/kernel/core_pattern /proc/sys/kernel/panic /proc/sysrq-trigger $whole/sysrq-trigger
        do (echo x > $file) 2>/dev/null && echo WROTE $file; done
        mkdir /group && mount -t "$KIND" $OPTIONS none /group && echo mounted
        (echo max > /group/pids.max) 2>/dev/null && echo RAISED
        cat /dev/.insula/proc/kcore >/dev/null 2>&1 && echo READ
        mknod /tmp/sda b 8 0 2>/dev/null && (head -c1 /tmp/sda) 2>/dev/null && echo DISK
        true
    """
    unified = cgroups.hierarchy().unified
    kind = ("KIND=cgroup2", "OPTIONS=") if unified else ("KIND=cgroup", "OPTIONS=-o pids")
    environment = [word for each in kind for word in ("-e", each)]
    out = cli.ok("run", "--rm", "--nesting", *environment, "busybox", "sh", "-c", script)
    assert out.split() == ["unmasked", "namespaced", "mounted"], out


def test_the_groups_own_part_of_the_tree(cli: Cli) -> None:
    """Version 2: it may be divided, and exec works afterwards. Version 1: it can't be divided."""
    divide = "mkdir init && echo 1 > init/cgroup.procs && echo +pids > cgroup.subtree_control"
    script = f"cd /sys/fs/cgroup && {divide} && echo divided; exec sleep 600"
    cli.ok("run", "-d", "--name", "divider", "--nesting", "busybox", "sh", "-c", script)
    until(lambda: any(p["command"] == "sleep 600" for p in cli.json("top", "divider")), "the script is through")
    assert cli.ok("logs", "divider").endswith("divided") is bool(cgroups.hierarchy().unified)
    assert cli.ok("exec", "divider", "echo", "joined") == "joined"
    assert len(cli.json("top", "divider")) == 1


def test_limits_hold_for_nested_containers(cli: Cli) -> None:
    script = "i=0; while [ $i -lt 60 ]; do sleep 600 & i=$((i+1)); done 2>&1; kill -9 -1"
    options = ("--nesting", "--pids", "30")
    done = cli.run("run", "--rm", *options, "busybox", *DEEPER.split(), "sh", "-c", script)
    assert "can't fork" in done.out + done.err, done
    read = "cat /sys/fs/cgroup/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids/pids.max"
    assert cli.ok("run", "--rm", "--nesting", "busybox", "sh", "-c", read) == "16384"
