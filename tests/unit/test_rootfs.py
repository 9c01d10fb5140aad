"""`container.create.rootfs`: masked and read-only paths, the mount tree, and the change of the root.

Each in a mount namespace of its own, without a container around it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from insula.container.create import rootfs
from insula.container.create.namespaces import Plan
from insula.container.create.rootfs import MountTree, PathResolver, PremountPlan, Premounts, protect
from insula.container.create.sources import PreparedMounts
from insula.container.create.steps import StepError
from insula.kernel import mounts, syscalls
from tests.forked import errno_of, forked

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")

T = TypeVar("T")
NULL = os.makedev(1, 3)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty directory, on which `within` mounts a tmpfs: the root of a container."""
    path = Path(os.path.realpath(tmp_path), "room")
    path.mkdir()
    return path


def within(room: Path, function: Callable[[int], T]) -> T:
    """Call `function` with a descriptor of `room` in a mount namespace of its own, and return its result."""

    def inside() -> T:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("room", room, "tmpfs")
        for name in ("dir", "dir/below", "other", "dev", "proc", "sys"):
            (room / name).mkdir()
        for name in ("file", "second", "dir/file", "dir/below/file"):
            (room / name).write_text(name)
        os.chdir(room)
        return function(os.open(room, os.O_PATH | os.O_DIRECTORY))

    return forked(inside)


def places() -> list[str]:
    """The mount points, in the order in which they were made."""
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def write(path: str) -> int:
    return errno_of(lambda: Path(path).write_text("new"))


# -- masked and read-only paths ----------------------------------------------------------------------------------------


def test_a_masked_file_is_empty_and_a_masked_directory_too(room: Path) -> None:
    def look(root: int) -> None:
        before = len(os.listdir("/proc/self/fd"))
        protect(PathResolver({}, root), ["/file", "second", "/dir", "/other", "/missing", "/file/missing"], [])
        assert len(os.listdir("/proc/self/fd")) == before
        for name in ("file", "second"):
            found = os.stat(name)
            assert stat.S_ISCHR(found.st_mode) and found.st_rdev == NULL
            assert Path(name).read_text() == ""
        for name in ("dir", "other"):
            assert os.listdir(name) == []
            assert errno_of(lambda name=name: os.mkdir(f"{name}/x")) == errno.EROFS  # type: ignore[misc]
            assert stat.S_IMODE(os.stat(name).st_mode) == 0o555
        assert errno_of(lambda: os.chmod("file", 0o600)) == errno.EROFS  # the host's device is not theirs to change
        assert places().count(f"{room}/file") == 1

    within(room, look)


def test_read_only_with_all_that_is_mounted_below(room: Path) -> None:
    def look(root: int) -> None:
        syscalls.mount("below", "dir/below", "tmpfs")
        assert [write(path) for path in ("dir/file", "dir/below/x", "file", "second")] == [0, 0, 0, 0]  # the control
        before = len(os.listdir("/proc/self/fd"))
        protect(PathResolver({}, root), [], ["/dir", "file", "/missing"])
        assert len(os.listdir("/proc/self/fd")) == before
        assert [write(path) for path in ("dir/file", "dir/below/x", "file")] == [errno.EROFS] * 3
        assert write("second") == 0
        assert [Path(path).read_text() for path in ("dir/file", "dir/below/x")] == ["new", "new"]

    within(room, look)


def test_a_path_that_is_both_is_masked(room: Path) -> None:
    def look(root: int) -> None:
        protect(PathResolver({}, root), ["/dir/file"], ["/dir"])
        assert Path("dir/file").read_text() == ""
        assert write("dir/below/file") == errno.EROFS

    within(room, look)


def test_a_path_that_is_listed_twice_is_masked_once(room: Path) -> None:
    def look(root: int) -> None:
        protect(PathResolver({}, root), ["/file", "file", "//file/", "/dir/../file"], ["/dir", "dir/."])
        assert (places().count(f"{room}/file"), places().count(f"{room}/dir")) == (1, 1)

    within(room, look)


