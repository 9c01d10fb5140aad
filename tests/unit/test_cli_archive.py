"""`insula cp`: data from an instance is hostile, and is written to its target only."""

from __future__ import annotations

import copy
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.cli.archive import StreamReader, pack, unpack
from insula.cli.main import main
from insula.model.errors import Conflict, Failed, Invalid, NotFound, Unavailable
from tests.unit.conftest import StubDaemon


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def reader(data: bytes, step: int = 1000) -> StreamReader:
    return StreamReader(iter([data[i : i + step] for i in range(0, len(data), step)]))


def test_files_are_unchanged_after_a_copy_in_and_out(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(os.urandom(600_000))
    (source / "sub" / "file").chmod(0o750)
    (source / "link").symlink_to("/etc/passwd")
    (source / "empty").touch()
    target = tmp_path / "target"
    target.mkdir()
    unpack(StreamReader(pack(str(source), "copy")), str(target), "copy")
    copy = target / "copy"
    assert (copy / "sub" / "file").read_bytes() == (source / "sub" / "file").read_bytes()
    assert (copy / "sub" / "file").stat().st_mode & 0o7777 == 0o750
    assert os.readlink(copy / "link") == "/etc/passwd"
    unpack(StreamReader(pack(str(source / "sub" / "file"), "file")), str(tmp_path / "renamed"), "file")
    assert (tmp_path / "renamed").read_bytes() == (source / "sub" / "file").read_bytes()


def test_data_before_an_error_is_read_first() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"abc"
        raise Unavailable("insulad went away", "see its log")

    stream = StreamReader(pieces())
    assert (stream.read(2), stream.read(100)) == (b"ab", b"c")
    for _ in range(2):
        with pytest.raises(Unavailable, match="went away"):
            stream.read(1)


def test_the_content_of_a_directory(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("x")
    (tmp_path / "link").symlink_to("tree")
    for path in (f"{source}", f"{source}/", f"{source}/.", f"{tmp_path}/link/"):
        with tarfile.open(fileobj=io.BytesIO(b"".join(pack(path, "tree")))) as archive:
            assert archive.getnames() == ["tree", "tree/sub", "tree/sub/file"], path
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(f"{tmp_path}/link", "link")))) as archive:
        assert archive.getmembers()[0].issym()
    target = tmp_path / "target"
    target.mkdir()
    for _ in range(2):
        assert unpack(StreamReader(pack(str(source), "tree")), str(target), "") == 3
    assert (target / "sub" / "file").read_text() == "x"
    assert [path.name for path in target.iterdir()] == ["sub"]
    assert unpack(StreamReader(pack(str(source), "tree")), str(tmp_path / "new"), "") == 3
    assert (tmp_path / "new" / "sub" / "file").read_text() == "x"
    assert unpack(reader(tar()), str(target), "") == 0


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
        file.write(b"x" * (8 << 20))
    assert max(len(piece) for piece in pack(str(tmp_path / "large"), "large")) <= 1 << 18


