"""The log of an instance: order, bounds, rotation under a reader, torn tails, tail and a full disk."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.container import log
from insula.container.log import MIN_SIZE, LogEntry, LogReader, LogWriter
from insula.model.stream import Kind
from tests.forked import forked
from tests.support.logs import read_log
from tests.support.wait import patiently

OUT, ERR = Kind.STDOUT, Kind.STDERR
HEAD = 13


def written(directory: Path, *pieces: bytes, max_size: int = 1 << 20, max_files: int = 3) -> LogWriter:
    writer = LogWriter(str(directory), max_size, max_files)
    for piece in pieces:
        writer.write(OUT, piece)
    return writer


def text(directory: Path, **how: int) -> bytes:
    return b"".join(record.data for record in read_log(str(directory), **how))  # type: ignore[arg-type]


def test_kinds_times_and_order(tmp_path: Path) -> None:
    before = time.time_ns()
    writer = LogWriter(str(tmp_path), 1 << 20, 3)
    writer.write(OUT, b"one\n")
    writer.write(ERR, b"two\n")
    writer.close()
    first, second = read_log(str(tmp_path))
    assert (first.kind, first.data, second.kind, second.data) == (OUT, b"one\n", ERR, b"two\n")
    assert before <= first.time_ns <= second.time_ns <= time.time_ns()
    assert os.stat(tmp_path / "log").st_mode & 0o777 == 0o600


def test_a_missing_log_is_empty_and_may_appear(tmp_path: Path) -> None:
    with LogReader(str(tmp_path / "later")) as reader:
        assert reader.poll() == []
        (tmp_path / "later").mkdir()
        assert reader.poll() == []
        written(tmp_path / "later", b"here").close()
        assert [r.data for r in reader.poll()] == [b"here"]
        assert reader.poll() == []


def test_the_writer_refuses_invalid_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        LogWriter(str(tmp_path), MIN_SIZE - 1, 1)
    with pytest.raises(ValueError):
        LogWriter(str(tmp_path), MIN_SIZE, 0)
    with pytest.raises(FileNotFoundError):
        LogWriter(str(tmp_path / "none"), MIN_SIZE, 1)
    with closing(LogWriter(str(tmp_path), MIN_SIZE, 1)) as writer, pytest.raises(ValueError):
        writer.write(Kind.EXIT, b"")


def test_long_output_is_cut_in_records_and_whole(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(5_000_000)
    written(tmp_path, data, max_size=16 << 20).close()
    assert text(tmp_path) == data


@given(pieces=st.lists(st.binary(min_size=1, max_size=3000), max_size=60), files=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_rotation_keeps_the_end(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], files: int) -> None:
    directory = tmp_path_factory.mktemp("log")
    writer = written(directory, *pieces, max_size=MIN_SIZE, max_files=files)
    writer.close()
    sizes = [path.stat().st_size for path in directory.iterdir()]
    assert len(sizes) <= files
    assert all(size <= MIN_SIZE for size in sizes)
    left = [record.data for record in read_log(str(directory))]
    assert left == pieces[len(pieces) - len(left) :]
    kept = sum(len(p) + HEAD for p in left)
    # at most one file's worth more than the last (files - 1) full files is missing
    assert kept == sum(len(p) + HEAD for p in pieces) or kept > (files - 1) * (MIN_SIZE - 3000 - HEAD)
    assert writer.dropped == 0


@given(data=st.data(), pieces=st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_torn_tail(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, pieces: list[bytes]) -> None:
    """Wherever the file ends, readers see the whole records before it, and a new writer goes on behind those."""
    directory = tmp_path_factory.mktemp("log")
    written(directory, *pieces).close()
    path = directory / "log"
    cut = data.draw(st.integers(0, path.stat().st_size))
    os.truncate(path, cut)
    ends = [sum(len(p) + HEAD for p in pieces[: n + 1]) for n in range(len(pieces))]
    if cut in ends and data.draw(st.booleans()):  # what a power failure may leave
        with path.open("ab") as file:
            file.write(bytes(data.draw(st.integers(1, 5000))))
    whole = pieces[: sum(end <= cut for end in ends)]
    with LogReader(str(directory)) as reader:
        assert [r.data for r in reader.poll()] == whole
        written(directory, b"after").close()
        assert [r.data for r in reader.poll()] == [b"after"]
    assert [r.data for r in read_log(str(directory))] == [*whole, b"after"]


@given(
    pieces=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=8).map(str.encode), max_size=30),
    lines=st.integers(0, 12),
)
@settings(max_examples=200, deadline=None)
def test_tail_counts_lines_as_tail_does(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], lines: int
) -> None:
    directory = tmp_path_factory.mktemp("log")
    written(directory, *pieces).close()
    expected = b"".join(pieces).splitlines(keepends=True)
    assert text(directory, tail=lines) == b"".join(expected[-lines:] if lines else [])


def test_tail_reaches_back_over_rotated_files_and_then_follows(tmp_path: Path) -> None:
    lines = [b"line %d\n" % n for n in range(600)]
    writer = written(tmp_path, *lines, max_size=MIN_SIZE, max_files=4)
    assert (tmp_path / "log.2").exists()
    assert text(tmp_path, tail=300) == b"".join(lines[-300:])
    with LogReader(str(tmp_path), tail=0) as reader:
        assert reader.poll() == []
        writer.write(OUT, b"new\n")
        assert [r.data for r in reader.poll()] == [b"new\n"]
    writer.close()


def test_since(tmp_path: Path) -> None:
    writer = written(tmp_path, b"old")
    time.sleep(0.002)
    now = time.time_ns()
    writer.write(OUT, b"new")
    assert text(tmp_path, since_ns=now) == b"new"
    writer.close()


@given(
    steps=st.lists(st.one_of(st.integers(1, 2500), st.just(0)), max_size=80),
    files=st.integers(1, 4),
    poll_rarely=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_reader_follows_over_rotations(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], files: int, poll_rarely: bool
) -> None:
    """0 is a poll, else a write. Nothing comes twice or out of order, and frequent polls lose nothing."""
    directory = tmp_path_factory.mktemp("log")
    writer = LogWriter(str(directory), MIN_SIZE, files)
    count = 0
    with LogReader(str(directory)) as reader:
        seen: list[LogEntry] = []

        def drain() -> None:
            while records := reader.poll():
                seen.extend(records)

        for size in steps:
            if size:
                writer.write(OUT, b"%08d" % count + b"x" * size)
                count += 1
            if not poll_rarely or not size:
                drain()
        drain()
    writer.close()
    numbers = [int(record.data[:8]) for record in seen]
    assert numbers == sorted(set(numbers))
    assert not count or numbers[-1] == count - 1
    if not poll_rarely:
        assert numbers == list(range(count))


def test_a_crash_between_two_renames_hides_no_file(tmp_path: Path) -> None:
    lines = [b"line %d\n" % n for n in range(600)]
    written(tmp_path, *lines, max_size=MIN_SIZE, max_files=9).close()
    names = sorted(tmp_path.iterdir(), key=lambda p: int(p.suffix[1:] or 0), reverse=True)
    for path in names[:-1]:  # every rename but the last of a rotation was done
        path.rename(tmp_path / f"log.{int(path.suffix[1:]) + 1}")
    assert text(tmp_path) == b"".join(lines)
    written(tmp_path, b"end", max_size=MIN_SIZE, max_files=20).close()
    assert text(tmp_path) == b"".join(lines) + b"end"


def test_follow_in_another_thread_sees_all(tmp_path: Path) -> None:
    """A writer that rotates as fast as it can, with a reader beside it, and files enough that nothing is lost."""
    total = 3000
    seen: list[int] = []

    def follow() -> None:
        for record in read_log(str(tmp_path), follow=True):
            seen.append(int(record.data[:8]))
            if seen[-1] == total - 1:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    writer = LogWriter(str(tmp_path), MIN_SIZE, 1000)
    for number in range(total):
        writer.write(OUT, b"%08d" % number + b"y" * 200)
    thread.join(patiently(20))
    writer.close()
    assert seen == list(range(total))


def test_kill_of_the_writer_at_any_moment(tmp_path: Path) -> None:
    """Children write and are killed; every log stays readable and each record is one that was written."""
    rng = random.Random(7)
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                writer = LogWriter(str(tmp_path), 1 << 16, 3)
                while True:
                    writer.write(OUT, b"<" + b"z" * rng.randrange(20000) + b">")
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.005, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        writer = LogWriter(str(tmp_path), 1 << 16, 3)
        writer.write(ERR, b"<again>")
        writer.close()
        records = list(read_log(str(tmp_path)))
        assert records[-1].data == b"<again>"
        assert all(r.data[:1] == b"<" and r.data[-1:] == b">" for r in records)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 << 16


def test_full_disk_drops_and_goes_on(tmp_path: Path) -> None:
    """A limit on the size of files (EFBIG, short writes) stands for a full disk, which needs a mount."""

    def child() -> int:
        writer = LogWriter(str(tmp_path), 1 << 20, 2)
        writer.write(OUT, b"before")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        writer.write(OUT, b"x" * 2000)  # a part of it fits
        writer.write(OUT, b"y" * 2000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        writer.write(ERR, b"after")
        return writer.dropped

    assert forked(child) == 4000
    assert [r.data for r in read_log(str(tmp_path))] == [b"before", b"after"]


def test_a_writer_that_is_killed_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Data that it moves is in the pipe or in the log at each moment; the next writer goes on with the same pipe."""
    reading, writing = os.pipe()
    number, dice = 0, random.Random(7)
    for _ in range(100):
        mover = move_in_a_child(tmp_path, reading, writing)
        for _ in range(dice.randrange(1, 300)):
            os.write(writing, b"%d\n" % number)
            number += 1
        os.kill(mover, signal.SIGKILL)
        os.waitpid(mover, 0)
    mover = move_in_a_child(tmp_path, reading, writing)
    os.close(writing)
    assert os.waitpid(mover, 0)[1] == 0, "it came to the end"
    os.close(reading)
    assert text(tmp_path) == b"".join(b"%d\n" % each for each in range(number))


