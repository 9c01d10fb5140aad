"""`kernel.mounts`: mounts that are descriptors, in a mount namespace of their own, seen in /proc and by file accesses.

`make_target` has tests of its own (test_mount_targets.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from insula.kernel import mounts, process, syscalls
from insula.kernel.mount_options import Attributes
from tests.forked import errno_of, forked

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")

BASE = 0x50000000
T = TypeVar("T")


class Shown(NamedTuple):
    """A line of proc_pid_mountinfo(5). `options` are the mount's, `data` the file system's."""

    options: set[str]
    propagation: list[str]
    fstype: str
    source: str
    data: set[str]


def shown() -> dict[str, Shown]:
    """The mounts of this namespace by place; of several on one place the topmost."""
    result = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        _, _, _, _, place, options, *propagation = fields.split()
        fstype, source, data = rest.split(" ", 2)
        kinds = [field.partition(":")[0] for field in propagation]
        result[place] = Shown(set(options.split(",")), kinds, fstype, source, set(data.split(",")))
    return result


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty directory, on which `within` mounts a tmpfs."""
    path = Path(os.path.realpath(tmp_path), "room")
    path.mkdir()
    return path


def within(room: Path, function: Callable[[], T]) -> T:
    """Run `function` in a mount namespace of its own and return its result. It leaves no descriptor."""

    def inside() -> T:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("room", room, "tmpfs")
        for name in ("a", "b", "source", "source/below"):
            (room / name).mkdir()
        os.chdir(room)
        before = os.listdir("/proc/self/fd")
        try:
            return function()
        finally:
            assert len(os.listdir("/proc/self/fd")) == len(before)

    return forked(inside)


def all_below(recursive: bool) -> dict[str, bool]:
    """The argument of that name, or none: one mount is what is meant unless told otherwise."""
    return {"recursive": True} if recursive else {}


def put(mount: int, place: Path | str, propagation: int = 0) -> Shown:
    """Attach a detached mount, and close its descriptor."""
    target = os.open(place, os.O_PATH)
    mounts.attach(mount, target, *([propagation] if propagation else []))
    os.close(target)
    os.close(mount)
    return shown()[os.path.realpath(place)]


# -- new file systems --------------------------------------------------------------------------------------------------


def test_a_file_system_has_its_options_and_no_place_yet(room: Path) -> None:
    def look() -> tuple[bool, Shown, int]:
        before = shown()
        fd = mounts.filesystem(
            "tmpfs", ["size=1m", "mode=711"], syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV, "mine"
        )
        same = shown() == before
        found = put(fd, "a")
        return same, found, os.stat("a").st_mode & 0o7777

    same, found, mode = within(room, look)
    assert (same, mode, found.fstype, found.source) == (True, 0o711, "tmpfs", "mine")
    assert {"rw", "nosuid", "nodev"} <= found.options and "noexec" not in found.options
    assert "size=1024k" in found.data


def test_without_a_source_it_has_none(room: Path) -> None:
    assert within(room, lambda: put(mounts.filesystem("tmpfs"), "a")).source == "none"


def test_the_kernels_own_words_explain_a_refusal(room: Path) -> None:
    def attempt(*data: str) -> tuple[int | None, str | None]:
        with pytest.raises(OSError) as error:
            mounts.filesystem("tmpfs", data)
        return error.value.errno, error.value.strerror

    assert within(room, lambda: attempt("nonsense=1")) == (errno.EINVAL, "tmpfs: tmpfs: Unknown parameter 'nonsense'")
    assert within(room, lambda: attempt("nonsense")) == (errno.EINVAL, "tmpfs: tmpfs: Unknown parameter 'nonsense'")


VOLATILE = "work/work/incompat/volatile"
"""The file by which overlayfs tells that it does not sync (Documentation/filesystems/overlayfs.rst)."""


