"""Ports and further disks of a machine whose system does not know that devices come and go: the small system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from insula.machine.disk import firmware
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.small_systems import bios_disk, uefi_disk
from tests.support.wait import until
from tests.system.machine.test_disk_images import LONG, imported, started


def ports(cli: Cli, name: str) -> dict[str, Any]:
    found = cli.json("inspect", name)[0]["instance"]["ports"]
    return {port["network"]: port for port in found}


def test_a_system_that_takes_nothing_and_lets_nothing_go(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    """Its port goes in any case: the device stays, without a cable. Its disk stays, because what the system still
    writes would be lost; when it does not run it goes. After another start it has what it is to have."""
    imported(cli, tmp_path, bios_disk(), "small")
    for number in range(2):
        cli.ok("network", "create", f"net{number}", "--subnet", f"10.8.{number}.0/24")
    started(cli, "vm", "small", "--network", "net0")
    assert taps(cli) == 1
    cli.ok("port", "plug", "vm", "net1", timeout=LONG)
    assert taps(cli) == 2
    cli.ok("port", "unplug", "vm", "net1", timeout=LONG)
    assert set(ports(cli, "vm")) == {"net0"} and taps(cli) == 1, "the port is gone"
    cli.ok("port", "plug", "vm", "net1", timeout=LONG)
    assert taps(cli) == 2 and cli.json("verify")["passed"], "another one gets another slot"

    cli.ok("disk", "add", "--size", "16m", "vm", "data", timeout=LONG)
    daemon.kill("insulad")
    daemon.start()
    assert "let go" in cli.fails("disk", "rm", "vm", "data")
    assert [each["name"] for each in cli.json("disk", "ls", "vm")] == ["data"]
    assert list(daemon.root.glob("instances/*/disks/data"))
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    cli.ok("disk", "rm", "vm", "data")
    cli.ok("disk", "add", "--size", "16m", "vm", "more")
    cli.ok("start", "vm", timeout=LONG)
    assert taps(cli) == 2 and not list(daemon.root.glob("instances/*/disks/data"))
    assert list(daemon.root.glob("instances/*/disks/more"))
    cli.ok("rm", "-f", "vm")


@pytest.mark.skipif(firmware.find() is None, reason="UEFI firmware is not installed: apt install ovmf")
def test_devices_of_a_pc_with_pci_express(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    """It takes an e1000 while it runs, and boots with further disks."""
    imported(cli, tmp_path, uefi_disk(), "modern", "--firmware", "uefi", "--devices", "full")
    cli.ok("network", "create", "other", "--subnet", "10.9.0.0/24")
    started(cli, "vm", "modern", "--network", "none")
    cli.ok("port", "plug", "vm", "other", timeout=LONG)
    assert taps(cli) == 1
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    for number in range(7):
        cli.ok("disk", "add", "--size", "16m", "vm", f"disk{number}")
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: cli.ok("logs", "vm").count("small system by UEFI") == 2, "it boots", LONG)
    assert taps(cli) == 1
    cli.ok("rm", "-f", "vm")


def taps(cli: Cli) -> int:
    """How many taps QEMU has open: ports with a device."""
    [machine] = [each["pid"] for each in cli.json("top", "vm") if "qemu" in each["command"]]
    links = [os.readlink(each) for each in Path(f"/proc/{machine}/fd").iterdir()]
    return links.count("/dev/net/tun")
