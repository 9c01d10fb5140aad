"""The audit log as a file: whole lines, rotation, renames by others, full disks; and its reader."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.audit import files, writer
from insula.audit.reader import read, timestamp
from insula.audit.writer import AuditLog
from tests.support.wait import patiently


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[AuditLog]:
    log = AuditLog(path, **options)
    try:
        yield log
    finally:
        log.close()


def numbers(path: Path, files: int = 9, **wanted: Any) -> list[int]:
    return [entry["n"] for entry in read(path, files, **wanted)]


def entry(n: int, **more: Any) -> dict[str, Any]:
    return {"time": timestamp(1000.0 + n), "n": n, **more}


def test_all_is_written_at_the_end_in_order(tmp_path: Path) -> None:
    with opened(tmp_path / "log") as log:
        for n in range(1000):
            log.record(entry(n))
    assert numbers(tmp_path / "log") == list(range(1000))


def test_flush_returns_when_it_is_written(tmp_path: Path) -> None:
    with opened(tmp_path / "log") as log:
        log.record(entry(1))
        log.flush()
        assert numbers(tmp_path / "log") == [1]


def test_a_second_writer_appends(tmp_path: Path) -> None:
    for n in range(3):
        with opened(tmp_path / "log") as log:
            log.record(entry(n))
    assert numbers(tmp_path / "log") == [0, 1, 2]


def test_mode_and_directory_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log"
    before = os.umask(0)
    try:
        with opened(path, group=os.getgid()) as log:
            log.record(entry(1))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o640
    assert path.parent.stat().st_mode & 0o7777 == 0o750


def test_rotation_keeps_so_many_files_and_loses_no_line_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with opened(path, size=4000, files=2) as log:
        for n in range(100, 160):
            log.record(entry(n))
            if n % 7 == 0:
                log.flush()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(2000 < p.stat().st_size <= 4000 for p in list(tmp_path.iterdir())[1:])
    found = numbers(path, 2)
    assert found == list(range(found[0], 160)) and len(found) > 20
    assert path.stat().st_mode & 0o7777 == 0o640


def test_without_older_files_rotation_begins_anew(tmp_path: Path) -> None:
    with opened(tmp_path / "log", size=2000, files=0) as log:
        for n in range(50):
            log.record(entry(n))
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
    assert numbers(tmp_path / "log", 0)[-1] == 49


def test_a_line_longer_than_the_file_may_be_is_written(tmp_path: Path) -> None:
    with opened(tmp_path / "log", size=100, files=9) as log:
        log.record(entry(1, x="y" * 500))
        log.record(entry(2, x="y" * 500))
    assert numbers(tmp_path / "log") == [1, 2]


def test_somebody_else_may_rename_or_remove_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with opened(path) as log:
        log.record(entry(1))
        log.flush()
        path.rename(tmp_path / "log.1")
        log.record(entry(2))
        log.flush()
        assert (path.read_text().count('"n":'), numbers(path)) == (1, [1, 2])
        path.unlink()
        log.record(entry(3))
    assert numbers(path) == [1, 3]


def test_a_torn_last_line_is_ended_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"time":"2026","n":1}\n{"time":"20')
    with opened(path) as log:
        log.record(entry(2))
    assert numbers(path) == [1, 2]


def test_a_file_that_cannot_be_written_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    told: list[str | None] = []
    path = tmp_path / "log"
    path.mkdir()
    with opened(path, told=told.append) as log:
        for n in range(5):
            log.record(entry(n))
        log.flush()
        assert [str(path) in (trouble or "") for trouble in told] == [True]
        path.rmdir()
        log.record(entry(5))
        log.flush()
        assert told[1:] == [None]
    assert numbers(path) == list(range(6))


def test_a_fifo_or_link_does_not_block_it(tmp_path: Path) -> None:
    told: list[str | None] = []
    for path in (tmp_path / "fifo", tmp_path / "link"):
        os.mkfifo(path) if path.name == "fifo" else path.symlink_to(tmp_path / "target")
        with opened(path, told=told.append) as log:
            log.record(entry(1))
    said = [trouble for trouble in told if trouble]
    assert [trouble.startswith("1 lines are lost: ") for trouble in said] == [False, True, False, True]
    assert all("can't be written" in trouble for trouble in said)
    assert not (tmp_path / "target").exists()


def test_lines_dropped_for_lack_of_memory_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_MOST_WAITING", 10)
    path = tmp_path / "log"
    path.mkdir()
    with opened(path) as log:
        for n in range(25):
            log.record(entry(n))
        log.flush()
        path.rmdir()
        log.record(entry(99))  # no room for it either
        log.flush()
    lines = list(read(path, 0))
    assert [line.get("n") for line in lines[:10]] == list(range(10))
    assert lines[10]["lost"] == 16


def test_it_is_full_while_its_thread_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a write to a disk that doesn't answer; here in the call that says that there is none."""
    monkeypatch.setattr(writer, "_MOST_WAITING", 10)
    hanging, go_on = threading.Event(), threading.Event()

    def told(_: str | None) -> None:
        hanging.set()
        go_on.wait()

    path = tmp_path / "log"
    path.mkdir()
    log = AuditLog(path, told=told)
    try:
        log.record(entry(0))
        assert hanging.wait(patiently(10))
        for n in range(1, 11):
            assert not log.full
            log.record(entry(n))
        assert log.full
        path.rmdir()
    finally:
        go_on.set()
        log.close()
    assert not log.full
    assert [line.get("n") for line in read(path, 0)][:10] == list(range(10))


