"""Trees as tar streams and back: deep ones, odd names, holes, and concurrent changes."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insula.model.errors import Conflict, Failed, Invalid
from insula.tree import pack as packing
from insula.tree import sparse
from insula.tree.failures import last_words
from insula.tree.pack import Packer
from insula.tree.unpack import Rules, unpack
from tests.support.descriptors import no_descriptor_left

DEPTH = 1500


def packed(source: Path, packer: Packer | None = None) -> bytes:
    """The archive of a tree, under the name ``t``."""
    directory = os.open(source.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        return b"".join((packer or Packer()).pack(directory, source.name, "t"))
    finally:
        os.close(directory)


def unpacked(data: bytes, target: Path) -> None:
    root = os.open(target, os.O_PATH | os.O_DIRECTORY)
    try:
        unpack(io.BytesIO(data), root, Rules(str(target), leave_out=lambda shown: None), instead=["t"])
    finally:
        os.close(root)


def make_deep(top: Path, depth: int, name: str = "d") -> None:
    """Directories nested `depth` deep, with a file in the last; its path is longer than the kernel takes at once."""
    at = os.open(top, os.O_PATH)
    for _ in range(depth):
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_PATH, dir_fd=at)
        os.close(at)
        at = below
    with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=at), "w") as file:
        file.write("at the bottom")
    os.close(at)


@pytest.fixture
def swept(tmp_path: Path) -> Iterator[Path]:
    """A directory that is removed by rm(1): what is so deep, shutil.rmtree of Python 3.11 can't."""
    yield tmp_path
    subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)


def test_deep_directories(swept: Path) -> None:
    (swept / "source").mkdir()
    make_deep(swept / "source", DEPTH, "directory")
    with no_descriptor_left():
        data = packed(swept / "source")
        (swept / "target").mkdir()
        unpacked(data, swept / "target")
    at = os.open(swept / "target" / "t", os.O_PATH)
    for _ in range(DEPTH):
        below = os.open("directory", os.O_PATH, dir_fd=at)
        os.close(at)
        at = below
    with open(os.open("file", os.O_RDONLY, dir_fd=at)) as file:
        assert file.read() == "at the bottom"
    os.close(at)


def test_a_path_without_bounds_is_refused(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (swept / "source").mkdir()
    make_deep(swept / "source", 60)
    monkeypatch.setattr(packing, "MAX_PATH", 200)
    assert packed(swept / "source")
    monkeypatch.setattr(packing, "MAX_PATH", 100)
    with pytest.raises(Failed, match="too deep"):
        packed(swept / "source")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    names=st.sets(
        st.binary(min_size=1, max_size=255).filter(lambda n: not {0, 47} & set(n) and n not in (b".", b"..")),
        min_size=1,
        max_size=6,
    )
)
def test_names_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, names: set[bytes]) -> None:
    directory = os.fsencode(tmp_path_factory.mktemp("names"))
    os.mkdir(directory + b"/source")
    os.mkdir(directory + b"/target")
    kinds = {name: number % 3 for number, name in enumerate(sorted(names))}
    for name, kind in kinds.items():
        path = directory + b"/source/" + name
        if kind == 0:
            Path(os.fsdecode(path)).write_bytes(name)
        elif kind == 1:
            os.symlink(name, path)
        else:
            os.mkdir(path)
            with open(path + b"/" + name, "wb") as file:
                file.truncate(100_000)  # has nothing but a hole
    unpacked(packed(Path(os.fsdecode(directory + b"/source"))), Path(os.fsdecode(directory + b"/target")))
    there = directory + b"/target/t/"
    assert set(os.listdir(there)) == names
    for name, kind in kinds.items():
        if kind == 0:
            assert Path(os.fsdecode(there + name)).read_bytes() == name
        elif kind == 1:
            assert os.readlink(there + name) == name
        else:
            assert os.stat(there + name + b"/" + name).st_size == 100_000


# -- holes -----------------------------------------------------------------------------------------------------------


def make_sparse(path: Path, size: int, *data: tuple[int, bytes]) -> None:
    with path.open("wb") as file:
        for offset, content in data:
            file.seek(offset)
            file.write(content)
        file.truncate(size)


def content(path: Path, *data: tuple[int, bytes]) -> bool:
    """Whether the file has that data where it was put."""
    with path.open("rb") as file:
        for offset, expected in data:
            file.seek(offset)
            if file.read(len(expected)) != expected:
                return False
    return True


