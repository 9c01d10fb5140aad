"""Files into and out of a container's root: a directory stands for it, and everything in it is hostile."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.container import archive
from insula.container.archive import FileTree
from insula.model.errors import Conflict, Failed, Invalid, NotFound
from insula.tree import sparse


class House:
    """A root inside a directory that also has something outside of it."""

    def __init__(self, path: Path) -> None:
        self.outside = path / "secret"
        self.outside.write_text("outside")
        self.root = path / "root"
        self.root.mkdir()
        fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        self.tree = FileTree(fd, frozenset({mount_of(fd)}))

    def get(self, path: str) -> tarfile.TarFile:
        sink = io.BytesIO()
        archive.write(self.tree, path, sink)
        sink.seek(0)
        return tarfile.open(fileobj=sink)

    def put(self, path: str, *members: tuple[tarfile.TarInfo, bytes]) -> None:
        archive.read(self.tree, path, io.BytesIO(pack(*members)))


def mount_of(fd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("mnt_id")))


def pack(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def entry(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644):  # type: ignore[no-untyped-def]
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = kind, link, mode, 1000
    return info, data


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    os.close(house.tree.root)
    assert house.outside.read_text() == "outside"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root", "secret"]


def test_a_copied_tree_is_unchanged(house: House) -> None:
    house.put(
        "/",
        entry("d", kind=tarfile.DIRTYPE, mode=0o750),
        entry("d/file", b"x" * 1_000_000, mode=0o4751),
        entry("d/link", kind=tarfile.SYMTYPE, link="/etc/shadow"),
        entry("d/hard", kind=tarfile.LNKTYPE, link="d/file"),
        entry("deep/er/file", b"made its parents"),
        entry("d/empty", mode=0o600),
    )
    assert (house.root / "d/hard").stat().st_ino == (house.root / "d/file").stat().st_ino
    assert (house.root / "d/file").stat().st_mode & 0o7777 == 0o4751
    assert (house.root / "d/file").stat().st_mtime == 1000
    with house.get("/d") as tar:
        assert tar.getnames() == ["d", "d/empty", "d/file", "d/hard", "d/link"]
        members = {member.name: member for member in tar.getmembers()}
        assert (members["d"].mode, members["d/file"].mode, members["d/file"].uid) == (0o750, 0o4751, 0)
        assert (members["d/hard"].islnk(), members["d/hard"].linkname) == (True, "d/file")
        assert members["d/link"].linkname == "/etc/shadow"
        content = tar.extractfile("d/file")
        assert content is not None and content.read() == b"x" * 1_000_000


def test_a_file_replaces_a_file_or_a_link_when_it_is_complete(house: House) -> None:
    (house.root / "link").symlink_to("../secret")
    (house.root / "file").write_text("old")
    os.link(house.root / "file", house.root / "other")
    house.put("/", entry("link", b"new"), entry("file", b"new"))
    assert not (house.root / "link").is_symlink() and (house.root / "link").read_text() == "new"
    assert (house.root / "file").read_text() == "new"
    assert (house.root / "other").read_text() == "old", "the file of that other name is another one"
    assert sorted(os.listdir(house.root)) == ["file", "link", "other"]


@pytest.mark.parametrize("there", ["file", "link to a directory", "directory", "directory with something in it"])
def test_a_directory_and_another_kind_do_not_replace_each_other(house: House, there: str) -> None:
    place = house.root / "tree" / "y"
    place.parent.mkdir()
    if there == "file":
        place.write_text("precious")
    elif there == "link to a directory":
        place.symlink_to("/")
    else:
        place.mkdir()
    if "something" in there:
        (place / "precious").touch()
    before = [(str(p), p.lstat().st_ino) for p in sorted(house.root.rglob("*"))]
    kinds = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE] if place.is_dir() else [tarfile.DIRTYPE]
    if there == "link to a directory":
        kinds = [tarfile.DIRTYPE]
    for kind in kinds:
        with pytest.raises(Conflict, match="/tree/y'"):
            house.put("/tree", entry("y", kind=kind, link="elsewhere"))
        assert [(str(p), p.lstat().st_ino) for p in sorted(house.root.rglob("*"))] == before
    house.put("/tree", entry("z", b"the control"))
    assert (house.root / "tree" / "z").read_text() == "the control"


@pytest.mark.parametrize("path", ["/link/secret", "/link/../secret", "/../secret", "/up/secret", "/magic/secret"])
def test_no_path_leads_out(house: House, path: str) -> None:
    (house.root / "link").symlink_to(house.root.parent)
    (house.root / "up").symlink_to("../../../../../../../" + str(house.root.parent))
    (house.root / "magic").symlink_to(f"/proc/self/fd/{house.tree.root}/..")
    with pytest.raises((NotFound, Invalid, Failed)):
        house.get(path)
    with pytest.raises((NotFound, Invalid, Failed)):
        house.put(os.path.dirname(path) + "/nowhere", entry("secret", b"evil"))


def test_links_inside_are_followed_inside(house: House) -> None:
    (house.root / "real").mkdir()
    (house.root / "link").symlink_to("/real")
    house.put("/link", entry("file", b"inside"))
    assert (house.root / "real" / "file").read_text() == "inside"
    with house.get("/link/file") as tar:
        assert tar.getnames() == ["file"]
    with house.get("/link") as tar:
        assert tar.getmembers()[0].issym()
    with house.get("/link/") as tar:
        assert "link/file" in tar.getnames()


@pytest.mark.parametrize(
    "members",
    [
        [entry("../secret", b"evil")],
        [entry("a/../../secret", b"evil")],
        [entry("way", kind=tarfile.SYMTYPE, link=".."), entry("way/secret", b"evil")],
        [entry("way", kind=tarfile.LNKTYPE, link="../secret"), entry("way", b"evil")],
        [entry("loop", kind=tarfile.SYMTYPE, link="loop"), entry("loop/x", b"")],
        [entry("disk", kind=tarfile.BLKTYPE)],
        [entry("kind", kind=b"Z")],
    ],
)
def test_hostile_archives_are_refused(house: House, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with pytest.raises((Invalid, Conflict, NotFound)) as error:
        house.put("/", *members)
    assert "\n" not in str(error.value)
    assert not list(house.root.rglob(".insula*"))


def test_absolute_names_are_below_the_target(house: House) -> None:
    house.put("/", entry(str(house.outside), b"inside"))
    assert (house.root / str(house.outside).lstrip("/")).read_text() == "inside"


@pytest.mark.parametrize("data", [b"", b"no archive at all " * 100])
def test_data_that_is_no_archive_is_refused(house: House, data: bytes) -> None:
    with pytest.raises(Invalid, match="no tar archive"):
        archive.read(house.tree, "/", io.BytesIO(data))


def test_a_cut_archive_is_noticed_wherever_it_is_cut(house: House) -> None:
    """In a header, in data, and between two entries, where only the end marker is missing."""
    data = pack(entry("first", b"x" * 700), entry("second", b"y" * 1500))
    end = 512 + 1024 + 512 + 1536
    for cut in (0, 1, 511, 512, 600, 1024, 1536, 1537, 2047, 2048, 3000, end, end + 511):
        (house.root / "second").write_text("what was there")
        with pytest.raises(Invalid, match="no tar archive"):
            archive.read(house.tree, "/", io.BytesIO(data[:cut]))
        second = (house.root / "second").read_bytes()
        assert second == (b"y" * 1500 if cut >= end else b"what was there"), cut
        assert set(os.listdir(house.root)) <= {"first", "second"}, "nothing is left of what was broken off"
    archive.read(house.tree, "/", io.BytesIO(data[: end + 512]))
    assert (house.root / "first").read_bytes() == b"x" * 700


def test_nothing_is_written_to_other_mounts(house: House) -> None:
    (house.root / "file").write_text("x")
    tree = FileTree(house.tree.root, frozenset())
    with pytest.raises(Invalid, match="holds no files"):
        archive.write(tree, "/file", io.BytesIO())
    with pytest.raises(Invalid, match="holds no files"):
        archive.read(tree, "/", io.BytesIO(pack(entry("a"))))


def test_fifos_are_not_opened(house: House) -> None:
    os.mkfifo(house.root / "pipe")
    with house.get("/pipe") as tar:
        assert tar.getmembers()[0].isfifo()


def test_unknown_paths(house: House) -> None:
    with pytest.raises(NotFound):
        house.get("/nothing")
    with pytest.raises(NotFound):
        house.put("/nothing", entry("a"))
    (house.root / "file").write_text("x")
    with pytest.raises(Invalid, match="not a directory"):
        house.put("/file", entry("a"))
    with pytest.raises(Invalid, match="not a directory"):
        house.get("/file/x")


def test_the_hosts_own_root_is_refused() -> None:
    from insula.kernel import process

    started = process.start_time(os.getpid())
    assert started is not None
    with pytest.raises(Failed, match="the host's root"), archive.opened(os.getpid(), started):
        pass
    with pytest.raises(NotFound), archive.opened(os.getpid(), started + 1):
        pass


# -- where cp(1) puts it ---------------------------------------------------------------------------------------------


def copied(house: House, path: str, *members: tuple[tarfile.TarInfo, bytes], copy: str = "tree") -> None:
    archive.read(house.tree, path, io.BytesIO(pack(*members)), copy)


FILE = (entry("source", b"data"),)
TREE = (entry("source", kind=tarfile.DIRTYPE, mode=0o755), entry("source/f", b"data"))


@pytest.fixture
def furnished(house: House) -> House:
    """A root with a directory, a file, and links to both, to nothing and to each other."""
    (house.root / "dir" / "sub").mkdir(parents=True)
    (house.root / "dir" / "file").write_text("old")
    for name, target in {
        "to-dir": "dir",
        "absolute": "/dir/sub/../../dir",
        "up": "../../../dir",
        "twice": "to-dir",
        "to-file": "dir/file",
        "to-nothing": "/dir/new",
        "loop": "loop",
    }.items():
        (house.root / name).symlink_to(target)
    return house


@pytest.mark.parametrize("path", ["/dir", "/dir/", "/to-dir", "/to-dir/", "/absolute", "/up", "/twice", "/dir/sub/.."])
def test_into_a_directory_also_through_links(furnished: House, path: str) -> None:
    copied(furnished, path, *FILE)
    assert (furnished.root / "dir" / "source").read_text() == "data"
    (furnished.root / "dir" / "source").unlink()
    copied(furnished, path, *TREE)
    assert (furnished.root / "dir" / "source" / "f").read_text() == "data"
    copied(furnished, path, *TREE, copy="content")
    assert (furnished.root / "dir" / "f").read_text() == "data"
    assert os.readlink(furnished.root / "to-dir") == "dir", "links stay"


@pytest.mark.parametrize(
    ("path", "found"), [("/dir/file", "dir/file"), ("/to-file", "dir/file"), ("/to-nothing", "dir/new"), ("/n", "n")]
)
def test_as_a_file_also_through_links(furnished: House, path: str, found: str) -> None:
    copied(furnished, path, *FILE)
    assert (furnished.root / found).read_text() == "data" and not (furnished.root / found).is_symlink()


def test_as_a_new_directory(furnished: House) -> None:
    for number, path in enumerate(("/dir/n0", "/dir/n1/", "/to-dir/n2")):
        copied(furnished, path, *TREE, copy="content" if number else "tree")
        assert (furnished.root / "dir" / f"n{number}" / "f").read_text() == "data"


@pytest.mark.parametrize(
    ("path", "members", "error"),
    [
        ("/dir/file", TREE, Conflict),
        ("/to-file", TREE, Conflict),
        ("/dir/file/", FILE, (Conflict, Invalid)),
        ("/nothing/", FILE, NotFound),
        ("/nothing/x", FILE, NotFound),
        ("/dir/file/x", FILE, Invalid),
        ("/loop", FILE, Failed),
        ("/dir", (entry("sub", b"a file"),), Conflict),
        ("/", (entry("dir", b"a file"),), Conflict),
        ("/n", (*FILE, entry("other", b"a second one")), Invalid),
    ],
)
def test_a_refused_copy_changes_nothing(
    furnished: House, path: str, members: tuple[tuple[tarfile.TarInfo, bytes], ...], error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        copied(furnished, path, *members)
    assert path.strip("/") in str(raised.value) or "other" in str(raised.value)
    names = sorted(str(found.relative_to(furnished.root)) for found in furnished.root.rglob("*"))
    assert [name for name in names if name not in ("n",)] == [
        *("absolute", "dir", "dir/file", "dir/sub", "loop", "to-dir", "to-file", "to-nothing", "twice", "up"),
    ]
    assert (furnished.root / "dir" / "file").read_text() == "old"


def test_the_whole_root(furnished: House) -> None:
    for path in ("/", "/.", "//"):
        with furnished.get(path) as tar:
            names = tar.getnames()
        assert names[0] == "." and {"dir/file", "to-dir", "dir/sub"} <= set(names)
    sink = io.BytesIO()
    archive.export(furnished.tree, sink)
    sink.seek(0)
    with tarfile.open(fileobj=sink) as tar:
        assert tar.getnames() == names


def test_an_interrupted_copy_gives_the_reason(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the archive itself, but not before it has begun: then there is still an answer to give the error with."""
    (house.root / "dir").mkdir()
    (house.root / "dir" / "a").touch()
    with (house.root / "dir" / "sparse").open("wb") as file:
        for number in range(3):
            file.seek(number << 16)
            file.write(b"x")
        file.truncate(1 << 20)
    monkeypatch.setattr(sparse, "MAX_PIECES", 2)
    for path, said in (("/dir", True), ("/dir/sparse", False)):
        sink = io.BytesIO()
        with pytest.raises(Failed, match="sparse' has more than 2 pieces"):
            archive.write(house.tree, path, sink)
        assert (b"INSULA.error" in sink.getvalue()) is said
    assert sink.getvalue() == b""