@pytest.mark.parametrize("length", [20, 254, 255, 256, 600])
def test_an_overlay_shows_the_topmost_and_writes_to_the_upper_alone(room: Path, length: int) -> None:
    """Also with a value that is too long for fsconfig(2)."""

    def look() -> tuple[Shown, dict[str, str], set[str], dict[str, str]]:
        for name in ("top", "bottom", "upper", "work"):
            os.mkdir(name)
        for name, layer in (("both", "bottom"), ("both", "top"), ("lower", "bottom")):
            Path(layer, name).write_text(layer)
        steps, odd = divmod(length - len("top:bottom"), 2)
        lower = ["top", "./" * steps + "/" * odd + "bottom"]
        assert len(":".join(lower)) == length
        before = shown().keys()
        fd = mounts.overlay(lower, "upper", "work", volatile=True)
        assert shown().keys() == before
        found = put(fd, "a")
        assert os.path.exists(VOLATILE)
        read = {name: Path("a", name).read_text() for name in ("both", "lower")}
        Path("a", "both").write_text("new")
        return (
            found,
            read,
            set(os.listdir("upper")),
            {name: Path(name, "both").read_text() for name in ("top", "upper")},
        )

    found, read, upper, after = within(room, look)
    assert (found.fstype, found.source) == ("overlay", "overlay")
    assert read == {"both": "top", "lower": "bottom"}
    assert (upper, after) == ({"both"}, {"top": "top", "upper": "new"})


def test_an_overlay_syncs_unless_told_otherwise(room: Path) -> None:
    def look() -> bool:
        os.mkdir("upper")
        os.mkdir("work")
        put(mounts.overlay(["source"], "upper", "work"), "a")
        return os.path.exists(VOLATILE)

    assert not within(room, look)


def test_a_long_value_leaves_the_attributes(room: Path) -> None:
    def look() -> Shown:
        os.mkdir("upper")
        os.mkdir("work")
        data = [f"lowerdir={'./' * 200}source", "upperdir=upper", "workdir=work"]
        return put(mounts.filesystem("overlay", data, syscalls.MOUNT_ATTR_NODEV, place="work"), "a")

    found = within(room, look)
    assert "nodev" in found.options
    assert (found.fstype, found.source) == ("overlay", "overlay")


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_copy_has_more_attributes_and_the_source_has_not(room: Path) -> None:
    def look() -> tuple[Shown, Shown]:
        syscalls.mount("source", "source", "tmpfs", syscalls.MS_NODEV)
        fd = mounts.bind("source", attributes=syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID)
        return put(fd, "a"), shown()[f"{room}/source"]

    copy, source = within(room, look)
    assert {"ro", "nosuid", "nodev"} <= copy.options
    assert {"rw", "nodev"} <= source.options and "nosuid" not in source.options


@pytest.mark.parametrize("recursive", [False, True])
def test_mounts_below_are_copied_if_told(room: Path, recursive: bool) -> None:
    def look() -> dict[str, Shown]:
        syscalls.mount("below", "source/below", "tmpfs")
        fd = mounts.bind("source", attributes=syscalls.MOUNT_ATTR_RDONLY, **all_below(recursive))
        put(fd, "a")
        return shown()

    found = within(room, look)
    assert "rw" in found[f"{room}/source/below"].options
    assert (f"{room}/a/below" in found) == recursive
    if recursive:
        assert found[f"{room}/a/below"].source == "below"
        assert "ro" in found[f"{room}/a/below"].options


def test_a_copy_of_a_descriptors_file(room: Path) -> None:
    def look() -> tuple[str, str]:
        Path("source/file").write_text("file")
        Path("target").touch()
        directory, file = os.open("source", os.O_PATH), os.open("source/file", os.O_PATH)
        put(mounts.bind("", dirfd=file), "target")
        put(mounts.bind("below", dirfd=directory), "a")
        os.close(directory)
        os.close(file)
        Path("a/x").write_text("x")  # a copy may be written to, unless told otherwise
        return Path("target").read_text(), Path("source/below/x").read_text()

    assert within(room, look) == ("file", "x")


