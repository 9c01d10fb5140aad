"""`insula cp`: what comes out of an instance is hostile, and stays where it was sent."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from insula.cli.archive import StreamReader, pack, unpack
from insula.cli.main import main
from insula.model.errors import Failed, Invalid
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


def test_there_and_back(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(os.urandom(200_000))
    (source / "sub" / "file").chmod(0o750)
    (source / "link").symlink_to("/etc/passwd")
    (source / "empty").touch()
    target = tmp_path / "target"
    target.mkdir()
    unpack(StreamReader(pack(str(source), "copy")), str(target))
    copy = target / "copy"
    assert (copy / "sub" / "file").read_bytes() == (source / "sub" / "file").read_bytes()
    assert (copy / "sub" / "file").stat().st_mode & 0o7777 == 0o750
    assert os.readlink(copy / "link") == "/etc/passwd"
    unpack(StreamReader(pack(str(source / "sub" / "file"), "file")), str(tmp_path / "renamed"))
    assert (tmp_path / "renamed").read_bytes() == (source / "sub" / "file").read_bytes()


def test_the_content_of_a_directory(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("x")
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(str(source), "")))) as archive:
        assert archive.getnames() == ["sub", "sub/file"]
    target = tmp_path / "target"
    target.mkdir()
    for _ in range(2):
        assert unpack(StreamReader(pack(str(source), "tree")), str(target), merge=True) == 3
    assert (target / "sub" / "file").read_text() == "x"
    assert [path.name for path in target.iterdir()] == ["sub"]
    assert unpack(reader(tar()), str(target)) == 0


@pytest.mark.parametrize(
    "attack",
    [
        lambda out: [(member(f"x/../../{out.name}"), b"evil")],
        lambda out: [(member("x", tarfile.SYMTYPE, str(out.parent)), b""), (member(f"x/{out.name}"), b"evil")],
        lambda out: [(member("x", tarfile.SYMTYPE, str(out)), b""), (member("x"), b"fine")],
        lambda out: [(member("x", tarfile.LNKTYPE, f"../{out.name}"), b""), (member("x"), b"evil")],
        lambda out: [
            (member("d", tarfile.SYMTYPE, str(out.parent)), b""),
            (member("x", tarfile.LNKTYPE, f"d/{out.name}"), b""),
        ],
    ],
    ids=["dotdot", "through-a-link", "onto-a-link", "hard-link-dotdot", "hard-link-through-a-link"],
)
def test_nothing_is_written_outside(
    tmp_path: Path, attack: Callable[[Path], list[tuple[tarfile.TarInfo, bytes]]]
) -> None:
    outside = tmp_path / "outside" / "precious"
    outside.parent.mkdir()
    outside.write_text("precious")
    target = tmp_path / "target"
    target.mkdir()
    with suppress(Failed):
        unpack(reader(tar(*attack(outside))), str(target))
    assert outside.read_text() == "precious"
    assert outside.stat().st_nlink == 1
    assert list(outside.parent.iterdir()) == [outside]


def test_setuid_and_devices_do_not_come_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tar(
        (member("su", mode=0o4755), b"x"), (member("null", tarfile.CHRTYPE), b""), (member("p", tarfile.FIFOTYPE), b"")
    )
    unpack(reader(data), str(tmp_path))
    assert (tmp_path / "su").stat().st_mode & 0o7777 == 0o755
    assert os.listdir(tmp_path) == ["su"]
    assert capsys.readouterr().err.count("left out") == 2


def test_damaged_and_misplaced(tmp_path: Path) -> None:
    whole = tar((member("x"), b"y" * 5000))
    with pytest.raises(Failed, match="damaged"):
        unpack(reader(b"this is no tar" * 100), str(tmp_path))
    with pytest.raises(Failed, match="damaged"):
        unpack(reader(whole[:2000]), str(tmp_path))
    with pytest.raises(Invalid, match="can't be written to"):
        unpack(reader(whole), str(tmp_path / "missing" / "file"))


def test_the_verb(stub: StubDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.client.instances.run("default", "x", ["true"], name="web", start=False)
    (tmp_path / "local").write_text("from here")
    assert main(["--socket", str(stub.path), "cp", str(tmp_path / "local"), "web:/srv/there"]) == 0
    with tarfile.open(fileobj=io.BytesIO(stub.cloud.instances.uploads["/srv"])) as archive:
        assert archive.getnames() == ["there"]
    stub.cloud.instances.archives["/etc/x"] = [tar((member("x"), b"from there"))]
    assert main(["--socket", str(stub.path), "cp", "web:/etc/x", str(tmp_path)]) == 0
    assert (tmp_path / "x").read_text() == "from there"
    assert main(["--socket", str(stub.path), "cp", "web:/nope", str(tmp_path)]) == 1
    assert main(["--socket", str(stub.path), "cp", str(tmp_path / "nope"), "web:/x"]) == 1
    assert capsys.readouterr().err.count("; hint: ") == 2
