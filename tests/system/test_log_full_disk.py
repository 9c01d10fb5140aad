"""The log on a disk that is really full: a small tmpfs in a mount namespace of a child."""

from __future__ import annotations

import os
from pathlib import Path

from insula.container.log import LogWriter
from insula.kernel import syscalls
from insula.model.stream import Kind
from tests.forked import forked
from tests.support.logs import read_log


def test_full_tmpfs(tmp_path: Path) -> None:
    def child() -> tuple[int, list[bytes], int]:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", tmp_path, "tmpfs", 0, "size=64k")
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(32 << 10))
        writer = LogWriter(str(tmp_path), 1 << 20, 2)
        for _ in range(10):
            writer.write(Kind.STDOUT, b"a" * 10000)
        dropped = writer.dropped
        os.unlink(ballast)
        writer.write(Kind.STDERR, b"room again")
        return dropped, [r.data for r in read_log(str(tmp_path))], writer.dropped

    dropped, records, finally_dropped = forked(child)
    assert 0 < dropped == finally_dropped
    assert dropped % 10000 == 0
    assert records[-1] == b"room again"
    assert records[:-1] == [b"a" * 10000] * (10 - dropped // 10000)
    assert len(records) > 1


def test_log_opened_on_a_disk_without_room_for_a_file(tmp_path: Path) -> None:
    def child() -> tuple[int, list[bytes]]:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", tmp_path, "tmpfs", 0, "nr_inodes=2")
        (tmp_path / "last").touch()
        writer = LogWriter(str(tmp_path), 1 << 20, 2)
        writer.write(Kind.STDOUT, b"lost")
        os.unlink(tmp_path / "last")
        writer.write(Kind.STDOUT, b"kept")
        return writer.dropped, [r.data for r in read_log(str(tmp_path))]

    assert forked(child) == (4, [b"kept"])


def test_output_moved_on_a_full_disk_is_dropped_and_returned(tmp_path: Path) -> None:
    def child() -> tuple[bytes, int, bytes]:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", tmp_path, "tmpfs", 0, "size=16k")
        reading, writing = os.pipe()
        writer = LogWriter(str(tmp_path), 1 << 20, 2)
        got = b""
        for _ in range(4):
            os.write(writing, b"x" * 8000)
            got += writer.move(Kind.STDOUT, reading, 32768)
        os.close(writing)
        assert writer.move(Kind.STDOUT, reading, 32768) == b""
        return got, writer.dropped, b"".join(record.data for record in read_log(str(tmp_path)))

    got, dropped, logged = forked(child)
    assert got == b"x" * 32000
    assert dropped and len(logged) + dropped == 32000