def move_in_a_child(directory: Path, reading: int, writing: int) -> int:
    """The PID of a process that moves what is in the pipe to the log until the pipe ends."""
    if pid := os.fork():
        return pid
    try:
        os.close(writing)
        writer = LogWriter(str(directory), 1 << 20, 9)
        while True:
            try:
                if not writer.move(OUT, reading, 64):
                    os._exit(0)
            except BlockingIOError:
                continue
    finally:
        os._exit(1)


def test_move_reads_sockets_too(tmp_path: Path) -> None:
    source, peer = socket.socketpair()
    writer = LogWriter(str(tmp_path), 1 << 20, 2)
    peer.send(b"over a socket")
    assert writer.move(Kind.STDERR, source.fileno(), 100) == b"over a socket"
    with pytest.raises(BlockingIOError):
        writer.move(Kind.STDERR, source.fileno(), 100)
    peer.close()
    assert writer.move(Kind.STDERR, source.fileno(), 100) == b""
    writer.close()
    source.close()
    assert [record.data for record in read_log(str(tmp_path))] == [b"over a socket"]


@given(
    st.lists(
        st.tuples(st.sampled_from([b"", b"x", b"\n", b"ab\ncd", b"y" * 70_000, b"z\n" * 40_000]), st.integers(1, 3000)),
        max_size=5,
    ),
    st.integers(0, 20_000),
)
@settings(max_examples=40)
def test_tail_over_blocks_of_any_records(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[bytes, int]], lines: int
) -> None:
    """Thousands of tiny records, and such as are longer than a block."""
    directory = tmp_path_factory.mktemp("log")
    writer = LogWriter(str(directory), 1 << 30, 1)
    for piece, times in runs:
        for _ in range(times if len(piece) < 10 else min(times, 3)):
            writer.write(OUT, piece)
    writer.close()
    expected = text(directory).splitlines(keepends=True)
    assert text(directory, tail=lines) == b"".join(expected[-lines:] if lines else [])


def test_a_log_that_was_closed_whole_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart must not take as long as the log is long; another process, and one that finds it changed, reads it."""
    read: list[int] = []
    whole = log._end_of_records

    def looked(fd: int) -> int:
        read.append(fd)
        return whole(fd)

    monkeypatch.setattr(log, "_end_of_records", looked)
    written(tmp_path, b"one\n").close()
    read.clear()
    writer = written(tmp_path, b"two\n")
    assert read == []
    writer.close()
    with (tmp_path / "log").open("ab") as file:
        file.write(b"\x01torn")
    written(tmp_path, b"three\n").close()
    assert len(read) == 1
    assert text(tmp_path) == b"one\ntwo\nthree\n"
