"""Snapshots of virtual machines: of their disk, or of disk and memory at one moment, and going back to them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until

LONG = 300.0
BOOT_ID = "/proc/sys/kernel/random/boot_id"
COUNT = """\
n=0
while :; do
    n=$((n + 1)); echo $n > /count; read kept < /count
    [ $kept = $n ] && echo $n || echo broken
    sleep 0.1
done
"""
"""A program whose variable and whose file have the same number, always."""


def counted(cli: Cli, name: str = "vm") -> list[int]:
    """The numbers that its program has printed."""
    lines = cli.ok("logs", name).splitlines()
    assert "broken" not in lines
    return [int(line) for line in lines]


def counts_on(cli: Cli, name: str = "vm") -> None:
    """Wait until its program has printed another number."""
    before = len(counted(cli, name))
    until(lambda: len(counted(cli, name)) > before, f"the program of {name} goes on", LONG)


def status(cli: Cli, name: str = "vm") -> dict[str, Any]:
    [found] = [each["status"] for each in cli.json("ps", "-a") if each["instance"]["name"] == name]
    return dict(found)


def used(cli: Cli) -> int:
    """What the tenant has of its quota of disk."""
    return int(cli.json("tenant", "show", str(cli.tenant))["usage"]["disk"])


def files(daemon: Daemon) -> list[str]:
    """What there is of snapshots and moments on the host."""
    root = daemon.root / "instances"
    return sorted(str(path.relative_to(root)) for kind in ("snapshots", "copies") for path in root.glob(f"*/{kind}/*"))


def test_a_machine_goes_on_from_its_memory_and_its_disk(cli: Cli, daemon: Daemon) -> None:
    """A variable of its program has the value of that moment, files are as they were then, and both agree; its clock
    is right and it is reached. The machine that the snapshot was made of had gone on meanwhile."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "busybox", "sh", "-c", COUNT, timeout=LONG)
    cli.ok("run", "-d", "--name", "beside", "busybox", "sleep", "1000")
    until(lambda: len(counted(cli)) > 5, "it counts", LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo before > /file; echo before > /gone")
    boot = cli.ok("exec", "vm", "cat", BOOT_ID)

    least = counted(cli)[-1]
    assert cli.ok("snapshot", "create", "--memory", "vm", timeout=LONG) == "snap1"
    counts_on(cli)
    [made] = cli.json("snapshot", "ls", "vm")
    assert (made["name"], made["memory"], made["state"]) == ("snap1", True, "ready") and made["stopped"] > 0
    print(f"the machine stood still for {made['stopped']:.3f} s, the snapshot takes {made['size'] >> 20} MiB")
    assert used(cli) == made["size"]
    cli.ok("exec", "vm", "sh", "-c", "echo after > /file; rm /gone; echo new > /new; sync")
    until(lambda: counted(cli)[-1] > least + 30, "it counts further", LONG)

    shown = counted(cli)
    cli.ok("snapshot", "restore", "vm", "snap1", timeout=LONG)
    until(lambda: len(counted(cli)) > len(shown) + 5, "it counts again", LONG)
    later = counted(cli)
    [back] = [index for index in range(1, len(later)) if later[index] <= later[index - 1]]
    assert least < later[back] < max(shown), "the program goes on from that moment"
    assert all(later[index] == later[index - 1] + 1 for index in range(1, len(later)) if index != back)
    assert cli.ok("exec", "vm", "cat", "/file", "/gone") == "before\nbefore"
    assert cli.run("exec", "vm", "ls", "/new").status == 1
    assert cli.ok("exec", "vm", "cat", BOOT_ID) == boot, "it was not booted"
    lines = [line.split() for line in cli.ok("exec", "vm", "adjtimex").splitlines() if "tv_" in line]
    assert abs(int(lines[0][1]) - time.time()) < 60, "it is not the time of the snapshot's first boot"
    assert cli.run("exec", "vm", "ping", "-c", "1", "beside").status == 0
    until(lambda: cli.run("exec", "beside", "ping", "-c", "1", "vm").status == 0, "it is reached", LONG)
    assert cli.json("verify")["passed"]

    cli.ok("stop", "-t", "0", "vm")
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: counted(cli)[-1] < 10, "from now on it is started as ever", LONG)
    assert cli.ok("exec", "vm", "cat", BOOT_ID) != boot
    cli.ok("rm", "-f", "vm")
    assert used(cli) == 0
    until(lambda: files(daemon) == [], "its files are removed, however many it has", LONG)


