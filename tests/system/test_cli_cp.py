"""insula cp: files and trees in both directions, and that nothing of the host can be reached through it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.support.cli import Cli


@pytest.fixture
def web(cli: Cli) -> Cli:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    return cli


def test_a_file_there_and_back(web: Cli, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "data").chmod(0o751)
    web.ok("cp", tmp_path / "data", "web:/root/copy")
    assert web.ok("exec", "web", "stat", "-c", "%a %s", "/root/copy") == f"751 {len(data)}"
    web.ok("cp", "web:/root/copy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o751


def test_a_tree_into_a_directory(web: Cli, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_text("deep")
    (tree / "link").symlink_to("a/b/file")
    web.ok("cp", tree, "web:/tmp")
    assert web.ok("exec", "web", "cat", "/tmp/tree/link") == "deep"
    web.ok("cp", "web:/tmp/tree", tmp_path / "back")
    assert (tmp_path / "back" / "a" / "b" / "file").read_text() == "deep"
    assert (tmp_path / "back" / "link").is_symlink()


def test_files_written_arrive_as_the_users_inside(web: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    web.ok("cp", tmp_path / "file", "web:/root/file")
    assert web.ok("exec", "web", "stat", "-c", "%u:%g", "/root/file") == "0:0"


def test_a_directory_takes_no_files_place(web: Cli, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    web.ok("exec", "web", "sh", "-c", "echo precious > /file")
    assert "/file" in web.fails("cp", tmp_path / "tree", "web:/file")
    assert web.ok("exec", "web", "cat", "/file") == "precious"


def test_content_and_paths_from_the_root(web: Cli, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    web.ok("exec", "web", "mkdir", "/site")
    web.ok("cp", f"{tmp_path}/tree/.", "web:site")
    assert web.ok("exec", "web", "ls", "/site") == "file"
    (tmp_path / "back").mkdir()
    web.ok("cp", "web:site/.", tmp_path / "back")
    assert os.listdir(tmp_path / "back") == ["file"]


def test_a_device_is_no_file(web: Cli, tmp_path: Path) -> None:
    assert "/dev/null" in web.fails("cp", "web:/dev/null", tmp_path / "null")
    assert not (tmp_path / "null").exists()


def test_tar_streams(web: Cli) -> None:
    done = web.raw("cp", "web:/etc", "-")
    assert done.returncode == 0
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert any(name.endswith("etc/passwd") for name in archive.getnames())


@pytest.mark.parametrize("link", ["/etc", "../../../../../../etc", "/proc/1/root/etc"])
def test_links_inside_lead_nowhere_outside(web: Cli, tmp_path: Path, link: str) -> None:
    """CVE-2018-15664 and CVE-2019-14271: what a link names must be looked up with the instance's root."""
    (tmp_path / "own").write_text("from outside")
    web.ok("exec", "web", "ln", "-s", link, "/trap")
    before = sorted(os.listdir("/etc"))
    web.run("cp", tmp_path / "own", "web:/trap/insula-test-escape")
    assert sorted(os.listdir("/etc")) == before
    web.run("cp", "web:/trap/hostname", tmp_path / "hostname")
    if (tmp_path / "hostname").exists() and not (tmp_path / "hostname").is_symlink():
        assert (tmp_path / "hostname").read_text().strip() == "web"


def test_hostile_archives_stay_inside(web: Cli, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("../../../../../../tmp/insula-test-escape", "/tmp/insula-test-escape"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    done = web.raw("cp", "-", "web:/tmp", stdin=stream.getvalue())
    assert not Path("/tmp/insula-test-escape").exists()
    if done.returncode:
        assert done.stderr.startswith(b"error: ")


def test_bad_paths(web: Cli, tmp_path: Path) -> None:
    assert "no-such" in web.fails("cp", "web:/no-such", tmp_path / "x")
    assert "no-such" in web.fails("cp", tmp_path / "no-such", "web:/tmp")
    assert "no-such" in web.fails("cp", "no-such:/etc/passwd", tmp_path / "x")
    web.fails("cp", "a", "b", status=2)
    assert list(tmp_path.iterdir()) == []
