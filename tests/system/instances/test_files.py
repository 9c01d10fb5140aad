"""Files in and out: the same names, bytes and attributes in a container and in a machine."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.support.images import member, tar
from tests.system.instances.conftest import LONG, Kind


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with files of all kinds that there are on a host: modes, links, times, holes and extended attributes."""
    tree = tmp_path_factory.mktemp("files") / "tree"
    (tree / "sub/deep").mkdir(parents=True)
    (tree / "sub").chmod(0o751)
    (tree / "large").write_bytes(os.urandom(1 << 20))
    (tree / "sub/small").write_text("small\n")
    (tree / "sub/small").chmod(0o4640)
    os.utime(tree / "sub/small", (1e9, 1e9))
    os.link(tree / "sub/small", tree / "sub/hard")
    (tree / "link").symlink_to("sub/small")
    (tree / "broken").symlink_to("/nowhere")
    with (tree / "holes").open("wb") as file:
        file.seek(8 << 20)
        file.write(b"end")
    os.mkfifo(tree / "fifo")
    os.setxattr(tree / "large", "user.note", b"kept")
    return tree


def test_a_tree_in_and_out(kind: Kind, sleeper: str, tree: Path, tmp_path: Path) -> None:
    kind.cli.ok("cp", tree, f"{sleeper}:/data", timeout=LONG)
    script = (
        "cd /data; stat -c '%a %u:%g %s %h %N' sub sub/small link broken holes; stat -c %Y sub/small; "
        "test sub/small -ef sub/hard && echo same; test -p fifo && echo fifo; sha256sum large | cut -c 1-64"
    )
    inside = kind.cli.ok("exec", sleeper, "sh", "-c", script).splitlines()
    assert inside[:5] == [
        "751 0:0 4096 3 sub",
        "4640 0:0 6 2 sub/small",
        "777 0:0 9 1 'link' -> 'sub/small'",
        "777 0:0 8 1 'broken' -> '/nowhere'",
        f"644 0:0 {(8 << 20) + 3} 1 holes",
    ]
    assert inside[5:7] == ["1000000000", "same"]
    assert int(kind.cli.ok("exec", sleeper, "du", "-k", "/data/holes").split()[0]) < 1024, "its holes are holes"
    kind.cli.ok("cp", f"{sleeper}:/data", tmp_path / "back", timeout=LONG)
    back = tmp_path / "back"
    assert (back / "large").read_bytes() == (tree / "large").read_bytes()
    assert (back / "sub/small").stat().st_mtime == 1e9
    assert (back / "sub/small").stat().st_ino == (back / "sub/hard").stat().st_ino
    assert (back / "sub/small").stat().st_mode & 0o777 == 0o640
    assert os.readlink(back / "link") == "sub/small" and os.readlink(back / "broken") == "/nowhere"
    assert (back / "holes").stat().st_blocks < 2048
    assert not os.path.exists(back / "fifo"), "a pipe is no file"


def test_the_files_of_one_that_does_not_run(kind: Kind, name: str, tree: Path, tmp_path: Path) -> None:
    """What is copied in is there when it runs again, and what it has written can be copied out."""
    kind.begin(name, "busybox", "sleep", "1000")
    kind.cli.ok("stop", "-t", "0", name, timeout=LONG)
    kind.cli.ok("cp", tree, f"{name}:/data", timeout=LONG)
    kind.cli.ok("start", name, timeout=LONG)
    assert kind.cli.ok("exec", name, "cat", "/data/sub/small") == "small"
    kind.cli.ok("exec", name, "sh", "-c", "echo more > /data/more; chown 7:8 /data/more; sync")
    kind.cli.ok("stop", "-t", "0", name, timeout=LONG)
    (tmp_path / "in").write_text("in\n")
    kind.cli.ok("cp", tmp_path / "in", f"{name}:/data", timeout=LONG)
    kind.cli.ok("cp", f"{name}:/data", tmp_path / "back", timeout=LONG)
    assert (tmp_path / "back/more").read_text() == "more\n" and (tmp_path / "back/in").read_text() == "in\n"
    assert (tmp_path / "back/large").read_bytes() == (tree / "large").read_bytes()
    exported = kind.cli.raw("export", name, timeout=LONG)
    with tarfile.open(fileobj=io.BytesIO(exported.stdout)) as archive:
        assert {"data/more", "data/in", "bin/busybox"} <= {each.name.removeprefix("./") for each in archive}
        owner = next(each for each in archive if each.name.endswith("data/more"))
    assert (owner.uid, owner.gid) == (7, 8)
    assert "there is no '/nothing'" in kind.cli.fails("cp", f"{name}:/nothing", tmp_path / "none")
    assert kind.status(name)["state"] == "exited"
    kind.cli.ok("start", name, timeout=LONG)
    assert kind.cli.ok("exec", name, "cat", "/data/in", "/data/more") == "in\nmore"