def test_the_disk_alone(cli: Cli, daemon: Daemon) -> None:
    """Of a machine that runs, and of one that doesn't; several, by name; a second one of a name is refused."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "10000", timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo one > /file")
    cli.ok("snapshot", "create", "vm", "one", timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo two > /file; sync")
    cli.ok("stop", "-t", "0", "vm")
    cli.ok("snapshot", "create", "vm", "two")
    assert "has a snapshot two already" in cli.fails("snapshot", "create", "vm", "two")
    assert "not running" in cli.fails("snapshot", "create", "--memory", "vm")
    assert [(each["name"], each["memory"]) for each in cli.json("snapshot", "ls", "vm")] == [
        ("one", False),
        ("two", False),
    ]
    cli.ok("snapshot", "restore", "vm", "one")
    assert status(cli)["state"] == "exited", "it did not run, and does not"
    cli.ok("start", "vm", timeout=LONG)
    assert cli.ok("exec", "vm", "cat", "/file") == "one"
    cli.ok("snapshot", "restore", "vm", "two", timeout=LONG)
    assert cli.ok("exec", "vm", "cat", "/file") == "two", "it ran, and was started again"
    assert len(files(daemon)) == 2
    cli.ok("snapshot", "rm", "vm", "one", "two")
    assert cli.json("snapshot", "ls", "vm") == [] and files(daemon) == []
    assert "no snapshot one" in cli.fails("snapshot", "restore", "vm", "one")
    assert used(cli) == 0
    cli.ok("rm", "-f", "vm")


def of_snapshot(daemon: Daemon, name: str) -> Path:
    [found] = (daemon.root / "instances").glob(f"*/snapshots/*/{name}")
    return found


def test_a_memory_that_does_not_go_on(cli: Cli, daemon: Daemon) -> None:
    """`start --cold` is the way out: the machine is booted from the disk of that moment. The snapshot stays."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", "-c", COUNT, timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo before > /file; sync")
    boot = cli.ok("exec", "vm", "cat", BOOT_ID)
    cli.ok("snapshot", "create", "--memory", "vm", "pair", timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo after > /file; sync")

    state = of_snapshot(daemon, "state")
    written = state.stat().st_mtime_ns
    with state.open("r+b") as file:
        file.write(bytes(range(256)) * 16)
    os.utime(state, ns=(written, written))
    cli.run("snapshot", "restore", "vm", "pair", timeout=LONG)
    until(lambda: status(cli)["state"] in ("exited", "failed"), "it can't go on", LONG)
    cli.run("start", "vm", timeout=LONG)
    until(lambda: status(cli)["state"] in ("exited", "failed"), "nor at the next attempt", LONG)
    cli.ok("start", "--cold", "vm", timeout=LONG)
    until(lambda: status(cli)["state"] == "running", "it is booted", LONG)
    assert cli.ok("exec", "vm", "cat", "/file") == "before"
    assert cli.ok("exec", "vm", "cat", BOOT_ID) != boot
    assert [each["name"] for each in cli.json("snapshot", "ls", "vm")] == ["pair"]
    cli.ok("exec", "vm", "sh", "-c", "echo now > /file; sync")
    cli.ok("stop", "-t", "0", "vm")
    cli.ok("start", "vm", timeout=LONG)
    assert cli.ok("exec", "vm", "cat", "/file") == "now", "it is over: its disk is its own again"
    cli.ok("rm", "-f", "vm")


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def bind(pid: int, processor: int) -> None:
    """Have all threads of a process run on one processor."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {processor})


def test_its_settings_are_those_of_the_instance(cli: Cli) -> None:
    """One that goes on from a snapshot is restarted as before, and so is one that was made by a fork. A limit of
    processors, or an operator who has bound QEMU to one (taskset(1)), does not prevent it, and they see as many."""
    serve = "until [ -e /dev/shm/end ]; do sleep 0.1; done; exit 3"
    run = ("run", "-d", "--vm", "--restart", "on-failure", "--cpus", "1.5", "--name", "vm", "--network", "none")
    cli.ok(*run, "busybox", "sh", "-c", serve, timeout=LONG)
    processors = cli.ok("exec", "vm", "nproc")
    [qemu] = children(status(cli)["pid"])
    bind(qemu, min(os.sched_getaffinity(qemu)))
    cli.ok("snapshot", "create", "--memory", "vm", "moment", timeout=LONG)
    cli.ok("snapshot", "restore", "vm", "moment", timeout=LONG)
    cli.ok("fork", "vm", timeout=LONG)
    for name in ("vm", "vm-1"):
        until(lambda name=name: status(cli, name)["state"] == "running", "it goes on", LONG)  # type: ignore[misc]
        before = status(cli, name)["pid"]
        assert cli.ok("exec", name, "nproc") == processors
        [view] = [each["instance"] for each in cli.json("ps") if each["instance"]["name"] == name]
        assert view["spec"]["resources"]["cpus"] == 1.5
        cli.ok("exec", name, "touch", "/dev/shm/end")
        until(lambda name=name, before=before: status(cli, name).get("pid") not in (before, None), name, LONG)  # type: ignore[misc]
    cli.ok("rm", "-f", "vm", "vm-1")


def test_memory_and_disk_of_different_moments_are_refused(cli: Cli, daemon: Daemon) -> None:
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", "-c", COUNT, timeout=LONG)
    cli.ok("snapshot", "create", "--memory", "vm", "pair", timeout=LONG)
    started = status(cli)["pid"]
    disk = of_snapshot(daemon, "disk")
    written = disk.stat().st_mtime_ns
    os.utime(disk, ns=(written + 1, written + 1))
    assert "not of one moment" in cli.fails("snapshot", "restore", "vm", "pair")
    assert status(cli)["pid"] == started, "it runs on"
    counts_on(cli)
    os.utime(disk, ns=(written, written))
    cli.ok("update", "-m", "512m", "vm")
    assert "256M of memory" in cli.fails("snapshot", "restore", "vm", "pair")
    cli.ok("stop", "-t", "0", "vm")
    cli.ok("update", "-m", "256m", "vm")
    cli.ok("snapshot", "restore", "vm", "pair", timeout=LONG)  # the control
    counts_on(cli)
    cli.ok("rm", "-f", "vm")


def test_snapshots_are_the_tenants_own(cli: Cli) -> None:
    """Another tenant neither sees nor restores them, also with an instance of the same name, and its limit of disk
    holds."""
    other = cli.of("other")
    cli.ok("tenant", "create", "other", "--disk", "80m")
    options = ("--network", "none", "busybox", "sleep", "10000")
    cli.ok("run", "-d", "--vm", "--name", "vm", *options, timeout=LONG)
    cli.ok("snapshot", "create", "--memory", "vm", "secret", timeout=LONG)
    assert "no instance vm" in other.fails("snapshot", "ls", "vm")
    assert "no instance vm" in other.fails("snapshot", "restore", "vm", "secret")
    other.ok("run", "-d", "--vm", "--name", "vm", "--disk", "64m", *options, timeout=LONG)
    assert other.json("snapshot", "ls", "vm") == []
    for words in (("restore", "vm", "secret"), ("rm", "vm", "secret")):
        assert "no snapshot secret" in other.fails("snapshot", *words)
    assert "of disk and has 64M in use" in other.fails("snapshot", "create", "--memory", "vm")
    assert other.json("snapshot", "ls", "vm") == []
    assert [each["name"] for each in cli.json("snapshot", "ls", "vm")] == ["secret"]
    other.ok("rm", "-f", "vm")


def test_containers_have_none(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "--network", "none", "busybox", "sleep", "1000")
    assert "no snapshots" in cli.fails("snapshot", "create", "web")
    assert "no forks" in cli.fails("fork", "web")
    assert "is a container" in cli.fails("start", "--cold", "web")
    cli.ok("stop", "-t", "0", "web")
    assert "is a container" in cli.fails("start", "--cold", "web")


def test_insulad_is_killed_meanwhile(cli: Cli, daemon: Daemon) -> None:
    """There is a whole snapshot, or none; no file is left of another, and the machine runs on."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", "-c", COUNT, timeout=LONG)
    first = status(cli)["pid"]
    for number, after in enumerate((0.15, 0.3, 0.45, 0.6, 0.8)):
        daemon.killed_during(cli, "snapshot", "create", "--memory", "vm", f"try{number}", after=after)
        found = cli.json("snapshot", "ls", "vm")
        until(lambda: len(files(daemon)) == len(cli.json("snapshot", "ls", "vm")), "nothing else is left", LONG)
        assert {each["state"] for each in found} <= {"ready", "creating"}
        counts_on(cli)
        assert status(cli)["pid"] == first
    until(
        lambda: {each["state"] for each in cli.json("snapshot", "ls", "vm")} <= {"ready"}, "those that are not whole go"
    )
    sizes = sum(each["size"] for each in cli.json("snapshot", "ls", "vm"))
    assert used(cli) == sizes
    cli.ok("snapshot", "create", "--memory", "vm", "last", timeout=LONG)
    for each in cli.json("snapshot", "ls", "vm"):
        cli.ok("snapshot", "restore", "vm", each["name"], timeout=LONG)
        counts_on(cli)
    cli.ok("rm", "-f", "vm")
