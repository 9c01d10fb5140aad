"""Bombs: one container takes as much as it can, and a neighbour goes on meanwhile.

The control group of the instance limits processes and memory, and all memory that the kernel keeps for a process
counts: of files, sockets, pipes, inodes, descriptors. Nothing here is timed: the neighbour must answer. What is counted
for users or for the host instead is in test_exhaustion, what it costs our own processes in test_cost_to_the_host.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.wait import patiently, until
from tests.system.conftest import TenantFactory
from tests.system.escape.attacks import bombs
from tests.system.escape.cell import COMMAND, IMAGE, Cell, End, request
from tests.system.escape.conftest import CellFactory

MEMORY = 48
"""MiB that a bomb may have: the limit; it asks for more than four times as much."""


def test_a_fork_bomb(cells: CellFactory, cell: Cell, neighbour: Cell) -> None:
    """`:(){ :|:& };:` ends at the limit of its group (pids.max): the host has as many process numbers as before."""
    bomb = cells(cell.cli, "--pids", "64")
    assert len(_members(bomb)) == 1
    running = bomb.start(bombs.processes, 5000, 4.0)
    until(lambda: len(_members(bomb)) >= 50, "the control: it takes all that it may")
    for one in (neighbour, cell):
        assert one.answers()
    assert len(_members(bomb)) <= 64
    forked = Cell.finish(running).value
    assert 40 <= forked <= 64
    assert cell.gets(bombs.processes, 200, 0.0) == 200, "the control: others may have more"


def test_a_fork_bomb_of_each_of_many(tenants: TenantFactory, cells: CellFactory, neighbour: Cell) -> None:
    """Without any option an instance has 4096 processes, and a whole machine 32768 at least (pid_max)."""
    plain = cells(tenants())
    limit = Path(plain.group("pids"), "pids.max").read_text().strip()
    assert limit == "4096"


@pytest.mark.parametrize("kind", bombs.KINDS)
def test_every_kind_of_memory_is_charged(cell: Cell, neighbour: Cell, kind: str) -> None:
    """Memory that is not in any process's address space is the one that accounting forgets: tmpfs, memfd, System V
    segments, buffers of sockets and pipes, inodes, open files. Each ends at the limit of memory, with the OOM
    killer."""
    limited, free = (_bomb(cell.cli, kind, limit) for limit in (MEMORY, None))
    assert neighbour.answers()
    assert _taken(free) == 200, "the control: without the limit it gets what it asks for"
    assert _taken(limited) == 0
    assert neighbour.answers()


def test_rings_of_packet_sockets_are_not_charged(cell: Cell, cells: CellFactory) -> None:
    """PACKET_RX_RING is memory that no control group is charged for, so packet sockets need an option."""
    assert cell.try_(bombs.packet_ring, 1).errno == "EPERM"
    opened = cells(cell.cli, "--memory", f"{MEMORY}m", "--socket-family", "packet")
    assert opened.gets(bombs.packet_ring, 2 * MEMORY) == 2 * MEMORY, "the control: twice as much as its limit"
    assert opened.cli.json("inspect", opened.name)[0]["instance"]["spec"]["options"]["socket_families"] == ["packet"]
    assert "packet, by --socket-family" in opened.cli.ok("explain", opened.name)


def test_a_tenants_limit_holds_for_all_its_instances(
    tenants: TenantFactory, cells: CellFactory, neighbour: Cell
) -> None:
    """Two instances without limits of their own: the tenant's group is above both."""
    small = tenants("--memory", "96m")
    idle = cells(small)
    bombs_ = [_bomb(small, "anonymous", None) for _ in range(2)]
    assert [_taken(bomb) for bomb in bombs_] == [0, 0]
    assert neighbour.answers() and idle.answers()


def test_fork_bombs_of_all_a_tenants_instances(tenants: TenantFactory, cells: CellFactory, neighbour: Cell) -> None:
    """Each may have 4096 processes, and together they have no more than the tenant (pids.max of its group)."""
    small = tenants("--pids", "100")
    first, second = cells(small), cells(small)
    assert [len(_members(each)) for each in (first, second)] == [1, 1]
    held = first.start(bombs.processes, 60, 60.0)
    until(lambda: len(_members(first)) >= 60, "the first has its processes")
    running = second.start(bombs.processes, 200, 5.0)
    until(lambda: len(_members(first)) + len(_members(second)) >= 95, "the control: they take all that they may")
    assert neighbour.answers()
    assert len(_members(first)) + len(_members(second)) <= 100
    assert 10 <= Cell.finish(running).value <= 40
    held.kill()
    held.communicate()
    small.ok("tenant", "update", str(small.tenant), "--pids", "none")
    assert [bomb.gets(bombs.processes, 200, 0.0) for bomb in (first, second)] == [200, 200], "the control"


def test_files_of_every_tmpfs(cell: Cell, cells: CellFactory, neighbour: Cell) -> None:
    """/dev, /dev/shm, /sys/fs/cgroup and a tmpfs of one's own are small; the kernel's default is half of all memory."""
    plain = cells(cell.cli, "--tmpfs", "/t:size=8m")
    for place in ("/dev", "/dev/shm", "/t"):
        assert plain.gets(bombs.files_of_a_tmpfs, place, 128) == "ENOSPC", place
    assert plain.gets(bombs.files_of_a_tmpfs, "/tmp", 80) == "", "the control: the disk takes more"
    assert neighbour.answers()


def _bomb(cli: Cli, kind: str, limit: int | None) -> subprocess.Popen[str]:
    """`insula run` of an instance that is nothing but the bomb."""
    memory = () if limit is None else ("--memory", f"{limit}m")
    program = f"printf '%s' '{request([(bombs.memory, kind, 200)])}' | exec {' '.join(COMMAND)}"
    return cli.start("run", "--rm", "--tmpfs", "/t:size=1g", *memory, IMAGE, "sh", "-c", program)


def _taken(bomb: subprocess.Popen[str]) -> int:
    """How much it got in the end, 0 if it was killed or refused."""
    out, err = bomb.communicate(timeout=patiently(60))
    if bomb.returncode == 137:
        return 0
    assert bomb.returncode == 0, (bomb.returncode, out, err)
    [end] = [End.of(said) for said in json.loads(out)]
    assert end.value is not None or end.signal == "SIGKILL" or end.errno in {"ENOSPC", "ENOMEM", "ENOBUFS"}, end
    return end.value or 0


def _members(one: Cell) -> list[str]:
    return Path(one.group("pids"), "cgroup.procs").read_text().split()
