"""Disk images in the store and in the process that converts them: by what rights, and what is counted and removed."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.image import confine
from insula.image.disk import worker
from insula.image.job import Cancelled, Job
from insula.image.limits import ExtractionLimits
from insula.image.store import ImageStore
from insula.model.errors import Invalid
from tests.support.processes import find
from tests.support.qcow2 import qcow2
from tests.support.wait import until

MIB = 1 << 20
COMMAND = f"{sys.executable} -s -P -m {worker.MODULE}"
DISK = b"\1" * 512 + bytes(4 * MIB) + b"\2" * 512


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def given(tmp_path: Path, data: bytes, name: str = "disk") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def test_equal_disks_are_one_whatever_their_format(store: ImageStore, tmp_path: Path) -> None:
    raw = store.import_disk(given(tmp_path, DISK), name="a", tenant="acme", kind="raw")
    other = store.import_disk(given(tmp_path, qcow2(DISK)), name="b", tenant="acme", kind="qcow2")
    assert raw.disk and other.disk and raw.disk == other.disk and raw.digest == other.digest
    assert raw.content == other.content and sum(raw.content.values()) < 130 * 1024
    assert store.disk(raw.disk.digest).read_bytes() == DISK
    full = store.import_disk(given(tmp_path, DISK), name="c", tenant="acme", kind="raw", devices="full")
    assert full.digest != raw.digest and full.disk and full.disk.digest == raw.disk.digest
    until(lambda: not [*(tmp_path / "images/tmp").iterdir()], "what was there already is removed later")
    for image in (raw, other, full):
        store.release(image.digest)
    store.collect({full.digest})
    assert store.disk(full.disk.digest).exists(), "an image that is left has it"
    store.collect(set())
    assert not list((tmp_path / "images/disks").iterdir())


def test_a_refused_disk_leaves_nothing(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="not of format"):
        store.import_disk(given(tmp_path, DISK), name="a", tenant="acme", kind="qcow2")
    with pytest.raises(Invalid, match="of data"):
        small = given(tmp_path, qcow2(b"\1" * MIB, compressed=True))
        store.import_disk(small, name="a", tenant="acme", kind="qcow2", job=Job(space=MIB // 2))
    for name in ("disks", "blobs/sha256", "tmp"):
        assert not [*(tmp_path / "images" / name).iterdir()], name


def test_a_disk_is_neither_saved_nor_pushed(store: ImageStore, tmp_path: Path) -> None:
    image = store.import_disk(given(tmp_path, DISK), name="a", tenant="acme", kind="raw")
    with pytest.raises(Invalid, match="disk image"):
        store.save([image], tmp_path / "saved")
    with pytest.raises(Invalid, match="disk image"):
        store.push(image, "registry.example/a:1")


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[int]:
    """The PID of a process that converts for long: a disk of a tebibyte whose tables are all the same one."""
    data = bytearray(qcow2(bytes(MIB), bits=16))
    data[24:32] = (1 << 40).to_bytes(8, "big")
    data[36:40] = (2048).to_bytes(4, "big")
    table = 1 << 17
    data[1 << 16 : (1 << 16) + 2048 * 8] = (table).to_bytes(8, "big") * 2048
    data[table:] = bytes(7) + b"\1"
    data += (b"\0" * 7 + b"\1") * 8191
    source, target, empty, job = given(tmp_path, bytes(data)), tmp_path / "target", tmp_path / "empty", Job()
    empty.mkdir()
    ended = []

    def work() -> None:
        fd = os.open(empty, os.O_RDONLY | os.O_DIRECTORY)
        with open(source, "rb") as file, open(target, "x+b") as made, pytest.raises(Cancelled):
            while True:  # it may be quick
                worker.run(file, made, fd, "qcow2", ExtractionLimits(bytes=1 << 50), job)
        os.close(fd)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: find(COMMAND) and seccomp(find(COMMAND)[-1]) == "2", "it works")
        yield find(COMMAND)[-1]
    finally:
        job.cancel()
        thread.join()
        assert ended
        until(lambda: not find(COMMAND), "it is gone")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def seccomp(pid: int) -> str | None:
    try:
        return status(pid)["Seccomp"]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_the_converting_process_has_no_rights(at_work: int, tmp_path: Path) -> None:
    found = status(at_work)
    assert found["NoNewPrivs"] == "1" and found["Uid"].split() == [str(confine.USER)] * 4
    assert {int(found[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
    assert os.readlink(f"/proc/{at_work}/root") == str(tmp_path / "empty")
    for kind in ("net", "pid", "ipc", "uts"):
        assert os.readlink(f"/proc/{at_work}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
    names = {os.readlink(f"/proc/{at_work}/fd/{fd}") for fd in os.listdir(f"/proc/{at_work}/fd")}
    files = {name for name in names if name.startswith("/")}
    assert files <= {str(tmp_path / name) for name in ("disk", "target", "empty")}
