"""Snapshots and copies of machines of disk images, in which Insula has no agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from insula.machine.disk import firmware
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.small_systems import bios_disk, uefi_disk
from tests.support.wait import until
from tests.system.machine.test_disk_images import LONG, imported, started, status
from tests.unit.test_machine_disks import read


def typed(cli: Cli, name: str, text: str, expected: str) -> None:
    """Type a line at the serial console, and wait for what the system shows behind its echo."""
    with cli.terminal("attach", name) as console:
        console.type(f"{text}\n")
        console.expect(text, LONG)
        console.expect(expected, LONG)


def directory(cli: Cli, daemon: Daemon, name: str) -> Path:
    return daemon.root / "instances" / str(cli.json("inspect", name)[0]["instance"]["id"])


def test_a_machine_goes_back_and_is_copied(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    """The small system shows a letter of its disk when it boots, and writes the next one: so it tells which disk it
    has, and whether it has booted."""
    imported(cli, tmp_path, bios_disk(), "small")
    assert "mark A" in started(cli, "vm", "small", "-i")
    assert cli.ok("snapshot", "create", "--memory", "vm", timeout=LONG) == "snap1"
    [made] = cli.json("snapshot", "ls", "vm")
    assert made["memory"] and made["stopped"] > 0
    typed(cli, "vm", "r", "mark B")
    cli.ok("snapshot", "create", "vm", "disk", timeout=LONG)  # which says C
    typed(cli, "vm", "r", "mark C")

    boots = cli.ok("logs", "vm").count("small system")
    cli.ok("snapshot", "restore", "vm", "snap1", timeout=LONG)
    typed(cli, "vm", "x", "x")
    assert cli.ok("logs", "vm").count("small system") == boots, "it goes on, and was not booted"
    typed(cli, "vm", "r", "mark B")
    assert status(cli, "vm")["state"] == "running"
    assert cli.run("exec", "vm", "true").status == 125, "it is a machine of a disk image still"

    cli.ok("snapshot", "restore", "vm", "disk", timeout=LONG)
    until(lambda: "mark C" in cli.ok("logs", "vm").rpartition("mark B")[2], "it boots from that disk", LONG)
    cli.ok("stop", "-t", "60", "vm", timeout=LONG)
    cli.ok("snapshot", "restore", "vm", "snap1", timeout=LONG)
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: "mark B" in cli.ok("logs", "vm").rpartition("mark C")[2], "later starts boot", LONG)

    cli.ok("fork", "vm", "-n", "2", timeout=LONG)
    for name in ("vm-1", "vm-2"):
        until(lambda name=name: "ready" in cli.ok("logs", name), "a copy boots", LONG)  # type: ignore[misc]
        assert "mark C" in cli.ok("logs", name), "from a disk of that moment"
        typed(cli, name, "r", "mark D") if name == "vm-1" else None
    assert status(cli, "vm")["state"] == "running"
    seeds = [read((directory(cli, daemon, name) / "seed").read_bytes()) for name in ("vm", "vm-1", "vm-2")]
    assert len({seed["meta-data"] for seed in seeds}) == len({seed["network-config"] for seed in seeds}) == 3
    assert b'"local-hostname": "vm-2"' in seeds[2]["meta-data"], "cloud-init sees another machine"
    disks = [(directory(cli, daemon, name) / "disk").read_bytes()[512:513] for name in ("vm", "vm-1", "vm-2")]
    assert disks == [b"C", b"E", b"D"], "each writes its own"
    assert cli.json("verify")["passed"]
    cli.ok("rm", "-f", "vm", "vm-1", "vm-2")
    cli.ok("image", "rm", "small")


@pytest.mark.skipif(firmware.find() is None, reason="UEFI firmware is not installed: apt install ovmf")
def test_variables_of_firmware_go_back_with_the_disk(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    imported(cli, tmp_path, uefi_disk(), "modern", "--firmware", "uefi")
    started(cli, "vm", "modern", "-i")
    cli.ok("snapshot", "create", "--memory", "vm", "both", timeout=LONG)
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    path = directory(cli, daemon, "vm") / "variables"
    then = path.read_bytes()
    cli.ok("snapshot", "create", "vm", "disk", timeout=LONG)
    for name in ("disk", "both"):
        path.write_bytes(then[:-1] + b"?")
        cli.ok("snapshot", "restore", "vm", name, timeout=LONG)
        assert path.read_bytes() == then, name
    assert status(cli, "vm")["state"] == "running"
    cli.ok("fork", "vm", timeout=LONG)
    cli.ok("stop", "-t", "60", "vm", timeout=LONG)
    assert status(cli, "vm")["exit"]["exit_status"] == 0, "it went on, and sees the power button"
    assert cli.ok("logs", "vm").count("by UEFI") == 1, "it was booted once"
    until(lambda: "ready" in cli.ok("logs", "vm-1"), "a copy boots", LONG)
    assert (directory(cli, daemon, "vm-1") / "variables").exists()
    cli.ok("rm", "-f", "vm", "vm-1")
