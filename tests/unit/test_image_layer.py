"""Extraction of layers: what comes out, and that nothing outside of the target ever changes."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.image.layer import Limits, extract
from insula.image.tar import Reader
from insula.model.errors import Invalid
from tests.support.images import member, tar, tree

ME: dict[str, Any] = {"uid": os.getuid(), "gid": os.getgid()}
ROOM = Limits(bytes=1 << 20, entries=100)


def unpack(data: bytes, target: Path, limits: Limits = ROOM, *, plain: bool = False) -> int:
    target.mkdir(exist_ok=True)
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return extract(Reader(io.BytesIO(data).read), fd, limits, plain=plain)
    finally:
        os.close(fd)


def refused(data: bytes, target: Path, why: str, limits: Limits = ROOM) -> None:
    with pytest.raises(Invalid, match=why) as e:
        unpack(data, target, limits)
    assert e.value.hint
    assert "\n" not in str(e.value)


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def test_an_ordinary_layer(tmp_path: Path) -> None:
    data = tar(
        member("./", mode=0o750, mtime=5, **ME),
        member("./bin", mode=0o755, mtime=6, **ME),
        member("./bin/su", b"program", mode=0o4755, mtime=7, **ME),
        member("./bin/sh", linkname="su", mtime=8, **ME),
        member("./bin/login", kind=tarfile.LNKTYPE, linkname="./bin/su", **ME),
        member("./bin/pipe", kind=tarfile.FIFOTYPE, mode=0o620, mtime=9, **ME),
        member("implied/parents/file", b"x" * 5000, mtime=10, **ME),
    )
    assert unpack(data, tmp_path / "t") == 7
    root = tmp_path / "t"
    assert stat.S_IMODE(root.stat().st_mode) == 0o750
    assert (root / "bin/su").read_bytes() == b"program"
    assert stat.S_IMODE((root / "bin/su").stat().st_mode) == 0o4755
    assert (root / "bin/su").samefile(root / "bin/login")
    assert os.readlink(root / "bin/sh") == "su"
    assert stat.S_ISFIFO((root / "bin/pipe").stat().st_mode)
    assert [(root / name).lstat().st_mtime for name in ("", "bin", "bin/su", "bin/sh", "bin/pipe")] == [5, 6, 7, 8, 9]
    assert stat.S_IMODE((root / "implied/parents").stat().st_mode) == 0o755


def test_whiteouts_become_devices(tmp_path: Path) -> None:
    unpack(tar(member("a/.wh.gone", b"", **ME), member(".wh.too", b"", **ME)), tmp_path / "t")
    assert is_whiteout(tmp_path / "t/a/gone")
    assert is_whiteout(tmp_path / "t/too")
    assert {path.name for path in (tmp_path / "t").rglob("*")} == {"a", "gone", "too"}


def test_a_whiteout_spares_what_the_same_layer_has(tmp_path: Path) -> None:
    both = [member("f", b"new", **ME), member(".wh.f", b"", **ME)]
    for number, members in enumerate((both, both[::-1])):
        unpack(tar(*members), tmp_path / str(number))
        assert (tmp_path / str(number) / "f").read_bytes() == b"new"


def test_the_last_of_equal_names_wins(tmp_path: Path) -> None:
    data = tar(
        member("f", b"long first", **ME),
        member("f", b"second", **ME),
        member("l", linkname="/etc/passwd", **ME),
        member("l", b"no link", **ME),
        member("d", mode=0o700, **ME),
        member("d/in", b"", **ME),
        member("d", mode=0o711, **ME),
        member("x", b"", **ME),
        member("x", **ME),
    )
    unpack(data, tmp_path / "t")
    assert (tmp_path / "t/f").read_bytes() == b"second"
    assert (tmp_path / "t/l").read_bytes() == b"no link"
    assert not (tmp_path / "t/l").is_symlink()
    assert stat.S_IMODE((tmp_path / "t/d").stat().st_mode) == 0o711
    assert (tmp_path / "t/d/in").exists()
    assert (tmp_path / "t/x").is_dir()


ESCAPES: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "absolute": ([member("/OUT/x", b"", **ME)], "absolute"),
    "upward": ([member("../outside/x", b"", **ME)], "upward"),
    "upward inside": ([member("a/../../outside/x", b"", **ME)], "upward"),
    "upward directory": ([member("..", **ME)], "upward"),
    "through a link": ([member("a", linkname="OUT", **ME), member("a/x", b"", **ME)], "through a link"),
    "through a relative link": ([member("a", linkname="../outside"), member("a/x", b"", **ME)], "through a link"),
    "through a link inside": ([member("b", **ME), member("a", linkname="b"), member("a/x", b"", **ME)], "a link"),
    "through two links": (
        [member("a", linkname="."), member("a/b", linkname=".."), member("a/b/x", b"", **ME)],
        "through a link",
    ),
    "a directory through a link": ([member("a", linkname="OUT"), member("a/new/dir", **ME)], "through a link"),
    "through a file": ([member("a", b"", **ME), member("a/x", b"", **ME)], "through a link or a file"),
    "hard link out": ([member("a", kind=tarfile.LNKTYPE, linkname="../outside/secret")], "upward"),
    "absolute hard link": ([member("a", kind=tarfile.LNKTYPE, linkname="/OUT/secret")], "absolute"),
    "hard link through a link": (
        [member("l", linkname="OUT"), member("a", kind=tarfile.LNKTYPE, linkname="l/secret")],
        "links to",
    ),
    "hard link to nothing": ([member("a", kind=tarfile.LNKTYPE, linkname="b")], "not there"),
    "hard link to a directory": ([member("b", **ME), member("a", kind=tarfile.LNKTYPE, linkname="b")], "no file"),
    "hard link to the root": ([member("a", kind=tarfile.LNKTYPE, linkname=".")], "no file"),
    "hard link to a whiteout": ([member(".wh.b", b""), member("a", kind=tarfile.LNKTYPE, linkname="b")], "no file"),
    "character device": ([member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, **ME)], "device node"),
    "block device": ([member("sda", kind=tarfile.BLKTYPE, devmajor=8, **ME)], "device node"),
    "a whiteout as device": ([member("w", kind=tarfile.CHRTYPE, **ME)], "device node"),
    "whiteout of the parent": ([member("a/.wh...", b"", **ME)], "whiteout of no name"),
    "whiteout of itself": ([member("a/.wh..", b"", **ME)], "whiteout of no name"),
    "whiteout of nothing": ([member("a/.wh.", b"", **ME)], "whiteout of no name"),
    "aufs": ([member(".wh..wh.plnk", b"", **ME)], "whiteout of no name"),
    "whiteout directory": ([member(".wh.a", **ME)], "no empty file"),
    "below a whiteout": ([member(".wh.a/b", b"", **ME)], "reserved"),
    "whiteout with content": ([member(".wh.a", b"x", **ME)], "no empty file"),
    "file over directory": ([member("a", **ME), member("a", b"", **ME)], "replace a directory"),
    "link over directory": ([member("a", **ME), member("a", linkname="OUT", **ME)], "replace a directory"),
    "file over the root": ([member("./.", b"", **ME)], "no name"),
    "long name": ([member("n" * 256, b"", **ME)], "too long"),
    "long path": ([member("n/" * 2048 + "x", b"", **ME)], "overlong|too long"),
    "deep path": ([member("n/" * 201 + "x", b"", **ME)], "deep"),
    "too many IDs": ([member("a", b"", uid=65536)], "belongs to 65536:0"),
    "negative IDs": ([member("a", b"", gid=-1)], "belongs to 0:-1"),
}


@pytest.mark.parametrize("case", ESCAPES)
def test_tricks_are_refused_and_change_nothing_outside(case: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    before = tree(outside)
    members, why = ESCAPES[case]
    for info, _ in members:
        info.name = info.name.replace("OUT", str(outside).strip("/"))
        info.linkname = info.linkname.replace(
            "OUT", str(outside).strip("/") if "/OUT" in info.linkname else str(outside)
        )
    data = tar(*members, format=1 if case == "negative IDs" else 2)
    refused(data, tmp_path / "t", why)
    assert tree(outside) == before
    assert (outside / "secret").stat().st_nlink == 1


def test_bounds(tmp_path: Path) -> None:
    two = tar(member("a", b"x" * 600, **ME), member("b", b"y" * 600, **ME))
    refused(two, tmp_path / "1", "more than 1000 bytes", Limits(bytes=1000, entries=9))
    refused(two, tmp_path / "2", "more than 1 entries", Limits(bytes=9999, entries=1))
    assert unpack(two, tmp_path / "3", Limits(bytes=1200, entries=2)) == 2


def test_a_huge_hole_counts(tmp_path: Path) -> None:
    info, _ = member("s", b"", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 50)}, **ME)
    refused(tar((info, b"")), tmp_path / "t", "more than")


def test_attributes_that_overlayfs_obeys_are_dropped(tmp_path: Path) -> None:
    attributes = {
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
        "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.security.selinux": "x",
        "SCHILY.xattr.user.mine": "kept",
    }
    unpack(tar(member("d", pax_headers=attributes, **ME), member("f", b"", pax_headers=attributes, **ME)), tmp_path)
    for name in ("d", "f"):
        assert os.listxattr(tmp_path / name) == ["user.mine"]
        assert os.getxattr(tmp_path / name, "user.mine") == b"kept"


def test_a_plain_archive_keeps_no_owners_and_knows_no_whiteouts(tmp_path: Path) -> None:
    unpack(tar(member("a/.wh.x", b"data", uid=10**6, mode=0o4755)), tmp_path, plain=True)
    found = (tmp_path / "a/.wh.x").stat()
    assert (found.st_uid, found.st_mode & 0o7777, found.st_size) == (os.getuid(), 0o600, 4)


# -- anything at all -------------------------------------------------------------------------------

parts = st.sampled_from(["a", "b", "c", "..", ".", "", ".wh.a", ".wh.b", ".wh..wh.x", ".wh...", "secret", "outside"])
names = st.builds(
    lambda prefix, items: prefix + "/".join(items),
    st.sampled_from(["", "", "", "./", "/", "../"]),
    st.lists(parts, min_size=1, max_size=4),
)
links = names | st.sampled_from(
    ["..", "../..", "../outside", "/OUT", "/OUT/secret", "../outside/secret", "/proc/self/root"]
)
kinds = st.sampled_from([b"0", b"0", b"5", b"5", b"2", b"2", b"1", b"6", b"3"])


@st.composite
def members(draw: st.DrawFn) -> tuple[tarfile.TarInfo, bytes]:
    kind = draw(kinds)
    data = draw(st.binary(max_size=20)) if kind == b"0" else b""
    info, _ = member(draw(names), data, kind=kind, mode=draw(st.integers(0, 0o7777)), **ME)
    info.linkname = draw(links) if kind in (b"1", b"2") else ""
    return info, data


@settings(max_examples=400, deadline=None)
@given(st.lists(members(), min_size=1, max_size=8))
def test_whatever_the_archive_nothing_outside_changes(entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tempfile.TemporaryDirectory(prefix="insula-layer-") as name:
        top = Path(name)
        outside = top / "outside"
        outside.mkdir()
        (outside / "secret").write_text("secret")
        (outside / "a").mkdir()
        before = tree(outside)
        for info, _ in entries:
            info.linkname = info.linkname.replace("/OUT", str(outside))
        try:
            unpack(tar(*entries), top / "t")
        except Invalid as e:
            assert "\n" not in str(e)
        assert tree(outside) == before
        assert (outside / "secret").stat().st_nlink == 1
        assert sorted(path.name for path in top.iterdir()) == ["outside", "t"]