def test_a_full_disk_tears_no_line_and_repeats_none(tmp_path: Path) -> None:
    """A file size limit stands in for the disk: a write(2) up to it is short, and the next one fails."""
    program = f"""
import json, os, resource, signal
from pathlib import Path
from insula.audit.writer import AuditLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
told = []
log = AuditLog(Path({str(tmp_path / "log")!r}), told=told.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, -1))
for n in range(40):
    log.record({{"time": "2026", "n": n, "x": "y" * 30}})
log.flush()
assert os.path.getsize(log.path) == 6000 and told and "File too large" in told[-1], (told, os.path.getsize(log.path))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
log.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert numbers(tmp_path / "log") == list(range(40))


@given(st.dictionaries(st.text(), st.text() | st.none() | st.integers() | st.floats(allow_nan=False)))
def test_whatever_is_in_an_entry_it_is_one_line(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("audit") / "log"
    data = {"data": data, "time": "2026"}
    with opened(path) as log:
        log.record(data)
    content = path.read_bytes()
    assert content.count(b"\n") == 2, "the line of the file, and this one"
    assert content.isascii()
    [found] = read(path, 0)
    assert {name: found[name] for name in data} == data


def test_the_reader_filters(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with opened(path) as log:
        for n in range(6):
            log.record(entry(n, uid=n % 2, tenant="acme" if n < 3 else None))
    assert numbers(path, since=1003.0) == [3, 4, 5]
    assert numbers(path, uid=1) == [1, 3, 5]
    assert numbers(path, tenant="acme") == [0, 1, 2]
    assert numbers(path, tenant="acme", uid=0, since=1001.0) == [2]
    assert numbers(tmp_path / "absent") == []


def test_readers_beside_a_rotating_writer_see_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    stop = threading.Event()
    wrong: list[list[int]] = []

    def look() -> None:
        while not stop.is_set():
            seen = numbers(path, 99)
            if seen != list(range(len(seen))):
                wrong.append(seen)

    with opened(path, size=5000, files=99) as log:  # files that are renamed again and again while they are opened
        reader = threading.Thread(target=look)
        reader.start()
        for n in range(2000):
            log.record(entry(n))
            if n % 20 == 0:
                log.flush()
        log.flush()
        stop.set()
        reader.join()
    assert wrong == []
    assert numbers(path, 99) == list(range(2000))


def test_files_are_opened_again_if_two_rotations_pass_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has removed the oldest one only, so far: the first file that was opened was renamed once."""
    path, real = tmp_path / "audit.log", files.open_for_reading
    for number, text in enumerate(("newest", "newer", "older", "oldest")):
        files.numbered(path, number).write_text(text)

    def first() -> None:
        files.rotate(path, 3)
        path.write_text("next")

    def begin_second() -> None:
        files.numbered(path, 2).rename(files.numbered(path, 3))

    steps = iter((first, begin_second))

    def open_for_reading(which: Path) -> BinaryIO:
        if which.suffix in (".2", ".3") and (step := next(steps, None)):
            step()
        return real(which)

    monkeypatch.setattr(files, "open_for_reading", open_for_reading)
    with contextlib.ExitStack() as stack:
        assert [file.read() for file in files.open_all(path, 3, stack)] == [b"next", b"newest", b"newer"]