def test_a_refused_attribute_leaves_no_descriptor(room: Path) -> None:
    assert within(room, lambda: errno_of(lambda: mounts.bind("source", attributes=1 << 40))) == errno.EINVAL
    assert within(room, lambda: errno_of(lambda: mounts.idmapped("source", 0))) == errno.EINVAL


@pytest.mark.parametrize("way", ["idmapped", "set_idmap", "recursive"])
def test_owners_are_shown_through_a_user_namespace(room: Path, way: str) -> None:
    def look() -> tuple[int, int, int, int]:
        syscalls.mount("source", "source", "tmpfs")
        os.mkdir("source/below")
        syscalls.mount("below", "source/below", "tmpfs")
        for name in ("source/file", "source/below/file"):
            Path(name).touch()
            os.chown(name, 5, 5)
        userns = process.user_namespace([(0, BASE, 65536)], [(0, BASE + 100_000, 65536)])
        if way == "idmapped":
            fd = mounts.idmapped("source", userns)
        else:
            fd = mounts.bind("source", recursive=True)
            mounts.set_idmap(fd, userns, **all_below(way == "recursive"))
        os.close(userns)
        put(fd, "a")
        found = os.stat("a/file")
        below = os.stat("a/below/file").st_uid if way != "idmapped" else 0
        refused = errno_of(lambda: Path("a/file").write_text("x"))
        assert os.stat("source/file").st_uid == 5
        Path("source/file").write_text("x")
        return found.st_uid, found.st_gid, below, refused

    uid, gid, below, refused = within(room, look)
    assert (uid, gid) == (BASE + 5, BASE + 100_005)
    assert below == {"idmapped": 0, "set_idmap": 5, "recursive": BASE + 5}[way]
    assert refused == (errno.EROFS if way == "idmapped" else 0)


# -- changes -----------------------------------------------------------------------------------------------------------


def tree() -> int:
    """A detached copy of `source`, on which a tmpfs is mounted, and another one below it; both nodev and noatime."""
    for name in ("source", "source/below"):
        os.makedirs(name, exist_ok=True)
        syscalls.mount(os.path.basename(name), name, "tmpfs", syscalls.MS_NODEV | syscalls.MS_NOATIME)
    return mounts.bind("source", recursive=True)


def attributes(*names: str) -> Attributes:
    result = Attributes()
    for name in names:
        result.add(name)
    return result


def read_only_and_access_time(fd: int, recursive: bool) -> None:
    mounts.set_attributes(fd, syscalls.MOUNT_ATTR_RDONLY, **all_below(recursive))
    mounts.set_attributes(fd, syscalls.MOUNT_ATTR_STRICTATIME, **all_below(recursive))
    mounts.set_attributes(fd, syscalls.MOUNT_ATTR_NOSUID, **all_below(recursive))


CHANGES: dict[str, tuple[Callable[[int, bool], None], set[str], set[str]]] = {
    "other attributes": (
        lambda fd, recursive: mounts.set_attributes(fd, syscalls.MOUNT_ATTR_NOSUID, **all_below(recursive)),
        {"nosuid", "nodev", "noatime"},
        {"ro", "noexec"},
    ),
    "read-only": (
        lambda fd, recursive: mounts.set_attributes(fd, syscalls.MOUNT_ATTR_RDONLY, **all_below(recursive)),
        {"ro", "nodev", "noatime"},
        {"nosuid"},
    ),
    "read-only, then the access time": (read_only_and_access_time, {"ro", "nodev"}, {"noatime", "relatime"}),
    "the field of the access time": (
        lambda fd, recursive: mounts.set_attributes(fd, syscalls.MOUNT_ATTR_STRICTATIME, **all_below(recursive)),
        {"nodev"},
        {"noatime", "relatime"},
    ),
    "set and clear": (
        lambda fd, recursive: mounts.change(fd, attributes("noexec", "dev"), **all_below(recursive)),
        {"noexec", "noatime"},
        {"nodev"},
    ),
    "clear alone": (
        lambda fd, recursive: mounts.change(fd, attributes("dev"), **all_below(recursive)),
        {"noatime"},
        {"nodev", "noexec"},
    ),
}


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_attributes_of_one_mount_or_of_all_below(room: Path, name: str, recursive: bool) -> None:
    change, there, gone = CHANGES[name]

    def look() -> tuple[set[str], set[str], set[str]]:
        fd = tree()
        change(fd, recursive)
        top = put(fd, "a").options
        found = shown()
        return top, found[f"{room}/a/below"].options, found[f"{room}/source"].options

    top, below, source = within(room, look)
    assert there <= top and not gone & top
    assert (there <= below and not gone & below) is recursive
    assert {"nodev", "noatime"} <= source


