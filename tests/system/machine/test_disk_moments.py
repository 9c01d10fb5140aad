"""Snapshots and copies of virtual machines with further disks: all disks are of one moment, and of the memory's."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.conftest import TenantFactory
from tests.system.machine.test_snapshots import BOOT_ID, counts_on, of_snapshot, status, used

LONG = 300.0
MIB = 1 << 20
COUNT = """\
n=0
store() { echo $n > /count; echo $n > /data/count; echo $n > /dev/bare; }
until [ -e /dev/bare ]; do sleep 0.1; done
store
while :; do
    [ ! -e /hold ] || { touch /held; sleep 0.1; continue; }
    read a < /count; read b < /data/count; c=$(dd if=/dev/bare bs=16 count=1 2>/dev/null | head -n 1)
    [ "$a.$b.$c" = $n.$n.$n ] && echo $n || echo broken $n $a $b $c
    n=$((n + 1)); store
    sleep 0.1
done
"""
"""A program whose variable has the number that is on its three disks. Nobody else has /dev/bare open, so that it is
read from the disk, and not from memory."""
HOLD = "touch /hold; until [ -e /held ]; do sleep 0.1; done"
FILL = "mkdir -p {0}; for n in $(seq 60); do head -c 20000 /dev/urandom > {0}/$n; done; md5sum {0}/* > {0}.sums; sync"
CHECK = "md5sum -c -s {0}.sums"


def made(cli: Cli, name: str = "vm") -> None:
    """A machine with a disk that is mounted and one that is bare, on which its program counts."""
    words = ("--name", name, "--network", "none", "--disk", "256m", "busybox", "sh", "-c", COUNT)
    cli.ok("run", "-d", "--vm", *words, timeout=LONG)
    cli.ok("disk", "add", "--size", "64m", "--mount", "/data", name, "data", timeout=LONG)
    cli.ok("disk", "add", "--size", "16m", name, "bare", timeout=LONG)
    bare(cli, name)
    until(lambda: len(counted(cli, name)) > 2, "it counts", LONG)


def bare(cli: Cli, name: str = "vm") -> None:
    """Tell the program where the bare disk is."""
    cli.ok("exec", name, "ln", "-s", "/dev/disk/by-id/virtio-bare", "/dev/bare")


def counted(cli: Cli, name: str = "vm") -> list[int]:
    lines = cli.ok("logs", name).splitlines()
    assert not [line for line in lines if "broken" in line]
    return [int(line) for line in lines]


def mark(cli: Cli, text: str, name: str = "vm") -> None:
    """Write a text to all three disks."""
    write = f"echo {text} | tee /file > /data/file; echo {text} | dd of=/dev/bare bs=4k seek=9 conv=notrunc 2>/dev/null"
    cli.ok("exec", name, "sh", "-c", f"{write}; sync")


def marks(cli: Cli, name: str = "vm") -> list[str]:
    """The texts that are on them."""
    read = "cat /file /data/file; dd if=/dev/bare bs=4k skip=9 count=1 2>/dev/null | head -n 1"
    return cli.ok("exec", name, "sh", "-c", read).splitlines()


def file_of(daemon: Daemon, name: str) -> Path:
    [found] = (daemon.root / "instances").glob(f"*/disks/{name}")
    return found


def test_a_machine_goes_on_with_all_of_its_disks(cli: Cli, daemon: Daemon) -> None:
    """Its program finds on each disk what it has in memory. Later it gives a disk back and gets others, and what was on
    the disks at the moment is there after another start too."""
    made(cli)
    mark(cli, "before")
    cli.ok("exec", "vm", "sh", "-c", FILL.format("/data/files"))
    boot = cli.ok("exec", "vm", "cat", BOOT_ID)
    least, before = counted(cli)[-1], used(cli)
    assert before == (256 + 64 + 16) * MIB
    cli.ok("snapshot", "create", "--memory", "vm", "warm", timeout=LONG)
    counts_on(cli)
    taken = of_snapshot(daemon, "machine.json").parent
    kept = {path.name: path.stat().st_blocks * 512 for path in taken.iterdir() if path.name != "machine.json"}
    assert set(kept) == {"disk", "memory", "state", "further.bare", "further.data"}
    assert kept["further.data"] > MIB and used(cli) == before + sum(kept.values()), "all of it counts"

    mark(cli, "after")
    cli.ok("exec", "vm", "sh", "-c", "rm -r /data/files; sync")
    until(lambda: counted(cli)[-1] > least + 20, "it counts further", LONG)
    cli.ok("snapshot", "restore", "vm", "warm", timeout=LONG)
    counts_on(cli)
    assert marks(cli) == ["before"] * 3 and cli.ok("exec", "vm", "cat", BOOT_ID) == boot, "it was not booted"
    cli.ok("exec", "vm", "sh", "-c", CHECK.format("/data/files"))
    numbers = counted(cli)
    assert len(numbers) > numbers[-1] + 1, "it has counted some twice"

    cli.ok("exec", "-d", "vm", "sh", "-c", "exec 3</data/file; sleep 1000")
    until(lambda: "sleep 1000" in cli.ok("exec", "vm", "ps"), "a program has a file open", LONG)
    assert "in use" in cli.fails("disk", "rm", "vm", "data")
    disks_come_and_go(cli, daemon)
    cli.ok("stop", "-t", "0", "vm")
    cli.ok("start", "vm", timeout=LONG)
    bare(cli)
    assert marks(cli) == ["before"] * 3, "it is what the file has"
    cli.ok("exec", "vm", "sh", "-c", CHECK.format("/data/files"))

    stored = taken / "further.bare"
    written = stored.stat().st_mtime_ns
    os.truncate(stored, 0)
    os.truncate(stored, 16 * MIB)
    assert "not of one moment" in cli.fails("snapshot", "restore", "vm", "warm")
    assert marks(cli) == ["before"] * 3, "it is refused, and nothing changed"
    os.utime(stored, ns=(written, written))
    cli.ok("snapshot", "restore", "vm", "warm", timeout=LONG)
    assert marks(cli)[:2] == ["before"] * 2 and "before" not in marks(cli)[2:], "a disk of another moment would be seen"
    cli.ok("rm", "-f", "vm")
    assert used(cli) == 0


def disks_come_and_go(cli: Cli, daemon: Daemon) -> None:
    """From a machine that has gone on. The snapshot is refused until it has the same disks again."""
    bare_file = file_of(daemon, "bare")
    number = bare_file.stat().st_ino
    pid = status(cli)["pid"]
    cli.ok("exec", "vm", "sh", "-c", HOLD)
    cli.ok("disk", "rm", "vm", "bare", timeout=LONG)
    assert not bare_file.exists() and number not in open_files(pid), "QEMU has closed it"
    assert "bare" not in cli.ok("exec", "vm", "sh", "-c", "cat /sys/block/*/serial")
    cli.ok("disk", "add", "--size", "16m", "--mount", "/more", "vm", "more", timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo more > /more/file; sync")
    said = cli.fails("snapshot", "restore", "vm", "warm")
    assert "bare (16M), data (64M at '/data')" in said and "more (16M at '/more')" in said
    assert status(cli)["pid"] == pid and cli.ok("exec", "vm", "cat", "/more/file") == "more", "nothing changed"
    cli.ok("disk", "rm", "vm", "more", timeout=LONG)
    cli.ok("disk", "add", "--size", "16m", "vm", "bare", timeout=LONG)
    cli.ok("snapshot", "restore", "vm", "warm", timeout=LONG)
    counts_on(cli)
    assert marks(cli) == ["before"] * 3


def open_files(shim: int) -> set[int]:
    """The inodes of the files that QEMU has open, whose parent is a shim."""
    [qemu] = Path(f"/proc/{shim}/task/{shim}/children").read_text().split()
    return {each.stat().st_ino for each in Path(f"/proc/{qemu}/fd").iterdir()}


def test_disks_alone_and_a_memory_that_does_not_go_on(cli: Cli, daemon: Daemon) -> None:
    """Of a machine that runs, and of one that does not, with a disk that was never used. `start --cold` boots from all
    disks of the moment, and so does a machine whose restore was interrupted."""
    made(cli)
    mark(cli, "one")
    cli.ok("snapshot", "create", "vm", "one", timeout=LONG)
    cli.ok("snapshot", "create", "--memory", "vm", "warm", timeout=LONG)
    mark(cli, "two")
    cli.ok("stop", "-t", "0", "vm")
    assert "further disk" in refused_without(cli, "data")
    cli.ok("disk", "add", "--size", "16m", "--mount", "/never", "vm", "never")
    cli.ok("snapshot", "create", "vm", "two")
    cli.ok("start", "vm", timeout=LONG)
    bare(cli)
    assert marks(cli) == ["two"] * 3 and cli.ok("exec", "vm", "ls", "/never") == "lost+found"
    cli.ok("exec", "vm", "sh", "-c", "echo used > /never/file; sync")
    cli.ok("snapshot", "restore", "vm", "two", timeout=LONG)
    bare(cli)
    assert marks(cli) == ["two"] * 3 and cli.ok("exec", "vm", "ls", "/never") == "lost+found"
    cli.ok("disk", "rm", "vm", "never", timeout=LONG)

    for number, after in enumerate((0.1, 0.4, 0.8, 1.5)):
        mark(cli, text := f"three{number}")
        daemon.killed_during(cli, "snapshot", "restore", "vm", "one", after=after)
        until(lambda: status(cli)["state"] in ("running", "exited", "failed"), "it has settled", LONG)
        cli.run("stop", "-t", "0", "vm")
        cli.ok("start", "vm", timeout=LONG)
        bare(cli)
        assert marks(cli) in (["one"] * 3, [text] * 3)

    mark(cli, "four")
    state = of_snapshot(daemon, "state")
    written = state.stat().st_mtime_ns
    with state.open("r+b") as file:
        file.write(bytes(range(256)) * 16)
    os.utime(state, ns=(written, written))
    cli.run("snapshot", "restore", "vm", "warm", timeout=LONG)
    until(lambda: status(cli)["state"] in ("exited", "failed"), "it can't go on", LONG)
    assert "goes on from a snapshot" in cli.fails("snapshot", "create", "vm")
    cli.ok("start", "--cold", "vm", timeout=LONG)
    bare(cli)
    assert marks(cli) == ["one"] * 3
    cli.ok("rm", "-f", "vm")


def refused_without(cli: Cli, name: str) -> str:
    """What is said to a restore without a disk, which is bare and empty afterwards, and then has what it had."""
    view = next(each for each in cli.json("disk", "ls", "vm") if each["name"] == name)
    cli.ok("snapshot", "create", "vm", "kept")
    cli.ok("disk", "rm", "vm", name)
    said = cli.fails("snapshot", "restore", "vm", "one")
    cli.ok("disk", "add", "--size", str(view["size"]), "--mount", view["mount"], "vm", name)
    cli.ok("snapshot", "restore", "vm", "kept")
    cli.ok("snapshot", "rm", "vm", "kept")
    return said


def test_copies_have_disks_of_their_own(tenants: TenantFactory, daemon: Daemon) -> None:
    """Each goes on with what was on all disks at the moment; what one writes then is its own. They count in the quota,
    and can be removed."""
    cli = tenants("--disk", "1100m")
    made(cli)
    mark(cli, "before")
    least = counted(cli)[-1]
    assert cli.ok("fork", "-n", "2", "vm", timeout=LONG).split() == ["vm-1", "vm-2"]
    machines = ("vm", "vm-1", "vm-2")
    for name in machines:
        counts_on(cli, name)
        assert marks(cli, name) == ["before"] * 3
    assert min(counted(cli, "vm-1")) > least and used(cli) == 3 * (256 + 64 + 16) * MIB
    assert "may use" in cli.fails("fork", "vm") and [*names(cli)] == [*machines]
    for name in machines:
        mark(cli, name, name)
    cli.ok("exec", "vm-1", "sh", "-c", HOLD)
    assert [marks(cli, name) for name in machines] == [[name] * 3 for name in machines]

    cli.ok("disk", "rm", "vm-1", "bare", timeout=LONG)
    cli.ok("stop", "-t", "0", "vm-1", "vm-2")
    cli.ok("start", "vm-1", "vm-2", timeout=LONG)
    bare(cli, "vm-2")
    assert marks(cli, "vm-2") == ["vm-2"] * 3 and marks(cli) == ["vm"] * 3
    assert cli.ok("exec", "vm-1", "cat", "/file", "/data/file") == "vm-1\nvm-1"
    assert used(cli) == (3 * (256 + 64 + 16) - 16) * MIB
    counts_on(cli)
    cli.ok("rm", "-f", *machines)
    assert used(cli) == 0
    until(lambda: not list((daemon.root / "instances").glob("*/disks/bare")), "no disk is left", LONG)


def names(cli: Cli) -> list[str]:
    return sorted(each["instance"]["name"] for each in cli.json("ps", "-a"))
