"""A machine at one moment, as files: memory and disk belong together, and copies have the same holes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from insula.control.instances.drivers.machine import stored
from insula.control.instances.drivers.machine.fits import check_fits
from insula.control.instances.drivers.machine.stored import StoredMachine
from insula.kernel import copies
from insula.model.errors import Conflict, Failed
from insula.model.objects import InstanceSpec, MachineOptions, NetworkAttachment, Resources

_MIB = 1 << 20


def moment(directory: Path, *, memory: bool = True) -> Path:
    directory.mkdir()
    (directory / "disk").write_bytes(b"disk")
    if memory:
        (directory / "memory").write_bytes(b"memory")
    stored.finish(directory, StoredMachine(memory=256, cpus=1, interfaces=1, qemu="7.2.22", machine="pc-q35-7.2"))
    return directory


@pytest.mark.parametrize("memory", [True, False])
def test_what_was_stored_is_read(tmp_path: Path, memory: bool) -> None:
    found = stored.read(moment(tmp_path / "one", memory=memory))
    assert (found.memory, found.machine, found.has_memory) == (256, "pc-q35-7.2", memory)
    assert set(found.files) == {"disk", *(["memory"] if memory else [])}


@pytest.mark.parametrize("name", ["disk", "memory"])
@pytest.mark.parametrize("how", ["of another moment", "shorter", "gone"])
def test_a_half_of_another_moment_is_refused(tmp_path: Path, name: str, how: str) -> None:
    one, other = moment(tmp_path / "one"), moment(tmp_path / "other")
    os.utime(other / name, ns=(0, 0))
    if how == "of another moment":
        (other / name).rename(one / name)
    elif how == "shorter":
        os.truncate(one / name, 1)
    else:
        (one / name).unlink()
    with pytest.raises(Failed, match="damaged"):
        stored.read(one)


@pytest.mark.parametrize("record", [b"", b"{}", b"\xff", b'{"memory": 1, "cpus": 1, "interfaces": 0, "files": {}}'])
def test_a_record_that_is_none(tmp_path: Path, record: bytes) -> None:
    one = moment(tmp_path / "one")
    (one / "machine.json").write_bytes(record)
    with pytest.raises(Failed, match="damaged"):
        stored.read(one)


def test_what_is_not_durable_counts_for_one_boot_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure its files may have holes where something was."""
    one = tmp_path / "one"
    one.mkdir()
    (one / "disk").write_bytes(b"disk")
    stored.finish(one, StoredMachine(memory=256, cpus=1, interfaces=1), durable=False)
    assert stored.read(one).boot
    durable = moment(tmp_path / "other")
    monkeypatch.setattr(stored, "boot_id", lambda: "another")
    assert stored.read(durable).has_memory
    with pytest.raises(Failed, match="restarted"):
        stored.read(one)


def test_links_are_the_same_files_and_outlive_the_first(tmp_path: Path) -> None:
    one = moment(tmp_path / "one")
    stored.link(one, stored.read(one), tmp_path / "two")
    stored.copy(one / "disk", tmp_path / "copy")
    with (tmp_path / "copy").open("ab") as file:
        file.write(b" that has changed")
    stored.remove(one)
    assert not one.exists() and stored.read(tmp_path / "two").has_memory
    stored.remove(one)  # again


def test_two_may_remove_the_same() -> None:
    """What the other one was faster with is no error; anything else is."""
    stored._raise_unless_gone(None, "", (FileNotFoundError, FileNotFoundError(), None))
    with pytest.raises(PermissionError):
        stored._raise_unless_gone(None, "", (PermissionError, PermissionError(), None))


def test_a_copy_has_the_holes_of_the_file(tmp_path: Path) -> None:
    data = os.urandom(70000)
    with (tmp_path / "one").open("wb") as file:
        file.truncate(64 * _MIB)
        os.pwrite(file.fileno(), data, 5 * _MIB + 123)
    with (tmp_path / "one").open("rb") as source, (tmp_path / "two").open("wb") as target:
        copies.copy(source.fileno(), target.fileno())
    assert (tmp_path / "two").stat().st_size == 64 * _MIB
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert (tmp_path / "two").stat().st_blocks * 512 < 2 * _MIB


def spec(memory: int = 256, cpus: float | None = None, networks: int = 1) -> InstanceSpec:
    return InstanceSpec(
        image="busybox",
        options=MachineOptions(),
        resources=Resources(memory=memory * _MIB, cpus=cpus),
        networks=[NetworkAttachment(network=f"net{number}") for number in range(networks)],
    )


def test_a_machine_goes_on_with_what_it_had() -> None:
    files = {name: stored.FileMark(size=1, written=1) for name in ("memory", "state")}
    of = StoredMachine(memory=256, cpus=1, interfaces=1, slots=[1], files=files)
    check_fits(spec(), of)
    for other, what in ((spec(memory=512), "512M"), (spec(networks=2), "2"), (spec(networks=0), "0")):
        with pytest.raises(Conflict, match=what):
            check_fits(other, of)
    with pytest.raises(Conflict, match="earlier version"):
        check_fits(spec(), StoredMachine(memory=256, cpus=1, interfaces=1, files=files))
    check_fits(spec(memory=512, networks=2), StoredMachine(memory=256, cpus=1, interfaces=1))  # its disk
    del files["state"]
    with pytest.raises(Conflict, match="earlier version"):
        check_fits(spec(), of)