def attack(out: Path, *members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """One tree ``t`` with these below it, in which OUT stands for the directory outside."""
    for info, _ in members:
        info.name = f"t/{info.name}"
        info.linkname = info.linkname.replace("OUT", str(out))
    return tar((member("t", tarfile.DIRTYPE, mode=0o755), b""), *members)


@pytest.mark.parametrize(
    ("members", "refused"),
    [
        ([(member("../../outside/precious"), b"evil")], "leads out"),
        ([(member("x", tarfile.SYMTYPE, "OUT"), b""), (member("x/precious"), b"evil")], "is no directory"),
        ([(member("x", tarfile.SYMTYPE, "OUT"), b""), (member("x/new/file"), b"evil")], "is no directory"),
        ([(member("x", tarfile.SYMTYPE, "OUT/precious"), b""), (member("x"), b"evil")], ""),
        ([(member("x", tarfile.LNKTYPE, "t/../../outside/precious"), b""), (member("x"), b"evil")], "leads out"),
        (
            [(member("d", tarfile.SYMTYPE, "OUT"), b""), (member("x", tarfile.LNKTYPE, "t/d/precious"), b"")],
            "is no directory",
        ),
    ],
    ids=["dotdot", "through-a-link", "made-through-a-link", "onto-a-link", "hard-link-dotdot", "hard-link-via-a-link"],
)
def test_nothing_is_written_outside(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], refused: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / "precious"
    precious.write_text("precious")

    def state() -> tuple[list[str], str, int]:
        return sorted(os.listdir(outside)), precious.read_text(), precious.stat().st_nlink

    untouched = state()
    data = attack(outside, *copy.deepcopy(members))
    (tmp_path / "target").mkdir()
    if refused:
        with pytest.raises((Invalid, Conflict), match=refused):
            unpack(reader(data), str(tmp_path / "target"), "t")
    else:
        unpack(reader(data), str(tmp_path / "target"), "t")
        assert (tmp_path / "target" / "t" / "x").read_text() == "evil", "in place of the link"
    assert state() == untouched
    (tmp_path / "naive").mkdir()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:  # the control: who follows names writes outside
        archive.extraction_filter = lambda member, path: member  # what newer ones take no longer by themselves
        archive.extractall(tmp_path / "naive")
    assert state() != untouched


def test_all_of_it_lies_below_one_name(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="'other' is not below 't'"):
        unpack(reader(tar((member("t", tarfile.DIRTYPE), b""), (member("other"), b"evil"))), str(tmp_path), "t")
    assert os.listdir(tmp_path) == ["t"]


def test_setuid_and_devices_do_not_come_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tar(
        (member("t", tarfile.DIRTYPE, mode=0o7755), b""),
        (member("t/su", mode=0o4755), b"x"),
        (member("t/null", tarfile.CHRTYPE), b""),
        (member("t/p", tarfile.FIFOTYPE), b""),
    )
    for keep in (False, os.geteuid() == 0):
        unpack(reader(data), str(tmp_path), "t", keep=keep)
        assert (tmp_path / "t" / "su").stat().st_mode & 0o7777 == 0o755
        assert (tmp_path / "t").stat().st_mode & 0o7777 == 0o755
        assert os.listdir(tmp_path / "t") == ["su"]
        assert capsys.readouterr().err.count("left out") == 2


def test_damaged_archives_and_wrong_targets_are_refused(tmp_path: Path) -> None:
    whole = tar((member("x"), b"y" * 5000))
    with pytest.raises(Failed, match="damaged"):
        unpack(reader(b"this is no tar" * 100), str(tmp_path), "x")
    (tmp_path / "x").write_text("what was there")
    for cut in (2000, 512 + 5120):  # in the data, and before the end marker
        with pytest.raises(Failed, match="damaged"):
            unpack(reader(whole[:cut]), str(tmp_path), "x")
        assert (tmp_path / "x").read_text() == ("what was there" if cut == 2000 else "y" * 5000)
        assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(Invalid, match="can't be written to"):
        unpack(reader(whole), str(tmp_path / "missing" / "file"), "x")


@pytest.mark.parametrize("target", ["nodir/", "file/", "file"])
def test_targets_that_cp_refuses(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("precious")
    directory = target == "file"
    with pytest.raises((NotFound, Conflict), match="directory"):
        unpack(
            reader(tar((member("x", tarfile.DIRTYPE if directory else tarfile.REGTYPE), b""))),
            f"{tmp_path}/{target}",
            "x",
        )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "precious")]


def test_targets_that_cp_takes(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "to-dir").symlink_to("dir")
    for number, (target, found) in enumerate({"to-dir": "dir/x", "dir/": "dir/x", "new": "new"}.items()):
        unpack(reader(tar((member("x"), b"%d" % number))), f"{tmp_path}/{target}", "x")
        assert (tmp_path / found).read_text() == str(number)
    unpack(
        reader(tar((member("x", tarfile.DIRTYPE, mode=0o755), b""), (member("x/y"), b"z"))), f"{tmp_path}/newdir/", "x"
    )
    assert (tmp_path / "newdir" / "y").read_text() == "z"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owners_are_kept_if_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("x")
    for path in ("file", "link"):
        os.chown(tmp_path / path, 1234, 5678, follow_symlinks=False)
        for keep, expected in ((True, (1234, 5678)), (False, (0, 0))):
            data = b"".join(pack(str(tmp_path / path), path, keep=keep))
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                [info] = archive.getmembers()
            assert (info.uid, info.gid) == expected
            unpack(reader(data), str(tmp_path / "out"), path, keep=True)
            assert ((tmp_path / "out").lstat().st_uid, (tmp_path / "out").lstat().st_gid) == expected
            (tmp_path / "out").unlink()
    (tmp_path / "file").chmod(0o640)
    unpack(StreamReader(pack(str(tmp_path / "file"), "f", keep=True)), str(tmp_path / "own"), "f")
    assert ((tmp_path / "own").stat().st_uid, (tmp_path / "own").stat().st_mode & 0o777) == (0, 0o640)


