"""Copies of a virtual machine that runs: its programs go on in each, as machines of their own."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.machine.test_snapshots import BOOT_ID, files

LONG = 300.0
TICK = """\
n=0; drawn=$(cat /proc/sys/kernel/random/uuid); echo kept > /kept
while :; do n=$((n + 1)); echo $n $drawn $(cat /proc/sys/kernel/random/uuid) $(hostname); sleep 0.2; done
"""
"""A program that counts, has drawn a number before it is copied, and draws one each time."""
LOOK = """\
hostname; cat /etc/hostname; cat /etc/machine-id; cat /sys/class/net/eth0/address
ip -4 -o addr show eth0 | sed 's/.*inet \\([^ ]*\\).*/\\1/'
ip -6 -o addr show eth0 scope global | sed 's/.*inet6 \\([^ ]*\\).*/\\1/'
ip -6 -o addr show eth0 scope link | sed 's/.*inet6 \\([^ ]*\\).*/\\1/'
dd if=/dev/urandom bs=16 count=1 2>/dev/null | sha256sum; sha256sum /etc/hosts
"""
NAMES = ("host name", "/etc/hostname", "machine ID", "MAC", "IPv4", "IPv6", "link-local", "random bytes", "/etc/hosts")


def ticks(cli: Cli, name: str) -> list[list[str]]:
    return [line.split() for line in cli.ok("logs", name).splitlines()]


def look(cli: Cli, name: str) -> Mapping[str, str]:
    """What may tell a machine from others."""
    lines = cli.ok("exec", name, "sh", "-c", LOOK).splitlines()
    assert len(lines) == len(NAMES), lines
    [instance] = [each["instance"] for each in cli.json("ps") if each["instance"]["name"] == name]
    return {**dict(zip(NAMES, lines, strict=True)), "ID": instance["id"]}


class MomentMemory:
    """The memory of the moment that a machine has gone on from, as QEMU, process `pid`, has it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        directory = Path(f"/proc/{pid}/fd")
        [self.path, *_] = [each for each in directory.iterdir() if "memfd:moment" in os.readlink(each)]
        status = self.path.stat()
        self.device, self.inode, self.used = status.st_dev, status.st_ino, status.st_blocks * 512

    def digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def private(self) -> int:
        """The bytes that QEMU has of its own where it is mapped."""
        found, ours = 0, False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
                ours = "memfd:moment" in line
            elif ours and line.startswith("Private_"):
                found += int(line.split()[1]) << 10
        return found

    def refuses_writes(self) -> bool:
        """Whether not even the host's root can write to it."""
        fd = os.open(self.path, os.O_RDWR)
        try:
            os.pwrite(fd, b"x", 0)
        except PermissionError:
            return True
        finally:
            os.close(fd)
        return False


def memory_of_moment(cli: Cli, name: str) -> MomentMemory:
    [shim] = [each["status"]["pid"] for each in cli.json("ps") if each["instance"]["name"] == name]
    [qemu] = [int(word) for word in Path(f"/proc/{shim}/task/{shim}/children").read_text().split()][:1]
    return MomentMemory(qemu)


