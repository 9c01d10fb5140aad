"""Extraction of layers: the result, and that nothing outside of the target changes."""

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

from insula.image.layer import extract, set_opaque, split
from insula.image.limits import ExtractionLimits
from insula.image.tar import Reader
from insula.model.errors import Invalid
from tests.support.descriptors import no_descriptor_left
from tests.support.images import member, tar, tree

ME: dict[str, Any] = {"uid": os.getuid(), "gid": os.getgid()}
ROOM = ExtractionLimits(bytes=1 << 20, entries=100)


def unpack(data: bytes, target: Path, limits: ExtractionLimits = ROOM, *, plain: bool = False) -> int:
    target.mkdir(exist_ok=True)
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with no_descriptor_left():
            made = extract(Reader(io.BytesIO(data).read), fd, limits, plain=plain)
            set_opaque(fd, made.opaque)
            return made.entries
    finally:
        os.close(fd)


def refused(data: bytes, target: Path, why: str, limits: ExtractionLimits = ROOM) -> None:
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


def test_a_whiteout_does_not_hide_files_of_its_own_layer(tmp_path: Path) -> None:
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
    "upward": ([member("../outside/x", b"", **ME)], "path with"),
    "upward inside": ([member("a/../../outside/x", b"", **ME)], "path with"),
    "upward directory": ([member("..", **ME)], "path with"),
    "through a link": ([member("a", linkname="OUT", **ME), member("a/x", b"", **ME)], "through a link"),
    "through a relative link": ([member("a", linkname="../outside"), member("a/x", b"", **ME)], "through a link"),
    "through a link inside": ([member("b", **ME), member("a", linkname="b"), member("a/x", b"", **ME)], "a link"),
    "through two links": (
        [member("a", linkname="."), member("a/b", linkname=".."), member("a/b/x", b"", **ME)],
        "through a link",
    ),
    "a directory through a link": ([member("a", linkname="OUT"), member("a/new/dir", **ME)], "through a link"),
    "through a file": ([member("a", b"", **ME), member("a/x", b"", **ME)], "through a link or a file"),
    "hard link out": ([member("a", kind=tarfile.LNKTYPE, linkname="../outside/secret")], "path with"),
    "hard link through a link": (
        [member("l", linkname="OUT"), member("a", kind=tarfile.LNKTYPE, linkname="l/secret")],
        "links to",
    ),
    "hard link to a directory": ([member("b", **ME), member("a", kind=tarfile.LNKTYPE, linkname="b")], "not a file"),
    "hard link to the root": ([member("a", kind=tarfile.LNKTYPE, linkname=".")], "not a file"),
    "hard link to a whiteout": ([member(".wh.b", b""), member("a", kind=tarfile.LNKTYPE, linkname="b")], "not a file"),
    "whiteout of the parent": ([member("a/.wh...", b"", **ME)], "whiteout without a name"),
    "whiteout of itself": ([member("a/.wh..", b"", **ME)], "whiteout without a name"),
    "whiteout of nothing": ([member("a/.wh.", b"", **ME)], "whiteout without a name"),
    "whiteout directory": ([member(".wh.a", **ME)], "not an empty file"),
    "below a whiteout": ([member(".wh.a/b", b"", **ME)], "reserved"),
    "whiteout with content": ([member(".wh.a", b"x", **ME)], "not an empty file"),
    "file over the root": ([member("./.", b"", **ME)], "not a name"),
    "long name": ([member("n" * 256, b"", **ME)], "too long"),
    "long path": ([member("n/" * 2048 + "x", b"", **ME)], "overlong|too long"),
    "deep path": ([member("n/" * 201 + "x", b"", **ME)], "deep"),
    "too many IDs": ([member("a", b"", uid=65536)], "belongs to 65536:0"),
    "negative IDs": ([member("a", b"", gid=-1)], "belongs to 0:-1"),
}


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=tarfile.LNKTYPE, linkname=target, **ME)


def node(name: str, kind: bytes = tarfile.CHRTYPE, **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=kind, **more, **ME)