def test_a_forbidden_operation_is_named(tmp_path: Path) -> None:
    """A file system that is full, or read-only: those of /proc take no files at all."""
    with pytest.raises(Failed, match=r"'/proc/x' failed: .*; hint: "):
        unpack(reader(tar((member("x"), b""))), "/proc", "x")
    unpack(reader(tar((member("x"), b""))), str(tmp_path), "x")
    assert (tmp_path / "x").exists()


def test_the_verb(stub: StubDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.client.instances.run("default", "x", ["true"], name="web", start=False)
    (tmp_path / "local").write_text("from here")
    os.mkdir(tmp_path / "tree")
    sent = stub.plane.instances
    for source, path, copied, name in (
        (f"{tmp_path}/local", "/srv/there", "tree", "local"),
        (f"{tmp_path}/tree", "/srv", "tree", "tree"),
        (f"{tmp_path}/tree/.", "/x", "content", "tree"),
    ):
        assert main(["--socket", str(stub.path), "cp", source, f"web:{path}"]) == 0
        with tarfile.open(fileobj=io.BytesIO(sent.uploads[path])) as archive:
            assert archive.getnames() == [name]
        assert sent.copies[path] == copied
    sent.archives["/etc/x"] = [tar((member("x"), b"from there"))]
    assert main(["--socket", str(stub.path), "cp", "web:/etc/x", str(tmp_path)]) == 0
    assert (tmp_path / "x").read_text() == "from there"
    assert main(["--socket", str(stub.path), "cp", "web:/nope", str(tmp_path)]) == 1
    assert main(["--socket", str(stub.path), "cp", str(tmp_path / "nope"), "web:/x"]) == 1
    assert main(["--socket", str(stub.path), "cp", "/dev/null", "web:/x"]) == 1
    assert capsys.readouterr().err.count("; hint: ") == 3


@pytest.mark.parametrize("path", ["web:/", "web:/.", "web:.", "web://"])
def test_the_root_is_its_content(stub: StubDaemon, tmp_path: Path, path: str) -> None:
    stub.client.instances.run("default", "x", ["true"], name="web", start=False)
    whole = [
        tar(
            (member(".", tarfile.DIRTYPE, mode=0o755), b""),
            (member("etc", tarfile.DIRTYPE), b""),
            (member("etc/x"), b"y"),
        )
    ]
    stub.plane.instances.archives |= dict.fromkeys(["/", "/.", "//"], whole)
    for target in ("new", "."):
        assert main(["--socket", str(stub.path), "cp", path, f"{tmp_path}/{target}"]) == 0
        assert (tmp_path / target / "etc" / "x").read_text() == "y"


def test_export(stub: StubDaemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stub.client.instances.run("default", "x", ["true"], name="web", start=False)
    data = tar((member("etc"), b"x"))
    stub.plane.instances.archives["/"] = [data[:700], data[700:]]
    out = tmp_path / "out.tar"
    assert main(["--socket", str(stub.path), "export", "-o", str(out), "web"]) == 0
    assert out.read_bytes() == data
    assert main(["--socket", str(stub.path), "export", "-o", str(tmp_path / "no.tar"), "nope"]) == 1
    assert os.listdir(tmp_path) == ["out.tar", "insulad.sock"] or not (tmp_path / "no.tar").exists()
    assert "no instance nope" in capfd.readouterr().err
    assert main(["--socket", str(stub.path), "export", "web"]) == 0
    assert capfd.readouterr().out.encode() == data
