"""The lock of a machine's disk: no other machine gets the file, whatever has become of insulad."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until

LONG = 300.0


def directory(daemon: Daemon, cli: Cli, name: str) -> Path:
    [instance] = [view["instance"]["id"] for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return Path(daemon.root, "instances", instance)


def test_a_disk_has_one_machine(cli: Cli, daemon: Daemon) -> None:
    """The disk of a machine that runs is that of another one too, by a hard link. The other one starts when the first
    has ended, and not before, not even after insulad was killed."""
    cli.ok("run", "-d", "--vm", "--name", "one", "--network", "none", "busybox", "sleep", "10000", timeout=LONG)
    cli.ok("exec", "one", "sh", "-c", "echo from one > /note; sync")
    cli.run("run", "--vm", "--name", "two", "--network", "none", "busybox", "cat", "/note", timeout=LONG)
    here, there = directory(daemon, cli, "one"), directory(daemon, cli, "two")
    (there / "disk").unlink()
    os.link(here / "disk", there / "disk")

    def refused() -> None:
        said = cli.fails("start", "two")
        assert "the disk of two is in use by" in said and here.name in said, said
        assert re.search(r"process \d+ \(", said), said

    refused()
    daemon.kill("insulad")
    daemon.start()
    refused()
    assert cli.ok("exec", "one", "cat", "/note") == "from one", "the one that has it runs on"
    cli.ok("stop", "one", "-t", "1", timeout=LONG)
    cli.ok("start", "two", timeout=LONG)
    until(lambda: "from one" in cli.ok("logs", "two"), "the control: it starts when no other has the disk", LONG)


def test_the_holder_is_named(cli: Cli, daemon: Daemon) -> None:
    """A process of no instance has a disk, or a further one. What is not started has done nothing to the files."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "10000", timeout=LONG)
    cli.ok("disk", "add", "--size", "64m", "vm", "more", timeout=LONG)
    files = directory(daemon, cli, "vm")
    for path in (files / "disk", files / "disks/more"):
        with path.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    cli.ok("stop", "-t", "1", "vm", timeout=LONG)
    command = Path("/proc/self/comm").read_text().strip()
    for path, what in ((files / "disk", "the disk"), (files / "disks/more", "the file more")):
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = path.stat()
            said = cli.fails("start", "vm")
            assert f"{what} of vm is in use by process {os.getpid()} ({command})" in said, said
            assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    cli.ok("start", "vm", timeout=LONG)
    assert cli.ok("exec", "vm", "ls", "/sys/block").split().count("vdc") == 1, "the control: it starts with both"


def test_a_copy_of_files_has_the_disk_alone(cli: Cli, daemon: Daemon) -> None:
    """While files of a machine that does not run are copied it is not started. If insulad is killed
    meanwhile, nothing is left of the machine that has them."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "10000", timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "head -c 20m /dev/urandom > /large; echo kept > /note")
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    disk = directory(daemon, cli, "vm") / "disk"

    def locked() -> bool:
        with disk.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with cli.start("export", "vm") as exporting:  # nobody reads it
        until(locked, "it is copied", LONG)
        daemon.kill("insulad")
        daemon.start()
        until(lambda: not locked(), "the disk is free", LONG)
        exporting.kill()
    with cli.start("export", "vm") as exporting:
        until(locked, "it is copied", LONG)
        with cli.start("start", "vm") as starting:
            assert cli.json("ps", "-a")[0]["status"]["state"] == "exited"
            assert starting.poll() is None, "it waits"
            exporting.kill()
            assert starting.wait(LONG) == 0
    assert cli.ok("exec", "vm", "cat", "/note") == "kept"
    cli.ok("rm", "-f", "vm")
