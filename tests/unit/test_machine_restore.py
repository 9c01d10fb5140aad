"""Going back to a moment: whoever is killed meanwhile, a machine has all disks of that moment, or all that it had."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from insula.control.instances.drivers.machine import stored
from insula.control.instances.drivers.machine.request import MachineRequests
from insula.control.instances.drivers.machine.snapshots import MachineSnapshots
from insula.control.instances.drivers.machine.stored import StoredDisk, StoredMachine
from insula.machine.blank import BlankDisks
from insula.model.disks import FurtherDisk
from insula.model.errors import Conflict, Failed
from insula.model.objects import Instance, InstanceSpec, MachineOptions, Resources
from insula.volume.quota import ReservationOnly
from tests.forked import Killed, forked
from tests.support import objects

_MIB = 1 << 20
DISKS = [FurtherDisk(name="bare", size=16 * _MIB), FurtherDisk(name="data", size=16 * _MIB, mount="/data")]
WRITTEN = ("disk", "variables", "disks/bare", "disks/data")
"""The files that a machine writes to, in its directory."""
STEPS = ("open", "os.", "shutil.")
"""Audit events of steps that change files begin so (docs.python.org/3/library/audit_events.html)."""


class Machine:
    """The files of an instance with further disks, and of its snapshots `then` and `warm`, which has its memory."""

    def __init__(self, path: Path) -> None:
        settings: Any = SimpleNamespace(prefix="insula", root=path, instances=path)
        images: Any = None
        requests = MachineRequests(settings, images, ReservationOnly(path, "none here"))
        options = MachineOptions(disks=DISKS)
        spec = InstanceSpec(image="x", options=options, networks=[], resources=Resources(memory=256 * _MIB))
        self.instance: Instance = objects.instance(spec=spec)
        self.directory = requests.directory(self.instance.id).layer
        self.snapshots = MachineSnapshots(requests, lambda _: -1, BlankDisks(path / "blank"))
        (self.directory / "disks").mkdir(parents=True)
        for name in WRITTEN:
            (self.directory / name).write_bytes(b"now")
        self._snapshot("then")
        self._snapshot("warm", "memory", "state")

    def _snapshot(self, name: str, *memory: str) -> None:
        directory = self.directory / "snapshots" / name
        directory.mkdir(parents=True)
        further = [StoredDisk(disk=each, slot=9 + number) for number, each in enumerate(reversed(DISKS))]
        for each in ("disk", "variables", *(each.file for each in further), *memory):
            (directory / each).write_bytes(name.encode())
        stored.finish(directory, StoredMachine(memory=256, cpus=1, interfaces=0, further=further))

    def restore(self, name: str) -> None:
        self.snapshots._restore(self.instance, self.directory / "snapshots" / name)

    def started(self) -> bool:
        """Do what a start does with these files, and return whether the machine goes on."""
        return self.snapshots.begin(self.instance, cold=False) is not None

    def has(self) -> Mapping[str, str]:
        """What is in the files that it writes to."""
        return {name: (self.directory / name).read_text() for name in WRITTEN}


def all_of(text: str) -> Mapping[str, str]:
    return dict.fromkeys(WRITTEN, text)


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed before one of its steps; whether it was."""

    def limited() -> None:
        steps = count()

        def look(event: str, _: object) -> None:
            if event.startswith(STEPS) and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        work()

    try:
        forked(limited)
    except Killed:
        return True
    return False


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("name", ["then", "warm"])
def test_it_is_killed_while_it_goes_back(tmp_path: Path, name: str, pending: bool) -> None:
    """At each step. Then it has all that it had, or all of the moment; also if it was to go on from another moment."""
    had = "warm" if pending else "now"
    other = {"warm": "then", "then": "warm"}[name]
    found = []
    for step in count():
        machine = Machine(tmp_path / str(step))
        if pending:
            (machine.directory / "snapshots" / other).rename(machine.directory / "snapshots" / "spare")
            machine._snapshot(other, "memory", "state")
            machine.restore(other)
            had = other
        killed = killed_at(step, lambda machine=machine: machine.restore(name))  # type: ignore[misc]
        machine.snapshots._sweep(machine.instance.id, ["then", "warm"])
        machine.started()
        has = machine.has()
        assert has in (all_of(had), all_of(name)), f"killed before step {step}"
        found.append(has)
        if not killed:
            break
    assert found[0] == all_of(had) and found[-1] == all_of(name) and len(found) > 10


def test_it_is_killed_while_it_is_started(tmp_path: Path) -> None:
    """At each step of the start that goes on from a moment: the next one does."""
    for step in count():
        machine = Machine(tmp_path / str(step))
        machine.restore("warm")
        assert machine.has() == all_of("now"), "nothing of the machine is changed before"
        killed = killed_at(step, machine.started)
        assert machine.started() and machine.has() == all_of("warm"), f"killed before step {step}"
        if not killed:
            break
    assert step > 10
    (machine.directory / "disks/data").write_bytes(b"what it wrote before it failed")
    assert machine.started() and machine.has() == all_of("warm"), "each start goes on from the moment"
    machine.snapshots.finish(machine.instance.id)
    (machine.directory / "disk").write_bytes(b"its own")
    assert not machine.started() and machine.has() == {**all_of("warm"), "disk": "its own"}


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for disks in ([], DISKS[:1], [*DISKS, FurtherDisk(name="more", size=16 * _MIB)], _larger(), _elsewhere()):
        machine.instance = objects.instance(spec=InstanceSpec(image="x", options=MachineOptions(disks=disks)))
        for name in ("then", "warm"):
            with pytest.raises(Conflict, match="further disk") as raised:
                machine.restore(name)
            assert "insula disk add" in str(raised.value.hint)
    assert machine.has() == all_of("now") and not (machine.directory / "resume").exists()


def _larger() -> list[FurtherDisk]:
    return [FurtherDisk(name="bare", size=32 * _MIB), DISKS[1]]


def _elsewhere() -> list[FurtherDisk]:
    return [DISKS[0], FurtherDisk(name="data", size=16 * _MIB, mount="/other")]


def test_a_disk_that_was_removed_since_is_left_out_of_a_cold_start(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.restore("warm")
    machine.instance = objects.instance(spec=InstanceSpec(image="x", options=MachineOptions(disks=DISKS[:1])))
    with pytest.raises(Conflict, match="further disk"):
        machine.started()
    assert machine.has() == all_of("now")
    assert machine.snapshots.begin(machine.instance, cold=True) is None
    assert machine.has() == {**all_of("warm"), "disks/data": "now"}


@pytest.mark.parametrize("how", ["gone", "of another moment", "not in the record", "with another name"])
def test_a_damaged_disk_is_refused(tmp_path: Path, how: str) -> None:
    machine = Machine(tmp_path)
    directory = machine.directory / "snapshots" / "then"
    path = directory / "further.data"
    if how == "gone":
        path.unlink()
    elif how == "of another moment":
        os.utime(path, ns=(0, 0))
    else:
        record = (directory / "machine.json").read_text()
        replaced = {"not in the record": ('"further.data"', '"other"'), "with another name": ("data", "../../data")}
        (directory / "machine.json").write_text(record.replace(*replaced[how]))
    with pytest.raises(Failed, match="damaged"):
        machine.restore("then")
    assert machine.has() == all_of("now")