def test_its_programs_go_on_in_machines_of_their_own(cli: Cli, daemon: Daemon) -> None:
    """They have what was drawn before, in memory and on the disk; all that tells machines apart is their own."""
    cli.ok("network", "create", "both", "--subnet", "10.6.0.0/24", "--subnet6", "fd00:6::/64")
    on = ("-d", "--network", "both")
    of_others = {*(daemon.root / "instances").glob("*/disk")}
    cli.ok("run", *on, "--vm", "--name", "vm", "-p", "18080:80", "busybox", "sh", "-c", TICK, timeout=LONG)
    cli.ok("run", *on, "--name", "beside", "busybox", "sleep", "1000")
    until(lambda: len(ticks(cli, "vm")) > 10, "it counts", LONG)
    boot = cli.ok("exec", "vm", "cat", BOOT_ID)
    least = len(ticks(cli, "vm"))
    assert cli.ok("fork", "-n", "2", "vm", timeout=LONG).split() == ["vm-1", "vm-2"]
    machines, children = ("vm", "vm-1", "vm-2"), ("vm-1", "vm-2")
    for name in machines:
        seen = len(ticks(cli, name))
        until(lambda name=name, seen=seen: len(ticks(cli, name)) > seen, f"{name} goes on", LONG)  # type: ignore[misc]

    [first] = {line[1] for name in machines for line in ticks(cli, name)}
    assert re.fullmatch("[0-9a-f-]{36}", first), "the number that was drawn before is in the memory of all"
    assert {cli.ok("exec", name, "cat", BOOT_ID, "/kept") for name in machines} == {f"{boot}\nkept"}
    begun = [int(ticks(cli, name)[0][0]) for name in children]
    assert min(begun) > least and len(set(begun)) == 1, "they count on from one moment"
    told = {name: [line for line in ticks(cli, name) if int(line[0]) != begun[0]] for name in machines}
    drawn = [line[2] for lines in told.values() for line in lines]  # but what was drawn and not told yet at the moment
    assert len(set(drawn)) == len(drawn) > 0, "no random number twice"
    for name in children:
        assert {line[3] for line in told[name]} <= {name}, "no program has seen the name of another machine"

    shared = {name: memory_of_moment(cli, name) for name in children}
    assert len({(each.device, each.inode) for each in shared.values()}) == 1, "they share one memory"
    before = {each.digest() for each in shared.values()}
    for name in children:
        cli.ok("exec", name, "sh", "-c", f"yes {name} | head -c 20000000 > /dev/shm/mine")
    for each in shared.values():
        assert each.refuses_writes()
        assert each.private() < each.used / 2 < each.used, "most of it is shared still"
    assert {each.digest() for each in shared.values()} == before, "what one writes is its own"

    found = {name: look(cli, name) for name in machines}
    for what in (*NAMES, "ID"):
        assert len({each[what] for each in found.values()}) == 3, what
    for name in children:
        [port] = [each["instance"]["ports"][0] for each in cli.json("ps") if each["instance"]["name"] == name]
        assert found[name]["IPv4"].startswith(f"{port['address']}/") and found[name]["MAC"] == port["mac"]
        assert found[name]["machine ID"] == found[name]["ID"]
        assert cli.run("exec", name, "ping", "-c", "1", "vm").status == 0
        assert cli.run("exec", "beside", "ping", "-c", "1", name).status == 0
    assert cli.json("verify")["passed"]

    for name in machines:
        cli.ok("exec", name, "sh", "-c", f"echo {name} > /mine; sync")
    assert [cli.ok("exec", name, "cat", "/mine") for name in machines] == list(machines)
    published = {each["instance"]["name"]: each["instance"]["spec"]["published"] for each in cli.json("ps")}
    assert len(published["vm"]) == 1 and published["vm-1"] == published["vm-2"] == []
    assert files(daemon) == [], "nothing is left of the moment"

    assert cli.ok("fork", "vm-1", timeout=LONG) == "vm-1-1", "a copy is a machine as any other"
    until(lambda: len(ticks(cli, "vm-1-1")) > 2, "it goes on", LONG)
    assert {line[3] for line in ticks(cli, "vm-1-1")[1:]} == {"vm-1-1"} and cli.ok(
        "exec", "vm-1-1", "hostname"
    ) == "vm-1-1"
    cli.ok("stop", "-t", "0", "vm-1")
    cli.ok("start", "vm-1", timeout=LONG)
    assert cli.ok("exec", "vm-1", "cat", "/mine", "/kept") == "vm-1\nkept"
    assert cli.ok("exec", "vm-1", "cat", "/etc/machine-id") == found["vm-1"]["ID"]
    cli.ok("rm", "-f", "vm", "vm-1", "vm-2", "vm-1-1")
    until(lambda: {*(daemon.root / "instances").glob("*/disk")} <= of_others, "no disk is left", LONG)


def test_a_quota_has_room_for_all_or_for_none(cli: Cli) -> None:
    cli.ok("tenant", "create", "small", "--instances", "2")
    small = cli.of("small")
    small.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "10000", timeout=LONG)
    assert "may have 2 instances and has 1: 1 left" in small.fails("fork", "-n", "2", "vm")
    assert "whole number from 1 to 64" in small.fails("fork", "-n", "65", "vm", status=2)
    assert "no screen" in small.fails("screenshot", "vm", "-o", "/nowhere")
    assert [each["instance"]["name"] for each in small.json("ps", "-a")] == ["vm"]
    assert small.ok("fork", "vm", timeout=LONG) == "vm-1"
    assert "no instance vm" in cli.of("default").fails("fork", "vm")
    small.ok("rm", "-f", "vm", "vm-1")


def test_insulad_is_killed_meanwhile(cli: Cli, daemon: Daemon) -> None:
    """Each copy is there whole, or not at all; nothing is left of another, and the machine runs on."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", "-c", TICK, timeout=LONG)
    until(lambda: len(ticks(cli, "vm")) > 2, "it counts", LONG)
    before = {*(daemon.root / "instances").iterdir()}
    for after in (0.2, 0.4, 0.6, 0.8):
        daemon.killed_during(cli, "fork", "-n", "2", "vm", after=after)
        until(lambda: files(daemon) == [], "nothing is left of the moment", LONG)
        names = [each["instance"]["name"] for each in cli.json("ps", "-a")]
        for name in names:
            seen = len(ticks(cli, name))
            until(lambda name=name, seen=seen: len(ticks(cli, name)) > seen, f"{name} goes on", LONG)  # type: ignore[misc]
            assert name == "vm" or {line[3] for line in ticks(cli, name)[1:]} <= {name}, "but what was not told yet"
        for name in names:
            if name != "vm":
                cli.ok("rm", "-f", name)
        until(lambda: {*(daemon.root / "instances").iterdir()} <= before, "nothing is left of others", LONG)
    cli.ok("rm", "-f", "vm")