BLOCKS = ((0, b"a" * 5000), (1 << 20, b"b" * 4096), ((1 << 40) - 8192, b"c" * 8192))


@pytest.mark.parametrize(
    ("size", "data"),
    [(1 << 40, BLOCKS), (1 << 40, BLOCKS[:2]), (1 << 40, ()), ((1 << 30) + 77, BLOCKS[1:2])],
    ids=["data at both ends", "a hole at the end", "nothing but a hole", "an odd size"],
)
def test_holes_stay_holes(tmp_path: Path, size: int, data: tuple[tuple[int, bytes], ...]) -> None:
    make_sparse(tmp_path / "source", size, *data)
    archive = packed(tmp_path / "source")
    assert len(archive) < 100_000
    unpacked(archive, tmp_path)
    made = (tmp_path / "t").stat()
    assert (made.st_size, made.st_blocks * 512 < 100_000) == (size, True)
    assert content(tmp_path / "t", *data)


def test_a_full_file_is_an_ordinary_entry(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100_000)
    with tarfile.open(fileobj=io.BytesIO(packed(tmp_path / "source"))) as tar:
        [member] = tar.getmembers()
    assert (member.issparse(), member.pax_headers, member.size) == (False, {}, 100_000)


def test_tar_reads_our_holes_and_we_read_those_of_tar(tmp_path: Path) -> None:
    size = 1 << 33
    make_sparse(tmp_path / "source", size, *BLOCKS[:2])
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-x", "-C", tmp_path / "out"], input=packed(tmp_path / "source"), check=True)
    made = (tmp_path / "out" / "t").stat()
    assert (made.st_size, made.st_blocks * 512 < 100_000) == (size, True)
    assert content(tmp_path / "out" / "t", *BLOCKS[:2])
    for form in ("gnu", *(f"pax --sparse-version={version}" for version in ("0.0", "0.1", "1.0"))):
        options = ["-c", "--sparse", *f"--format={form}".split(), "-C", str(tmp_path), "source"]
        data = subprocess.run(["tar", *options], stdout=subprocess.PIPE, check=True).stdout
        assert len(data) < 100_000
        unpacked(data, tmp_path)
        made = (tmp_path / "t").stat()
        assert (made.st_size, made.st_blocks * 512 < 100_000) == (size, True), form
        assert content(tmp_path / "t", *BLOCKS[:2]), form
        (tmp_path / "t").unlink()


def test_more_than_8_gib_of_data_can_be_told(tmp_path: Path) -> None:
    """Of the stored data, which no test can write: where the next entry begins follows from the header."""
    info = tarfile.TarInfo("big")
    size = 9 << 30
    head = sparse.header(info, 1 << 40, [(4096, size)])
    with tarfile.open(fileobj=io.BytesIO(head + bytes(1024)), mode="r|") as tar:
        member = tar.next()
        assert member is not None
        sparse.repair(member, tar)
        assert (member.name, member.size, sparse.stored(member)) == ("big", 1 << 40, [(4096, size)])
        assert tar.offset == len(head) + size


@pytest.mark.parametrize(
    "table", [[(5, 10), (0, 3)], [(0, 10), (5, 10)], [(0, 101)], [(-5, 10)], [(5, -3)], [(1 << 62, 1 << 62)]]
)
def test_an_invalid_map_is_refused(tmp_path: Path, table: list[tuple[int, int]]) -> None:
    data = sparse.header(tarfile.TarInfo("t"), 100, table) + bytes(4096)
    with pytest.raises(tarfile.TarError):
        unpacked(data, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_file_in_too_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [(number << 16, b"x") for number in range(6)]
    make_sparse(tmp_path / "source", 1 << 20, *data)
    monkeypatch.setattr(sparse, "MAX_PIECES", 6)
    assert packed(tmp_path / "source")
    monkeypatch.setattr(sparse, "MAX_PIECES", 5)
    with pytest.raises(Failed, match=r"'t' has more than 5 pieces"):
        packed(tmp_path / "source")


# -- what changes meanwhile --------------------------------------------------------------------------------------------


def entries(source: Path) -> Iterator[bytes]:
    directory = os.open(source.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield from Packer().pack(directory, source.name, "t")
    finally:
        os.close(directory)


def test_vanished_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "source" / name).mkdir(parents=True)
    pieces = entries(tmp_path / "source")
    data = next(pieces) + next(pieces)  # t and t/a
    (tmp_path / "source" / "b").rmdir()
    with tarfile.open(fileobj=io.BytesIO(data + b"".join(pieces))) as tar:
        assert tar.getnames() == ["t", "t/a", "t/c"]


def test_a_directory_that_is_moved_away_leads_nowhere(tmp_path: Path) -> None:
    """Its parent is reached by ``..``, and must still be the same directory."""
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "z").mkdir()
    (tmp_path / "elsewhere" / "secret").mkdir(parents=True)
    pieces = entries(tmp_path / "source")
    next(pieces), next(pieces)
    (tmp_path / "source" / "a").rename(tmp_path / "elsewhere" / "a")
    with pytest.raises(Failed, match="was moved"):
        list(pieces)