def test_no_attributes_are_no_change(room: Path) -> None:
    """Not even a system call: it would fail on what is no mount."""

    def look() -> None:
        directory = os.open("a", os.O_PATH)
        mounts.change(directory, attributes())
        mounts.propagate(directory, 0)
        os.close(directory)

    within(room, look)


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (syscalls.MS_PRIVATE, []),
        (syscalls.MS_SHARED, ["shared"]),
        (syscalls.MS_SLAVE, ["master"]),
        (syscalls.MS_UNBINDABLE, ["unbindable"]),
    ],
)
def test_propagation_of_one_mount_or_of_all_below(room: Path, kind: int, expected: list[str], recursive: bool) -> None:
    def look() -> tuple[Shown, Shown]:
        os.close(tree())
        for place in ("source", "source/below"):
            syscalls.mount(None, place, None, syscalls.MS_SHARED)
        top = put(mounts.bind("source", recursive=True), "a", kind | (syscalls.MS_REC if recursive else 0))
        return top, shown()[f"{room}/a/below"]

    top, below = within(room, look)
    assert top.propagation == expected
    assert below.propagation == (expected if recursive else ["shared"])


def test_an_attached_mount_is_moved(room: Path) -> None:
    def look() -> tuple[bool, bool]:
        syscalls.mount("moving", "a", "tmpfs")
        fd = os.open("a", os.O_PATH)
        put(fd, "b")
        return f"{room}/a" in shown(), shown()[f"{room}/b"].source == "moving"

    assert within(room, look) == (False, True)


# -- paths -------------------------------------------------------------------------------------------------------------


def test_a_path_is_opened_as_if_the_directory_were_the_root(room: Path) -> None:
    def look() -> None:
        Path("a/file").write_text("ours")
        Path("file").write_text("theirs")
        for name, target in (("absolute", "/file"), ("up", "../../../file")):
            os.symlink(target, f"a/{name}")
        root = os.open("a", os.O_PATH)
        for path in ("file", "/file", "//file", "../file", "absolute", "up"):
            fd = mounts.open_beneath(root, path, flags=os.O_RDONLY)
            assert os.read(fd, 10) == b"ours"
            os.close(fd)
        for path in ("", "/", "."):
            fd = mounts.open_beneath(root, path)
            assert os.path.samestat(os.fstat(fd), os.stat("a"))
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.listdir(fd)  # O_PATH, unless told otherwise
            os.close(fd)
        for path in ("absolute", "up"):
            assert errno_of(lambda path=path: mounts.open_beneath(root, path, links=False)) == errno.ELOOP  # type: ignore[misc]
        os.close(root)

    within(room, look)


def test_magic_links_are_not_followed(room: Path) -> None:
    def look() -> int:
        root = os.open("/proc/self", os.O_PATH)
        os.stat("/proc/self/cwd/a")  # the control
        try:
            return errno_of(lambda: mounts.open_beneath(root, "cwd/a"))
        finally:
            os.close(root)

    assert within(room, look) == errno.ELOOP
