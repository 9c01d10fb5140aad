"""The memory of a moment, as machines get it: one for all that go on from it, which nobody can write, and forgotten."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from insula.control.instances.drivers.machine import memory
from insula.control.instances.drivers.machine.memory import MomentMemory
from insula.kernel import copies
from tests.support.wait import until


def written(path: Path, data: bytes) -> Path:
    with path.open("wb") as file:
        file.truncate(8 << 20)
        os.pwrite(file.fileno(), data, 4 << 20)
    return path


def open_by_many(memories: MomentMemory, path: Path, count: int = 8) -> list[int]:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(memories.open(path))) for _ in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found


def test_all_who_ask_share_one_that_nobody_can_write(tmp_path: Path) -> None:
    memories = MomentMemory()
    one, other = (written(tmp_path / name, name.encode()) for name in ("one", "other"))
    found = open_by_many(memories, one)
    assert len({os.fstat(fd).st_ino for fd in found}) == 1 and len(set(found)) == 8
    assert os.pread(found[0], 3, 4 << 20) == b"one"
    assert os.fstat(found[0]).st_blocks * 512 < 1 << 20, "holes stay holes"
    again = os.open(f"/proc/self/fd/{found[0]}", os.O_RDWR)  # as QEMU 7.2 does
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    different = memories.open(other)
    assert os.pread(different, 5, 4 << 20) == b"other"
    for fd in (*found, again, different):
        os.close(fd)
    memories.close()


def test_it_is_forgotten_after_a_while_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = MomentMemory()
    path = written(tmp_path / "one", b"one")
    first = memories.open(path)
    assert memories._memories, "it is kept for the next one"
    memories.close()
    monkeypatch.setattr(memory, "_KEPT", 0.01)
    second = memories.open(path)
    until(lambda: not memories._memories, "it is forgotten")
    assert os.pread(second, 3, 4 << 20) == b"one", "who has it keeps it"
    assert os.fstat(first).st_ino != os.fstat(second).st_ino
    os.close(first)
    os.close(second)


def test_what_can_not_be_read_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = MomentMemory()
    path = written(tmp_path / "one", b"one")
    with pytest.raises(FileNotFoundError):
        memories.open(tmp_path / "none")
    with monkeypatch.context() as broken:
        broken.setattr(copies, "copy", lambda *_: os.pread(-1, 1, 0))
        with pytest.raises(OSError, match="descriptor"):
            memories.open(path)
    fd = memories.open(path)
    assert os.pread(fd, 3, 4 << 20) == b"one"
    os.close(fd)
    memories.close()
