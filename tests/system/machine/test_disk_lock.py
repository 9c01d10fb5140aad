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
from tests.system.conftest import TenantFactory

LONG = 300.0


def directory(daemon: Daemon, cli: Cli, name: str) -> Path:
    [instance] = [view["instance"]["id"] for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return Path(daemon.root, "instances", instance)


def shared_disk(daemon: Daemon, one: Cli, another: Cli) -> tuple[Path, Path]:
    """An instance `one` that runs, whose disk is that of `two` as well, which does not run, by a hard link. Their
    directories."""
    one.ok("run", "-d", "--vm", "--name", "one", "--network", "none", "busybox", "sleep", "10000", timeout=LONG)
    one.ok("exec", "one", "sh", "-c", "echo from one > /note; sync")
    another.run("run", "--vm", "--name", "two", "--network", "none", "busybox", "cat", "/note", timeout=LONG)
    here, there = directory(daemon, one, "one"), directory(daemon, another, "two")
    (there / "disk").unlink()
    os.link(here / "disk", there / "disk")
    return here, there


def test_a_disk_has_one_machine(cli: Cli, daemon: Daemon) -> None:
    """The other one starts when the first has ended, and not before, not even after insulad was killed. It is told the
    name of the first, which is of the same tenant, also when that has another name now."""
    here, _ = shared_disk(daemon, cli, cli)

    def refused(holder: str) -> None:
        said = cli.run("start", "two").err
        stops = f"`insula -T {cli.tenant} stop {holder}`: two"
        assert f"error: the disk of two is in use by instance {holder}; hint: first {stops}" in said, said

    refused("one")
    assert "in use by instance one" in cli.fails("export", "two"), "nor are files copied meanwhile"
    daemon.kill("insulad")
    daemon.start()
    refused("one")
    cli.ok("rename", "one", "first")
    refused("first")
    assert cli.ok("exec", "first", "cat", "/note") == "from one", "the one that has it runs on"
    assert f"is in use by instance {here.name}, process " in daemon.log.read_text(), "the operator learns which process"
    cli.ok("stop", "first", "-t", "1", timeout=LONG)
    cli.ok("start", "two", timeout=LONG)
    until(lambda: "from one" in cli.ok("logs", "two"), "the control: it starts when no other has the disk", LONG)


def test_a_tenant_learns_nothing_of_the_holder_of_another(tenants: TenantFactory, daemon: Daemon) -> None:
    one, another = tenants(), tenants()
    here, _ = shared_disk(daemon, one, another)
    said = another.run("start", "two")
    assert "error: the disk of two is in use by another machine; hint: ask the operator" in said.err
    told = said.out + said.err + another.ok("inspect", "two") + another.ok("ps", "-a")
    assert here.name not in told and str(one.tenant) not in told, told
    assert not re.search(r"\bone\b|process \d", said.err), said
    assert f"is in use by instance {here.name}, process " in daemon.log.read_text(), "the operator learns it"
    one.ok("stop", "one", "-t", "1", timeout=LONG)
    another.ok("start", "two", timeout=LONG)
    until(lambda: "from one" in another.ok("logs", "two"), "the control: it starts when no other has the disk", LONG)


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


def test_a_snapshot_is_restored_although_somebody_has_the_disk(cli: Cli, daemon: Daemon) -> None:
    """A process that has the disk still, as a QEMU that has outlived its instance, has the file of before: it may write
    to that as it likes."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "10000", timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo before > /note; sync")
    cli.ok("snapshot", "create", "vm", "one", timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo after > /note; sync")
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    with (directory(daemon, cli, "vm") / "disk").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"in use by process {os.getpid()}" in cli.fails("start", "vm"), "the control: it counts as in use"
        cli.ok("snapshot", "restore", "vm", "one")
        cli.ok("start", "vm", timeout=LONG)
        file.write(os.urandom(32 << 20))
        file.flush()
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_nlink == 0, "its file is nobody else's"
        for _ in range(2):
            assert cli.ok("exec", "vm", "cat", "/note") == "before"
            cli.ok("stop", "-t", "0", "vm", timeout=LONG)
            cli.ok("start", "vm", timeout=LONG)
    cli.ok("rm", "-f", "vm")