@pytest.mark.parametrize("path", ["/link", "/way/file"])
def test_no_link_is_followed_to_a_protected_path(room: Path, path: str) -> None:
    def look(root: int) -> list[int]:
        os.symlink("file", "link")
        os.symlink("dir", "way")
        return [
            errno_of(lambda: protect(PathResolver({}, root), [path], [])),
            errno_of(lambda: protect(PathResolver({}, root), [], [path])),
        ]

    assert within(room, look) == [errno.ELOOP, errno.ELOOP]


@pytest.mark.parametrize("there", ["nothing", "null", "zero", "file", "link"])
def test_a_mask_is_the_null_device_whatever_the_image_has(room: Path, there: str) -> None:
    def look(root: int) -> None:
        if there == "null":
            os.mknod("dev/null", stat.S_IFCHR | 0o666, NULL)
            os.chown("dev/null", 1234, 1234)
        elif there == "zero":
            os.mknod("dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        elif there == "file":
            Path("dev/null").write_text("not nothing")
        before = len(os.listdir("/proc/self/fd"))
        protect(PathResolver({}, root), ["/file"], [])
        assert len(os.listdir("/proc/self/fd")) == before
        found = os.stat("file")
        assert stat.S_ISCHR(found.st_mode) and found.st_rdev == NULL
        assert (found.st_uid == 1234) == (there == "null")  # the container's own, if it is one

    if there != "link":
        within(room, look)
        return

    def refused(root: int) -> int:
        os.symlink("zero", "dev/null")
        return errno_of(lambda: protect(PathResolver({}, root), ["/file"], []))

    assert within(room, refused) == errno.ELOOP


def test_below_file_systems_that_are_not_in_the_root_yet(room: Path) -> None:
    """As long as there is no root, /proc, /sys and /dev are somewhere else."""

    def look(root: int) -> None:
        top = os.open("dir", os.O_PATH)
        protect(PathResolver({"/proc": top}), ["/proc/file"], ["/proc/below"])
        assert (Path("dir/file").read_text(), Path("file").read_text()) == ("", "file")
        assert (write("dir/below/file"), write("second")) == (errno.EROFS, 0)
        assert PathResolver({"/proc": top}).open("/proc/missing") is None

    within(room, look)


# -- the root ----------------------------------------------------------------------------------------------------------


def test_the_new_root_is_the_only_one(room: Path) -> None:
    def look(root: int) -> tuple[set[str], str, int, bool]:
        syscalls.mount("proc", "proc", "proc")
        rootfs.enter(root, pivot=True)
        return set(places()), os.getcwd(), errno_of(lambda: os.stat(room)), Path("/file").read_text() == "file"

    assert within(room, look) == ({"/", "/proc"}, "/", errno.ENOENT, True)


def test_where_nothing_is_to_be_detached_the_root_is_entered(room: Path) -> None:
    def look(root: int) -> tuple[str, str, int]:
        os.chdir("/")
        rootfs.enter(root, pivot=False)
        return os.getcwd(), Path("/file").read_text(), errno_of(lambda: os.stat("/etc/passwd"))

    assert within(room, look) == ("/", "file", errno.ENOENT)


def test_the_host_is_left_before_the_root_is_made(room: Path) -> None:
    def look(_root: int) -> tuple[set[str], list[str], int, list[str]]:
        tops = {path: mounts.filesystem("tmpfs", (), 0, f"top {path}") for path in ("/proc", "/dev")}
        for path, mount in tops.items():
            os.mkdir(path[1:], dir_fd=mount)
        before = len(os.listdir("/proc/self/fd"))
        real = os.open("/proc/self", os.O_PATH)
        premounts = Premounts(PremountPlan({"mounts": [], "linux": {"namespaces": []}}), tops, -1)
        rootfs.leave_host(premounts)
        after = len(os.listdir(os.open("fd", os.O_RDONLY, dir_fd=real))) - 2
        info = os.open("mountinfo", os.O_RDONLY, dir_fd=real)
        found = {line.split()[4] for line in os.read(info, 1 << 16).decode().splitlines()}
        assert after == before
        assert stat.S_IMODE(os.stat("/").st_mode) == 0o555
        inside = [*os.listdir("/proc"), *os.listdir("/dev")]
        return found, sorted(os.listdir("/")), errno_of(lambda: os.mkdir("/x")), inside

    assert within(room, look) == ({"/", "/proc", "/dev"}, ["dev", "proc"], errno.EROFS, ["proc", "dev"])


# -- kernel parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net.ipv4.conf.eth0/1.forwarding", "net/ipv4/conf/eth0.1/forwarding"),
        ("net/ipv4/conf/eth0.1/forwarding", "net/ipv4/conf/eth0.1/forwarding"),
        ("/net.ipv4", "/net.ipv4"),
        (".net/ipv4", "/net.ipv4"),
        ("kernel", "kernel"),
    ],
)
def test_names_of_parameters(key: str, path: str) -> None:
    assert rootfs.sysctl_path(key) == path