def test_a_file_that_becomes_shorter_or_longer_keeps_the_archive_whole(tmp_path: Path) -> None:
    for change in (0, 300_000):
        (tmp_path / "source").write_bytes(b"x" * 200_000)
        pieces = entries(tmp_path / "source")
        data = next(pieces)
        os.truncate(tmp_path / "source", change)
        with tarfile.open(fileobj=io.BytesIO(data + b"".join(pieces))) as tar:
            [member] = tar.getmembers()
            read = tar.extractfile(member)
            assert read is not None and len(read.read()) == 200_000


class Forbidden:
    """A result of `allowed` that forbids one file or directory, as if it were on another mount."""

    def __init__(self, path: Path) -> None:
        self.identity = (path.stat().st_dev, path.stat().st_ino)

    def __call__(self, fd: int) -> bool:
        found = os.fstat(fd)
        return (found.st_dev, found.st_ino) != self.identity


@pytest.mark.parametrize("name", ["dir", "file"])
def test_files_on_another_mount_are_left_out(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    (source / "dir").mkdir(parents=True)
    (source / "dir" / "below").touch()
    (source / "file").touch()
    data = packed(source, Packer(allowed=Forbidden(source / name)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = tar.getnames()
    assert names == (["t", "t/dir", "t/file"] if name == "dir" else ["t", "t/dir", "t/dir/below"])
    with tarfile.open(fileobj=io.BytesIO(packed(source))) as tar:
        assert tar.getnames() == ["t", "t/dir", "t/dir/below", "t/file"], "the control"


def test_nothing_is_made_on_another_mount(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for top in (source, target / "t"):
        (top / "dir").mkdir(parents=True)
    (source / "dir").chmod(0o700)
    (source / "dir" / "below").touch()
    (target / "t" / "dir").chmod(0o755)
    data = packed(source)
    root = os.open(target, os.O_PATH | os.O_DIRECTORY)
    archives = [data, data[:512] + data[1024:]]  # with an entry for the directory, and without
    for archive in archives:
        rules = Rules("/x", allowed=Forbidden(target / "t" / "dir"), leave_out=lambda shown: None)
        with pytest.raises(Invalid, match="'/x/t/dir' holds no files"):
            unpack(io.BytesIO(archive), root, rules, instead=["t"])
        assert list((target / "t" / "dir").iterdir()) == []
        assert stat.S_IMODE((target / "t" / "dir").stat().st_mode) == 0o755
    for archive in archives:
        unpack(io.BytesIO(archive), root, Rules("/x", leave_out=lambda shown: None), instead=["t"])
        (target / "t" / "dir" / "below").unlink()
    assert stat.S_IMODE((target / "t" / "dir").stat().st_mode) == 0o700
    os.close(root)


def test_conflicts_name_the_entry_and_the_existing_file(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    data = packed(tmp_path / "source")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "file").mkdir()
    with pytest.raises(Exception, match=rf"'{tmp_path}/t/file' is a directory here, but not in the archive"):
        unpacked(data, tmp_path)
    (tmp_path / "t" / "file").rmdir()
    unpacked(data, tmp_path)
    assert stat.S_ISREG((tmp_path / "t" / "file").stat().st_mode)
    long = tarfile.TarInfo("t/" + "n" * 256)
    with pytest.raises(Failed, match=r"n+.*File name too long"):
        unpacked(data[:512] + long.tobuf(tarfile.GNU_FORMAT) + bytes(1024), tmp_path)


def archive_of(*members: tarfile.TarInfo, end: bool = True) -> bytes:
    """An archive of members that have no data."""
    return b"".join(member.tobuf(tarfile.PAX_FORMAT) for member in members) + (bytes(1024) if end else b"")


def info(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode, made.mtime = kind, link, mode, 1000
    return made


def put(data: bytes, target: Path, **rules: Any) -> tuple[int, list[str]]:
    """The number of entries and what was left out."""
    left: list[str] = []
    root = os.open(target, os.O_PATH | os.O_DIRECTORY)
    try:
        with no_descriptor_left():
            return unpack(io.BytesIO(data), root, Rules("/x", leave_out=left.append, **rules)), left
    finally:
        os.close(root)


def test_the_rules_about_modes(tmp_path: Path) -> None:
    directory = info("d", tarfile.DIRTYPE, mode=0o1700)
    members = [directory, info("d/f", mode=0o4777), info("p", tarfile.FIFOTYPE, mode=0o622)]
    cases: list[tuple[dict[str, int], tuple[int, ...]]] = [
        ({}, (0o700, 0o777, 0o622)),
        ({"mode": 0o7777}, (0o1700, 0o4777, 0o622)),
        ({"mode": 0o555, "directory_mode": 0o1200}, (0o1700, 0o555, 0o400)),
    ]
    for number, (rules, modes) in enumerate(cases):
        target = tmp_path / str(number)
        target.mkdir()
        assert put(archive_of(*members), target, fifos=True, **rules) == (3, [])
        assert tuple(stat.S_IMODE((target / name).stat().st_mode) for name in ("d", "d/f", "p")) == modes
        assert (target / "d/f").stat().st_mtime == 1000


def test_omitted_files_are_reported(tmp_path: Path) -> None:
    kinds = {"c": tarfile.CHRTYPE, "b": tarfile.BLKTYPE, "p": tarfile.FIFOTYPE}
    members = [info(f"d/{name}", kind) for name, kind in kinds.items()]
    assert put(archive_of(*members, info("f")), tmp_path) == (4, ["/x/d/c", "/x/d/b", "/x/d/p"])
    assert os.listdir(tmp_path) == ["f"]
    assert put(archive_of(*members), tmp_path, fifos=True) == (3, ["/x/d/c", "/x/d/b"])
    assert stat.S_ISFIFO((tmp_path / "d/p").stat().st_mode)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_the_rules_about_owners(tmp_path: Path) -> None:
    """Everything that is made belongs to whom the rules say, links too; what was a link's target does not."""
    (tmp_path / "target").touch()
    members = [
        *(info("d", tarfile.DIRTYPE), info("d/f"), info("d/p", tarfile.FIFOTYPE)),
        info("d/l", tarfile.SYMTYPE, link="../target"),
    ]
    for owner in ((12, 34), None):
        put(archive_of(*members), tmp_path, owner=lambda member, owner=owner: owner, fifos=True, mode=0o7777)
        for name in ("d", "d/f", "d/p", "d/l"):
            found = (tmp_path / name).lstat()
            kept = (12, 34) if name == "d" else (os.getuid(), os.getgid())
            assert (found.st_uid, found.st_gid) == (owner or kept), name
    assert (tmp_path / "target").stat().st_uid == os.getuid()


@pytest.mark.parametrize("end", [0, 512, 1024])
def test_an_archive_ends_with_a_block_of_zeros_at_least(tmp_path: Path, end: int) -> None:
    data = archive_of(info("a"), info("b"), end=False) + bytes(end)
    if end:
        assert put(data, tmp_path) == (2, [])
    else:
        with pytest.raises(tarfile.TarError):
            put(data, tmp_path)


@pytest.mark.parametrize("cut", [1, 511, 512, 700, 1511])
def test_an_incomplete_file_does_not_replace_an_existing_one(tmp_path: Path, cut: int) -> None:
    (tmp_path / "f").write_text("old")
    whole = info("f")
    whole.size = 1000
    data = archive_of(whole, end=False) + b"x" * 1000 + bytes(24 + 1024)
    with pytest.raises(tarfile.TarError):
        put(data[:cut], tmp_path)
    assert (tmp_path / "f").read_text() == "old" and os.listdir(tmp_path) == ["f"]
    assert put(data, tmp_path) == (1, [])
    assert (tmp_path / "f").read_bytes() == b"x" * 1000


@pytest.mark.parametrize(
    ("name", "kind", "link", "says"),
    [
        *(("../a", tarfile.REGTYPE, "", "leads out"), ("a/../../b", tarfile.DIRTYPE, "", "leads out")),
        *(("a", tarfile.LNKTYPE, "../b", "leads out"), ("a", tarfile.LNKTYPE, ".", "links to nothing")),
        *(("a", b"V", "", "unknown kind"), ("link/a", tarfile.REGTYPE, "", "is no directory")),
        *(("link/b/c", tarfile.DIRTYPE, "", "is no directory"), ("file/a", tarfile.REGTYPE, "", "is no directory")),
        ("link", tarfile.DIRTYPE, "", "is a directory in the archive, but not here"),
        ("dir", tarfile.SYMTYPE, "x", "but not in the archive"),
        *(
            ("dir", tarfile.LNKTYPE, "file", "but not in the archive"),
            ("a", tarfile.LNKTYPE, "link/file", "is no directory"),
        ),
    ],
)
def test_a_refused_archive_changes_nothing(tmp_path: Path, name: str, kind: bytes, link: str, says: str) -> None:
    root = tmp_path / "root"
    (root / "dir").mkdir(parents=True)
    (root / "link").symlink_to("../outside")
    (root / "file").write_text("x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    before = sorted((str(p), p.lstat().st_ino, p.lstat().st_nlink) for p in tmp_path.rglob("*"))
    with pytest.raises((Invalid, Conflict), match=says):
        put(archive_of(info(name, kind, link=link)), root)
    assert sorted((str(p), p.lstat().st_ino, p.lstat().st_nlink) for p in tmp_path.rglob("*")) == before


def test_hard_links_are_of_files_in_the_target(tmp_path: Path) -> None:
    members = [info("d/f"), info("h", tarfile.LNKTYPE, link="d/f"), info("l", tarfile.SYMTYPE, link="/etc/passwd")]
    again = info("d/h", tarfile.LNKTYPE, link="l")
    same = info("d/f", tarfile.LNKTYPE, link="d/f")
    assert put(archive_of(*members, again, same), tmp_path) == (5, [])
    assert (tmp_path / "h").samefile(tmp_path / "d/f")
    assert os.readlink(tmp_path / "d/h") == "/etc/passwd", "of the link itself"
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["d", "d/f", "d/h", "h", "l"]


def test_all_entries_lie_below_the_first(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    seen: list[str] = []

    def below(data: bytes, instead: list[str]) -> int:
        rules = Rules("/x", leave_out=lambda shown: None)
        return unpack(io.BytesIO(data), root, rules, instead=instead, first=lambda member: seen.append(member.name))

    tree = [info("a/b", tarfile.DIRTYPE), info("a/b/c"), info("a/b/h", tarfile.LNKTYPE, link="a/b/c")]
    assert below(archive_of(*tree), ["n", "m"]) == 3
    assert below(archive_of(*tree), []) == 3
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == ["c", "h", "n", "n/m", "n/m/c", "n/m/h"] and seen == ["a/b", "a/b"]
    for other in (info("a/d"), info("x"), info("a/b/x", tarfile.LNKTYPE, link="a/d")):
        with pytest.raises(Invalid, match="is not below 'a/b'"):
            below(archive_of(tree[0], other), ["n"])
    assert below(archive_of(), ["n"]) == 0 and len(seen) == 5
    os.close(root)


def test_an_archive_that_breaks_off_says_why(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    whole = packed(tmp_path / "source")
    (tmp_path / "target").mkdir()
    error = Failed("'t/other' can't be read", "see why")
    with pytest.raises(Failed, match="'t/other' can't be read; hint: see why"):
        unpacked(whole[:-1024] + last_words(error), tmp_path / "target")
    assert (tmp_path / "target" / "t" / "file").read_text() == "x", "what came before is there"
    with pytest.raises(tarfile.TarError):
        unpacked(whole[:-1024], tmp_path / "target")
    for nonsense in ("", "[]", "null", '"x"', "{"):
        header = tarfile.TarInfo.create_pax_global_header({"INSULA.error": nonsense})
        with pytest.raises(tarfile.TarError):
            unpacked(whole[:-1024] + header, tmp_path / "target")
