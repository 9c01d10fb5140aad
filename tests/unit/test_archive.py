"""Files in and out of a container's root: a directory plays it, and everything in it is hostile."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.container import archive
from insula.container.archive import Tree
from insula.model.errors import Failed, Invalid, NotFound


class House:
    """A root inside a directory that also has something outside of it."""

    def __init__(self, path: Path) -> None:
        self.outside = path / "secret"
        self.outside.write_text("outside")
        self.root = path / "root"
        self.root.mkdir()
        fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        self.tree = Tree(fd, os.getuid(), frozenset({mount_of(fd)}))

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


def test_a_tree_comes_back_as_it_went_in(house: House) -> None:
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


def test_what_stands_in_the_way_is_replaced(house: House) -> None:
    (house.root / "file").symlink_to("../secret")
    (house.root / "dir").symlink_to("..")
    house.put("/", entry("file", b"new"), entry("dir", kind=tarfile.DIRTYPE), entry("dir/secret", b"new"))
    assert not (house.root / "file").is_symlink()
    assert (house.root / "dir" / "secret").read_text() == "new"


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
        [entry("/".join("d" * 300), b"")],
    ],
)
def test_hostile_archives_are_refused(house: House, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with pytest.raises((Invalid, NotFound)) as error:
        house.put("/", *members)
    assert "\n" not in str(error.value)


def test_absolute_names_are_below_the_target(house: House) -> None:
    house.put("/", entry(str(house.outside), b"inside"))
    assert (house.root / str(house.outside).lstrip("/")).read_text() == "inside"


@pytest.mark.parametrize("data", [b"", b"no archive at all " * 100])
def test_what_is_no_archive(house: House, data: bytes) -> None:
    with pytest.raises(Invalid, match="no tar archive"):
        archive.read(house.tree, "/", io.BytesIO(data))


def test_a_cut_archive_is_noticed(house: House) -> None:
    data = pack(entry("file", b"x" * 100_000))
    with pytest.raises(Invalid):
        archive.read(house.tree, "/", io.BytesIO(data[:50_000]))


def test_other_mounts_are_no_place(house: House) -> None:
    (house.root / "file").write_text("x")
    tree = Tree(house.tree.root, 0, frozenset())
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
    with pytest.raises(Failed, match="the host's root"), archive.opened(os.getpid(), started, 0):
        pass
    with pytest.raises(NotFound), archive.opened(os.getpid(), started + 1, 0):
        pass