@pytest.mark.parametrize("way", ["root", "premounts"])
def test_a_parameter_is_written_to_the_containers_own(room: Path, way: str) -> None:
    def look(root: int) -> tuple[str, str, int, int]:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        syscalls.mount("proc", "proc", "proc")
        premounts = None
        if way == "premounts":
            premounts = Premounts(
                PremountPlan({"mounts": [], "linux": {"namespaces": []}}),
                {},
                os.open("proc/sys", os.O_PATH | os.O_DIRECTORY),
            )
            root = -1
        parameter = Path("/proc/sys/net/ipv4/ip_forward")
        before = parameter.read_text()
        count = len(os.listdir("/proc/self/fd"))
        rootfs.write_sysctl(root, premounts, "net.ipv4.ip_forward", "0" if before == "1\n" else "1")
        assert len(os.listdir("/proc/self/fd")) == count
        missing = errno_of(lambda: rootfs.write_sysctl(root, premounts, "net.ipv4.missing", "1"))
        wrong = errno_of(lambda: rootfs.write_sysctl(root, premounts, "net.ipv4.ip_forward", "many"))
        return before, parameter.read_text(), missing, wrong

    before, after, missing, wrong = within(room, look)
    assert {before, after} == {"0\n", "1\n"}
    assert (missing, wrong) == (errno.ENOENT, errno.EINVAL)


def test_a_link_does_not_lead_to_another_parameter(room: Path) -> None:
    def look(root: int) -> int:
        os.makedirs("proc/sys/net")
        os.symlink("../../../file", "proc/sys/net/x")
        return errno_of(lambda: rootfs.write_sysctl(root, None, "net.x", "1"))

    assert within(room, look) == errno.ELOOP


# -- the mount tree ----------------------------------------------------------------------------------------------------


def built(root: int, entries: list[dict[str, Any]], sources: PreparedMounts | None = None, **more: Any) -> None:
    """Build the tree of a config in `room`, which is the current directory, and make read-only what shall be."""
    config = {"mounts": entries, "root": {"readonly": more.pop("readonly", False)}, "linux": {"namespaces": [], **more}}
    tree = MountTree(config, root, sources or PreparedMounts(), None, Plan())  # type: ignore[arg-type]
    before = len(os.listdir("/proc/self/fd"))
    tree.build(None, here=False)
    rootfs.seal(config, tree)
    assert len(os.listdir("/proc/self/fd")) == before - (1 if sources else 0)  # it is closed that was made outside


