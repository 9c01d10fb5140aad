"""Terminals of all instances together, and the host's limit (pty(7))."""

from __future__ import annotations

from pathlib import Path

from insula.control.instances.drivers.container.spec import TERMINALS
from insula.control.instances.drivers.container.terminals import Terminals
from tests.support.cli import Cli

LIMIT, RESERVE = Path("/proc/sys/kernel/pty/max"), Path("/proc/sys/kernel/pty/reserve")


def number(path: Path) -> int:
    return int(path.read_text())


def test_the_limit_of_the_host_rises_with_the_instances_and_is_put_back(tmp_path: Path) -> None:
    before = number(LIMIT)
    many = before // TERMINALS + 500
    terminals = Terminals(tmp_path / "record")
    terminals.make_room(0)
    assert number(LIMIT) == before, "the control: for none there is room"
    try:
        for instances in (many, 2 * many):
            terminals.make_room(instances)
            assert number(LIMIT) - number(RESERVE) >= instances * TERMINALS
        Terminals(tmp_path / "record").make_room(3 * many)  # the next insulad
        raised = number(LIMIT)
        terminals.make_room(many)
        assert number(LIMIT) == raised, "it is never lowered"
    finally:
        terminals.restore()
    assert number(LIMIT) == before
    terminals.restore()
    assert number(LIMIT) == before, "there is nothing to put back"


def test_a_limit_that_another_program_set_stays(tmp_path: Path) -> None:
    before = number(LIMIT)
    terminals = Terminals(tmp_path / "record")
    try:
        terminals.make_room(before // TERMINALS + 500)
        other = number(LIMIT) + 7
        LIMIT.write_text(str(other))
        terminals.restore()
        assert number(LIMIT) == other
    finally:
        LIMIT.write_text(str(before))


def test_an_instance_has_a_limit_of_terminals(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    mounted = [line.split() for line in cli.ok("exec", "web", "cat", "/proc/mounts").splitlines()]
    [options] = [words[3].split(",") for words in mounted if words[1] == "/dev/pts"]
    assert f"max={TERMINALS}" in options
