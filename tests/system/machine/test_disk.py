"""The disk of a machine: what is deleted in the guest is given back to the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until

LONG = 300.0
MIB = 1 << 20


def disk_of(daemon: Daemon, cli: Cli, name: str) -> Path:
    [instance] = [view["instance"]["id"] for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return Path(daemon.root, "instances", instance, "disk")


@pytest.fixture
def machine(cli: Cli) -> str:
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "10000", timeout=LONG)
    return "vm"


def test_what_is_deleted_is_given_back(cli: Cli, daemon: Daemon, machine: str) -> None:
    disk = disk_of(daemon, cli, machine)

    def taken() -> int:
        return disk.stat().st_blocks * 512 // MIB

    before = taken()
    cli.ok("exec", machine, "sh", "-c", "dd if=/dev/urandom of=/big bs=65536 count=768 2>/dev/null; sync", timeout=LONG)
    assert taken() >= before + 48, "the control: it was written"
    cli.ok("exec", machine, "sh", "-c", "rm /big; sync")
    until(lambda: taken() < before + 16, "the host has the blocks back", 60)