def entry(destination: str, type_: str = "tmpfs", *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": type_, "source": type_, "options": list(options)}


def detached() -> int:
    """The root as `open_root` makes it: a copy of `room` that has no place yet."""
    root = mounts.bind(".", recursive=True)
    os.chdir("/")
    return root


def test_entries_are_mounted_in_the_root_and_devices_made(room: Path) -> None:
    def look(_root: int) -> None:
        root = detached()
        source = mounts.filesystem("tmpfs", (), 0, "from outside")
        sources = PreparedMounts()
        sources.mounts[1] = source
        built(root, [entry("/dir"), entry("/other", "bind", "bind"), entry("/new/place")], sources)
        rootfs.enter(root, pivot=False)
        assert os.listdir("/dir") == [] and Path("/file").read_text() == "file"
        assert all(os.stat(path).st_dev != os.stat("/").st_dev for path in ("/dir", "/other", "/new/place"))
        assert os.stat("/dev/null").st_rdev == NULL
        assert os.readlink("/dev/ptmx") == "pts/ptmx"
        assert errno_of(lambda: os.fstat(source)) == errno.EBADF  # it is closed here

    within(room, look)


@pytest.mark.parametrize(("options", "mode"), [((), 0o710), (("mode=755",), 0o755), (("size=1m",), 0o710)])
def test_a_tmpfs_has_the_mode_of_the_hidden_directory_unless_told(
    room: Path, options: tuple[str, ...], mode: int
) -> None:
    def look(_root: int) -> int:
        os.chmod("dir", 0o710)
        root = detached()
        built(root, [entry("/dir", "tmpfs", *options)])
        rootfs.enter(root, pivot=False)
        return stat.S_IMODE(os.stat("/dir").st_mode)

    assert within(room, look) == mode


def test_a_read_only_tmpfs_is_so_when_all_is_in_it(room: Path) -> None:
    def look(_root: int) -> list[int]:
        root = detached()
        built(root, [entry("/dir", "tmpfs", "ro"), entry("/dir/inner"), entry("/other")])
        rootfs.enter(root, pivot=False)
        return [write(path) for path in ("/dir/x", "/dir/inner/x", "/other/x", "/x")]

    assert within(room, look) == [errno.EROFS, 0, 0, 0]


def test_a_read_only_root_leaves_mounts_writable(room: Path) -> None:
    """A volume that is to stay writable is a mount of its own; another one is a directory of the root."""

    def look(_root: int) -> list[int]:
        root = detached()
        volumes = [entry("/volume", rootfs.VOLUME, "rw"), entry("/fixed", rootfs.VOLUME)]
        built(root, [entry("/other"), *volumes], readonly=True)
        rootfs.enter(root, pivot=False)
        return [write(path) for path in ("/x", "/other/x", "/volume/x", "/fixed/x")]

    assert within(room, look) == [errno.EROFS, 0, 0, errno.EROFS]


def test_a_volume_that_is_a_link_to_another_mount_is_not_bound_over_it(room: Path) -> None:
    """Else it would be there once more, over all that masks its paths."""

    def look(_root: int) -> int:
        os.symlink("dir", "volume")
        root = detached()
        built(root, [entry("/dir", "tmpfs", "ro"), entry("/volume", rootfs.VOLUME, "rw")])
        rootfs.enter(root, pivot=False)
        return write("/dir/x")

    assert within(room, look) == errno.EROFS


def test_remount_changes_an_existing_mount(room: Path) -> None:
    def look(_root: int) -> list[int]:
        syscalls.mount("below", "dir/below", "tmpfs")
        root = detached()
        built(
            root,
            [
                entry("/other"),
                entry("/other", "tmpfs", "remount", "ro"),
                entry("/dir/below", "none", "remount", "bind", "ro"),
            ],
        )
        rootfs.enter(root, pivot=False)
        return [write(path) for path in ("/other/x", "/dir/below/x", "/dir/x")]

    assert within(room, look) == [errno.EROFS, errno.EROFS, 0]


@pytest.mark.parametrize(("kind", "number"), [("proc", errno.ELOOP), ("sysfs", errno.ELOOP), ("tmpfs", 0)])
def test_proc_and_sys_follow_no_link(room: Path, kind: str, number: int) -> None:
    def look(_root: int) -> int:
        os.symlink("dir", "link")
        root = detached()
        try:
            built(root, [entry("/link", kind)])
        except StepError as error:
            assert error.text == "mount /link"
            return int(error.message["errno"])
        return 0

    assert within(room, look) == number


def test_hooks_find_the_mounts_where_the_root_file_system_is(room: Path) -> None:
    def look(_root: int) -> tuple[bool, bool]:
        root = mounts.bind(".", recursive=True)
        config = {"mounts": [entry("/dir")], "root": {}, "linux": {"namespaces": []}}
        MountTree(config, root, PreparedMounts(), None, Plan()).build(None, here=True)  # type: ignore[arg-type]
        return os.stat(room / "dir").st_dev != os.stat(room).st_dev, os.path.exists("/etc/passwd")

    assert within(room, look) == (True, True)