# what is odd and common: the files that come of it, with their contents; None is a directory
ODD: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], dict[str, bytes | None]]] = {
    "absolute names": (
        [member("/", mode=0o750, **ME), member("/d", **ME), member("/d/one", b"1", **ME), link("two", "/d/one")],
        {"d": None, "d/one": b"1", "two": b"1"},
    ),
    "many slashes": (
        [member("//a//./b/", **ME), member("///a/b/c", b"1", **ME)],
        {"a": None, "a/b": None, "a/b/c": b"1"},
    ),
    "device nodes": (
        [
            node("dev/console", devmajor=5, devminor=1),
            node("sda", tarfile.BLKTYPE, devmajor=8),
            member("f", b"1", **ME),
        ],
        {"dev": None, "f": b"1"},
    ),
    "a device node that looks like a whiteout": ([node("w"), member("f", b"1", **ME)], {"f": b"1"}),
    "links to device nodes": ([node("null", devmajor=1, devminor=3), link("a", "null"), link("b", "a")], {}),
    "aufs leftovers": (
        [
            *(member(".wh..wh.plnk", **ME), member(".wh..wh.plnk/7.8", b"1", **ME), link("a/b", ".wh..wh.plnk/7.8")),
            *(member(".wh..wh.aufs", b"", **ME), member(".wh..wh.orph", **ME), member(".wh..wh.orph/x", b"2", **ME)),
            *(member("a/.wh..wh.x", b"", **ME), member("c", b"3", **ME), member(".wh..wh.plnk/d", **ME)),
        ],
        {"a": None, "a/b": b"1", "c": b"3"},
    ),
    "an aufs leftover that is a file": ([member(".wh..wh.plnk", b"1", **ME), member("c", b"3", **ME)], {"c": b"3"}),
    "a file over a directory": (
        [member("a", **ME), member("a/b/c", b"1", **ME), member("a", b"2", **ME), member("d", b"3", **ME)],
        {"a": b"2", "d": b"3"},
    ),
    "a link over a directory": (
        [member("a/b", b"1", **ME), member("c", b"2", **ME), link("a", "c")],
        {"a": b"2", "c": b"2"},
    ),
    "a directory over a file, and back": (
        [member("a", b"1", **ME), member("a", **ME), member("a/b", b"2", **ME), member("a", b"3", **ME)],
        {"a": b"3"},
    ),
    "a directory over a link": (
        [member("a", linkname="OUT", **ME), member("a", **ME), member("a/secret", b"1", **ME)],
        {"a": None, "a/secret": b"1"},
    ),
    "a directory over a file, implied": (
        [member("x/a", b"1", **ME), member("x", b"2", **ME), member("y", b"", **ME)],
        {"x": b"2", "y": b""},
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_archives_are_extracted_and_change_nothing_outside(case: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    before = tree(outside)
    members, wanted = ODD[case]
    for info, _ in members:
        info.linkname = info.linkname.replace("OUT", str(outside))
    assert unpack(tar(*members), tmp_path / "t") == len(members)
    found = sorted((tmp_path / "t").rglob("*"))
    assert not any(path.is_symlink() or path.is_char_device() or path.is_block_device() for path in found)
    assert {str(p.relative_to(tmp_path / "t")): None if p.is_dir() else p.read_bytes() for p in found} == wanted
    assert tree(outside) == before


def test_absolute_names_stay_below_the_root(tmp_path: Path) -> None:
    """The control of the above: the same names, taken at their word, are of files outside."""
    (tmp_path / "outside").mkdir()
    name = f"{tmp_path}/outside/new"
    unpack(tar(member(name, b"1", **ME), link("hard", name)), tmp_path / "t")
    assert not Path(name).exists()
    assert (tmp_path / "t" / name.strip("/")).read_bytes() == (tmp_path / "t/hard").read_bytes() == b"1"


def test_a_hard_link_into_a_lower_layer_becomes_a_symbolic_one(tmp_path: Path) -> None:
    """Its target is resolved in the root of the process that follows it: in the container, all layers together."""
    links = [link("a", "bin/tool"), link("d/b", "./d/nothing"), link("/c", "/x/./tool")]
    unpack(tar(*links, member("here", b"1", **ME), link("e", "here")), tmp_path)
    found = {name: os.readlink(tmp_path / name) for name in ("a", "d/b", "c")}
    assert found == {"a": "/bin/tool", "d/b": "/d/nothing", "c": "/x/tool"}
    assert (tmp_path / "e").samefile(tmp_path / "here")  # the control
    with pytest.raises(Invalid, match="does not exist"):
        unpack(tar(*links), tmp_path / "plain", plain=True)


@pytest.mark.parametrize("target", ["OUT/secret", "OUT", "../outside/secret", "missing", "dir", "file", "."])
@pytest.mark.parametrize("plain", [False, True])
def test_a_hard_link_to_a_symbolic_link_is_of_the_link_itself(tmp_path: Path, target: str, plain: bool) -> None:
    """linkat(2) could follow it, as the host: the layer would have a name of a file of the host then."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    before = tree(outside)
    target = target.replace("OUT", str(outside))
    members = [member("dir", **ME), member("file", b"1", **ME), member("l", linkname=target, **ME), link("a", "l")]
    unpack(tar(*members), tmp_path / "t", plain=plain)
    one, other = (tmp_path / "t/l").lstat(), (tmp_path / "t/a").lstat()
    assert stat.S_ISLNK(other.st_mode) and (one.st_ino, one.st_nlink) == (other.st_ino, 2)
    assert os.readlink(tmp_path / "t/a") == target
    assert tree(outside) == before and (outside / "secret").stat().st_nlink == 1


def test_the_longest_name(tmp_path: Path) -> None:
    name = b"/".join([b"n" * 255] * 16)
    assert len(name) == 4095 and split(name) == [b"n" * 255] * 16
    for wrong in (name + b"/", b"/" + name):
        with pytest.raises(Invalid, match="too long"):
            split(wrong)
    unpack(tar(member(os.fsdecode(name), b"1", **ME)), tmp_path)
    assert sum(len(files) for _, _, files in os.walk(tmp_path)) == 1


def test_a_note_names_entries_that_were_left_out(tmp_path: Path) -> None:
    def notes(*members: tuple[tarfile.TarInfo, bytes]) -> list[str]:
        fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return extract(Reader(io.BytesIO(tar(*members)).read), fd, ROOM).notes
        finally:
            os.close(fd)

    assert notes(member("f", b"", **ME), member(".wh.g", b"", **ME)) == []
    assert notes(node("dev/x")) == ["device node 'dev/x' left out: instances have their own devices"]
    assert notes(link("a", "b")) == ["hard link 'a' into a lower layer made a symbolic link"]
    assert "'dev/x' and 2 more" in notes(node("dev/x"), node("dev/y"), node("dev/x"), link("z", "dev/x"))[0]


@pytest.mark.parametrize("order", ["whiteout first", "whiteout last"])
@pytest.mark.parametrize("below", [["a"], ["a/b"], ["a/b/c", "a/d"], ["x/a/b", "x/a"]])
def test_a_whiteout_and_a_new_file_of_the_same_name(tmp_path: Path, below: list[str], order: str) -> None:
    """image-spec, layer.md: a whiteout hides what lower layers have, and never what its own layer has."""
    prefix = "x/" if below[0].startswith("x/") else ""
    files = [member(f"{name}/f", name.encode(), **ME) for name in below]
    hiding = [member(f"{prefix}.wh.a", b"", **ME)]
    unpack(tar(*(hiding + files if order == "whiteout first" else files + hiding)), tmp_path)
    for name in below:
        assert (tmp_path / name / "f").read_bytes() == name.encode()
    assert os.getxattr(tmp_path / f"{prefix}a", "trusted.overlay.opaque") == b"y"
    assert [str(p) for p in tmp_path.rglob("*") if "trusted.overlay.opaque" in os.listxattr(p)] == [
        f"{tmp_path}/{prefix}a"
    ]


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


def test_marks_for_overlayfs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their paths are sent in one message to the process that sets them."""
    monkeypatch.setattr("insula.image.layer.MAX_OPAQUE", 10)
    hiding = [member(f"{name}/.wh..wh..opq", b"", **ME) for name in ("abc", "defg", "hij")]
    assert unpack(tar(*hiding), tmp_path / "1") == 3
    refused(tar(*hiding, member("k/.wh..wh..opq", b"", **ME)), tmp_path / "2", "hides too many")


def test_bounds(tmp_path: Path) -> None:
    two = tar(member("a", b"x" * 600, **ME), member("b", b"y" * 600, **ME))
    refused(two, tmp_path / "1", "more than 1000 bytes", ExtractionLimits(bytes=1000, entries=9))
    refused(two, tmp_path / "2", "more than 1 entries", ExtractionLimits(bytes=9999, entries=1))
    assert unpack(two, tmp_path / "3", ExtractionLimits(bytes=1200, entries=2)) == 2


def test_the_bounds_of_names_and_owners(tmp_path: Path) -> None:
    """The least that must work: each is refused one further, see ESCAPES."""
    names = ["n" * 255, "/".join(["d"] * 200)]
    unpack(tar(*(member(name, b"1", **ME) for name in names)), tmp_path / "t")
    for name in names:
        assert (tmp_path / "t" / name).stat().st_size == 1
    unpack(tar(member("a", b"", uid=65535, gid=65535), member("b", uid=65535, gid=65535)), tmp_path / "o")
    for path in ("a", "b"):
        found = (tmp_path / "o" / path).stat()
        assert (found.st_uid, found.st_gid) == (65535, 65535)
    for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
        for uid, gid in ((65536, 0), (0, 65536)):
            refused(tar(member("x", kind=kind, linkname="y", uid=uid, gid=gid)), tmp_path / "r", "belongs to")
    for uid, gid in ((65536, 0), (0, 65536)):
        refused(tar(member("./", uid=uid, gid=gid)), tmp_path / "r", "the root belongs to")


def test_owners_times_and_modes_of_every_kind(tmp_path: Path) -> None:
    """Links have owners and times of their own; set-user-ID survives the change of owner."""
    own: dict[str, Any] = {"uid": 12, "gid": 34, "mtime": 77}
    unpack(
        tar(
            member("dir", mode=0o2751, **own),
            member("dir/file", b"x", mode=0o6751, **own),
            member("dir/link", linkname="nowhere", **own),
            member("dir/fifo", kind=tarfile.FIFOTYPE, mode=0o4622, **own),
            member("dir/below", kind=tarfile.LNKTYPE, linkname="lower", **own),
        ),
        tmp_path,
    )
    modes = {"dir": 0o2751, "dir/file": 0o6751, "dir/fifo": 0o622}
    for name in (*modes, "dir/link", "dir/below"):
        found = (tmp_path / name).lstat()
        assert (found.st_uid, found.st_gid, found.st_mtime) == (12, 34, 77), name
        assert stat.S_IMODE(found.st_mode) == modes.get(name, 0o777)


def test_an_ordinary_archive_is_no_layer(tmp_path: Path) -> None:
    """Nothing of a whiteout, an owner, a mode or an attribute counts, and there are neither pipes nor devices."""
    names = ["a/.wh.b", ".wh..wh..opq", ".wh..wh.plnk", "c"]
    attributes = {"SCHILY.xattr.user.mine": "x"}
    foreign: dict[str, Any] = {"uid": 70000, "gid": 70000, "mode": 0o4777, "pax_headers": attributes}
    members = [member(name, b"1", **foreign) for name in names]
    assert unpack(tar(*members, member("d", **foreign)), tmp_path, plain=True) == 5
    for name in names:
        found = tmp_path / name
        assert found.read_bytes() == b"1" and (found.stat().st_uid, os.listxattr(found)) == (os.getuid(), [])
        assert stat.S_IMODE(found.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
    assert "trusted.overlay.opaque" not in os.listxattr(tmp_path)
    for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
        with pytest.raises(Invalid, match="device node or pipe"):
            unpack(tar(member("x", kind=kind, **ME)), tmp_path / "p", plain=True)


@pytest.mark.parametrize("size", [0, 19, 20, 21, 24])
@pytest.mark.parametrize("revision", [1, 2, 3])
def test_file_capabilities_of_the_second_revision_alone(tmp_path: Path, size: int, revision: int) -> None:
    """The third names a root user of its own (capabilities(7)), as only the host may."""
    value = ((revision << 24).to_bytes(4, "little") + b"\1" + bytes(30))[:size]
    data = record_of("SCHILY.xattr.security.capability", value) + tar(member("f", b"", **ME))
    if (size, revision) == (20, 2):
        unpack(data, tmp_path)
        assert os.getxattr(tmp_path / "f", "security.capability")[:4] == value[:4]
    else:
        refused(data, tmp_path, "file capabilities of an unknown revision")


def record_of(key: str, value: bytes) -> bytes:
    """A pax header with one record, whose value is any bytes."""
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
    return tar(member("pax", b"%d" % length + rest, kind=tarfile.XHDTYPE), end=False, format=0)


def test_the_number_of_attributes_is_bounded(tmp_path: Path) -> None:
    def data(number: int) -> bytes:
        return tar(member("f", b"", pax_headers={f"SCHILY.xattr.trusted.{n}": "x" for n in range(number)}, **ME))

    unpack(data(64), tmp_path / "t")
    assert os.listxattr(tmp_path / "t/f") == [], "they are counted before they are dropped"
    refused(data(65), tmp_path / "r", "has 65 attributes")


def test_marks_of_directories_that_are_gone_are_passed_over(tmp_path: Path) -> None:
    hiding = [member(f"{name}/.wh..wh..opq", b"", **ME) for name in ("a", "b")]
    unpack(tar(*hiding, member("a", b"1", **ME)), tmp_path)
    assert (tmp_path / "a").read_bytes() == b"1"
    assert os.getxattr(tmp_path / "b", "trusted.overlay.opaque") == b"y", "the positive control"
    fd = os.open(tmp_path, os.O_PATH)
    set_opaque(fd, ["missing", "a/x", "", "b"])
    os.close(fd)
    assert os.getxattr(tmp_path, "trusted.overlay.opaque") == b"y", "the root itself"


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