def test_tar_streams_with_owners(kind: Kind, sleeper: str) -> None:
    """`cp -` passes on what an archive says: owners, and devices are refused or left out."""
    packed = tar(member("owned", b"x", uid=1000, gid=1001, mode=0o600), member("many"), member("many/a", b"a"))
    assert kind.cli.raw("cp", "-", f"{sleeper}:/tmp", stdin=packed, timeout=LONG).returncode == 0
    assert kind.cli.ok("exec", sleeper, "stat", "-c", "%u:%g %a", "/tmp/owned") == "1000:1001 600"
    done = kind.cli.raw("cp", f"{sleeper}:/tmp/owned", "-", timeout=LONG)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        [found] = archive.getmembers()
        assert (found.uid, found.gid, found.mode, found.size) == (1000, 1001, 0o600, 1)


@pytest.mark.parametrize("name", ["../../../tmp/insula-test-escape", "a/../../../tmp/insula-test-escape"])
def test_archives_that_lead_out_are_refused(kind: Kind, sleeper: str, name: str) -> None:
    done = kind.cli.raw("cp", "-", f"{sleeper}:/tmp", stdin=tar(member(name, b"evil")), timeout=LONG)
    assert done.returncode == 1 and b"leads out of the target" in done.stderr
    assert not Path("/tmp/insula-test-escape").exists()


def test_links_lead_to_its_own_files(kind: Kind, sleeper: str, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("from outside")
    kind.cli.ok("exec", sleeper, "sh", "-c", "ln -sfn ../../../../etc /trap; ln -sfn /proc/1/root/etc /proc-trap")
    kind.cli.ok("cp", tmp_path / "own", f"{sleeper}:/trap/insula-test-escape")
    assert kind.cli.ok("exec", sleeper, "cat", "/etc/insula-test-escape") == "from outside"
    assert not Path("/etc/insula-test-escape").exists()
    kind.cli.ok("cp", f"{sleeper}:/trap/hostname", tmp_path / "hostname")
    assert (tmp_path / "hostname").read_text() == f"{sleeper}\n"
    assert "/proc-trap/new" in kind.cli.fails("cp", tmp_path / "own", f"{sleeper}:/proc-trap/new")


def test_errors(kind: Kind, sleeper: str, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "file").write_text("x")
    kind.cli.ok("exec", sleeper, "sh", "-c", "echo precious > /precious; mkdir -p /full/file")
    for words, what in (
        ((f"{sleeper}:/nothing", tmp_path / "x"), "there is no '/nothing' in the instance"),
        ((tmp_path / "tree", f"{sleeper}:/precious"), "'/precious' is no directory in the instance"),
        ((tmp_path / "file", f"{sleeper}:/full"), "'/full/file' is a directory here, but not in the archive"),
        ((tmp_path / "file", f"{sleeper}:/dev/null"), "'/dev/null' is a device"),
        ((f"{sleeper}:/dev/null", tmp_path / "null"), "/dev/null is neither file, directory nor link"),
    ):
        assert kind.cli.fails("cp", *words) == what
    assert kind.cli.ok("exec", sleeper, "cat", "/precious") == "precious"
    assert os.listdir(tmp_path / "tree") == [] and not (tmp_path / "null").exists()


def test_files_on_a_tmpfs_of_a_read_only_instance(kind: Kind, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in memory")
    (tmp_path / "large").write_bytes(os.urandom(1 << 20))
    kind.begin(name, "--read-only", "--tmpfs", "/t:size=256k", "busybox", "sleep", "600")
    kind.cli.ok("cp", tmp_path / "file", f"{name}:/t/file")
    assert kind.cli.ok("exec", name, "cat", "/t/file") == "in memory"
    assert kind.cli.fails("cp", tmp_path / "file", f"{name}:/root/file") == "'/root/file' is read-only"
    assert (
        kind.cli.fails("cp", tmp_path / "large", f"{name}:/t/file")
        == "copying '/t/file' failed: No space left on device"
    )
    assert kind.cli.ok("exec", name, "sh", "-c", "ls -A /t; cat /t/file") == "file\nin memory"


def test_export(kind: Kind, sleeper: str) -> None:
    kind.cli.ok("exec", sleeper, "sh", "-c", "echo ours > /exported; chown 5:6 /exported; rm -f /etc/group")
    done = kind.cli.raw("export", sleeper, timeout=LONG)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        found = {each.name.removeprefix("./"): each for each in archive}
    assert {"bin/busybox", "exported", "etc/passwd", "proc", "sys", "dev"} <= set(found)
    assert "etc/group" not in found
    assert (found["exported"].uid, found["exported"].gid) == (5, 6)
    assert not [name for name in found if name.startswith(("proc/", "sys/", "dev/"))]
