"""Removal of hostile trees, and reading of files that should be records."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from insula.container.service.run_directory import ExitRecord, Launch, ProcessState, RunDirectory
from insula.image.staging import sweep
from insula.kernel import records, trees
from tests.support import zoo

DEEP = 3000  # deeper than Python recurses, and with such names longer than a path may be


def test_trees_of_any_depth_and_name_are_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("stays")
    top = tmp_path / "top"
    zoo.deep(top, DEEP)
    for name in (b"\xff\xfe", b"a\nb", b"-rf", b" ", b"*"):
        os.mkdir(bytes(top) + b"/" + name)
    (top / "link").symlink_to(outside)
    os.mkfifo(top / "fifo", 0)
    trees.remove(top)
    assert os.listdir(tmp_path) == ["outside"]
    trees.remove(top)  # nothing is there


def test_a_small_tree_is_removed_without_a_process(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "stays").touch()
    top = tmp_path / "top"
    (top / "a" / "b" / "c").mkdir(parents=True)
    for name in (b"\xff\xfe", b"a\nb", b"-rf"):
        os.mkdir(bytes(top) + b"/" + name, 0)
    (top / "a" / "link").symlink_to(outside)
    (top / "link").symlink_to(top)
    os.mkfifo(top / "a" / "fifo", 0)
    (top / "a" / "file").write_text("content")
    assert trees.remove_small(top)
    assert os.listdir(tmp_path) == ["outside"] and os.listdir(outside) == ["stays"]
    assert trees.remove_small(top), "nothing is there"


def test_a_large_tree_is_left_to_rm(tmp_path: Path) -> None:
    """Too many entries, too deep, no directory, a link to one, another file system."""
    (many := tmp_path / "many" / "below").mkdir(parents=True)
    for number in range(101):
        (many / str(number)).touch()
    zoo.deep(tmp_path / "deep", DEEP)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(many)
    for name in ("many", "deep", "file", "link"):
        assert not trees.remove_small(tmp_path / name), name
    assert len(os.listdir(many)) == 101 and sorted(os.listdir(tmp_path)) == ["deep", "file", "link", "many"]
    assert not trees.remove_small("/proc/1")
    for name in ("many", "deep", "file", "link"):
        trees.remove(tmp_path / name)
    assert not os.listdir(tmp_path)


def test_files_that_cannot_be_removed_are_reported(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="/proc/1"):
        trees.remove("/proc/1/status")


def test_a_sweep_removes_everything(tmp_path: Path) -> None:
    zoo.deep(tmp_path / "tmpdir", DEEP)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/")
    sweep(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_record_is_a_regular_file_or_an_error(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"content" * 10_000)
    assert records.read(good) == b"content" * 10_000
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(good)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    os.truncate(tmp_path / "good", records.LIMIT + 1)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(OSError):
            records.read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"null",
        b"3",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"id": 1}',
        b'{"id": "x", "pid": "1"}',
        b"\0" * 50,
    ],
)
def test_a_damaged_record_of_a_container_is_none(tmp_path: Path, content: bytes) -> None:
    bundle = bundle_in(tmp_path)
    assert bundle.damaged() == []
    for name in ("launch.json", "state.json", "exit.json"):
        Path(bundle.path, name).write_bytes(content)
    assert (bundle.launch(), bundle.state(), bundle.exit()) == (None, None, None)
    assert bundle.damaged() == ["launch.json", "state.json", "exit.json"]
    assert bundle.processes() == []


def test_a_record_of_a_later_version_is_read(tmp_path: Path) -> None:
    bundle = bundle_in(tmp_path)
    state = Path(bundle.path, "state.json")
    state.write_text(state.read_text().replace("{", '{"later": 1, ', 1))
    assert bundle.state() == ProcessState("box", 7, 8)
    assert bundle.damaged() == []


def test_a_run_directory_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    bundle = bundle_in(tmp_path)
    zoo.deep(Path(bundle.path, "exit.json.d"))
    bundle.remove()
    assert not os.path.exists(bundle.path)
    bundle.remove()


def bundle_in(path: Path) -> RunDirectory:
    """One with all of its records."""
    (path / "containers").mkdir()
    bundle = RunDirectory(str(path), "box")
    bundle.create(Launch("box", {}, ["/lower"], "/upper", "/work", 1 << 30, "insula/acme/box"))
    bundle.write_state(ProcessState("box", 7, 8))
    bundle.write_exit(ExitRecord(0, None, False, 1.5))
    assert bundle.launch() and bundle.state() and bundle.exit()
    return bundle
