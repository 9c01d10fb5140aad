"""Snapshots of machines of disk images with further disks: Debian's kernel, which writes to one, with both kinds of
devices."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.guests import systems
from tests.support.linux_disk import linux_disk
from tests.support.wait import until
from tests.system.machine.test_snapshots import status

LONG = 300.0
SCRIPT = """
echo ready
n=
while :; do
    there=
    for each in $(cd /sys/block; echo [sv]d?); do
        [ "$(cat /sys/block/$each/size)" = 65536 ] || continue
        there=yes
        kept=$(head -c 16 /dev/$each | head -n 1)
        [ "$kept" = "${n:-$kept}" ] && echo "count ${kept:-0}" || echo "broken $n $kept"
        n=$((${kept:-0} + 1))
        echo $n > /dev/$each
    done
    [ -n "$there" ] || [ -z "$n" ] || { n=; echo gone; }
    sleep 0.2
done
"""
"""It counts on a disk of 32 MiB, and has the number in memory as well. Nobody else has the disk open, so that it is
read from there, and not from memory."""


def counted(cli: Cli, name: str = "vm") -> list[int]:
    lines = cli.ok("logs", name).splitlines()
    assert not [line for line in lines if line.startswith("broken")]
    return [int(line.split()[1]) for line in lines if line.startswith("count ")]


def counts_on(cli: Cli) -> None:
    before = len(counted(cli))
    until(lambda: len(counted(cli)) > before + 1, "the system goes on", LONG)


def went_back(cli: Cli) -> list[int]:
    """The numbers that came after a greater one."""
    return [after for before, after in pairwise(counted(cli)) if after < before]


@pytest.mark.parametrize("devices", ["para", "full"])
def test_a_system_goes_on_with_all_of_its_disks(cli: Cli, tmp_path: Path, daemon: Daemon, devices: str) -> None:
    """What it counts in memory is on the disk. A copy boots with a disk of its own. Disks of virtio go while it runs,
    also when it has gone on."""
    found = systems()
    if found is None:
        pytest.skip("the systems of guests are not there: scripts/systems makes them")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(linux_disk(found / "kernel", SCRIPT))
    cli.ok("image", "import", "--vm", "--devices", devices, disk, f"counting:{devices}")
    words = ("--name", "vm", "--network", "none", "-m", "256m", f"counting:{devices}")
    cli.ok("run", "-d", "--vm", *words, timeout=LONG)
    until(lambda: "ready" in cli.ok("logs", "vm"), "it is ready", LONG)
    if devices == "full":
        cli.ok("stop", "-t", "0", "vm")
    cli.ok("disk", "add", "--size", "16m", "vm", "other", timeout=LONG)
    cli.ok("disk", "add", "--size", "32m", "vm", "data", timeout=LONG)
    if devices == "full":
        cli.ok("start", "vm", timeout=LONG)
    until(lambda: len(counted(cli)) > 2, "it counts", LONG)

    cli.ok("snapshot", "create", "--memory", "vm", "warm", timeout=LONG)
    least = counted(cli)[-1]
    until(lambda: counted(cli)[-1] > least + 5, "it counts further", LONG)
    boots = cli.ok("logs", "vm").count("ready")
    assert went_back(cli) == [], "the control"
    cli.ok("snapshot", "restore", "vm", "warm", timeout=LONG)
    [back] = until(lambda: went_back(cli), "it goes on from the moment", LONG)
    assert back <= least + 5 and cli.ok("logs", "vm").count("ready") == boots
    until(lambda: counted(cli)[-1] > back + 3, "and further", LONG)
    assert status(cli)["state"] == "running"

    [file] = daemon.root.glob("instances/*/disks/data")
    if devices == "para":
        cli.ok("disk", "rm", "vm", "other", timeout=LONG)
        assert "further disk" in cli.fails("snapshot", "restore", "vm", "warm")
        cli.ok("disk", "rm", "vm", "data", timeout=LONG)
        assert not file.exists()
        until(lambda: "gone" in cli.ok("logs", "vm"), "the system has noticed", LONG)
        cli.ok("disk", "add", "--size", "16m", "vm", "other", timeout=LONG)
        cli.ok("disk", "add", "--size", "32m", "vm", "data", timeout=LONG)
        counts_on(cli)
        cli.ok("snapshot", "restore", "vm", "warm", timeout=LONG)
        counts_on(cli)
    else:
        assert "while it runs" in cli.fails("disk", "rm", "vm", "other")
    least = counted(cli)[-1]
    cli.ok("fork", "vm", timeout=LONG)
    most = counted(cli)[-1] + 1
    until(lambda: len(counted(cli, "vm-1")) > 2, "a copy boots, and counts on its own disk", LONG)
    counts_on(cli)
    assert least <= counted(cli, "vm-1")[0] <= most
    assert len(list(daemon.root.glob("instances/*/disks/data"))) == 2
    cli.ok("rm", "-f", "vm", "vm-1")
