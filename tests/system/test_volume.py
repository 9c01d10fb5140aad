"""Project quotas and the pool, without a daemon: through an overlay, as root of a user namespace.

They take a kernel with project quotas: where there is none they are skipped, and run in the virtual machine.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from insula.control.instances.drivers.container.request import ROOM
from insula.kernel import libc, mounts, process, quota, syscalls
from insula.model.errors import Failed, Unavailable
from insula.volume.drivers import open_quota
from insula.volume.pool import Pool
from insula.volume.project import FIRST_PROJECT, ProjectQuota
from insula.volume.quota import DiskLimit, DiskUsage
from tests.forked import errno_of, forked
from tests.support import disks
from tests.support.disks import MIB

T = TypeVar("T")
OWNER = 0x40000000
REFUSED = (errno.EDQUOT, errno.ENOSPC)


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    scratch = tmp_path_factory.mktemp("disk")
    target = scratch / "mounted"
    target.mkdir()
    disks.make(scratch / "image", request.param, 320 * MIB)
    disks.mount(scratch / "image", request.param, target)
    yield target
    disks.unmount(target)


@pytest.fixture(scope="module")
def driver(directory: Path) -> Iterator[ProjectQuota]:
    found = open_quota(directory)
    assert isinstance(found, ProjectQuota), found.refutation()
    yield found
    found.close()


_projects = itertools.count(FIRST_PROJECT + 4711)


@pytest.fixture
def project() -> int:
    return next(_projects)


def layers(driver: ProjectQuota, limit: DiskLimit, project: int) -> tuple[Path, Path, Path]:
    """Lower, upper and work directory; the last two with the project's limits."""
    top = driver.directory / str(project)
    lower, upper, work = (top / name for name in ("lower", "upper", "work"))
    for path in (top, lower, upper, work):
        path.mkdir()
    os.chown(upper, OWNER, OWNER)
    (lower / "big").write_bytes(b"x" * 2 * MIB)
    os.chown(lower / "big", OWNER, OWNER)
    driver.limit(project, limit)
    driver.assign(project, (upper, work))
    return lower, upper, work


def in_container(where: tuple[Path, Path, Path], action: Callable[[], T]) -> T:
    """Run `action` as root of a user namespace, with an overlay of these directories as its current directory."""

    def child() -> T:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        lower, upper, work = map(str, where)
        root = mounts.overlay([lower], upper, work)
        ids = [(0, OWNER, 65536)]
        syscalls.setns(process.user_namespace(ids, ids), syscalls.CLONE_NEWUSER)
        os.setgid(0)
        os.setuid(0)
        os.fchdir(root)
        return action()

    return forked(child, timeout=60)


def fill(name: str = "full") -> tuple[int, int]:
    """Write until it fails: (bytes, errno)."""
    fd, written = os.open(name, os.O_WRONLY | os.O_CREAT), 0
    try:
        while True:
            written += os.write(fd, bytes(1 << 16))
    except OSError as error:
        return written, error.errno or 0
    finally:
        os.close(fd)


def test_bytes_are_limited_exactly_and_given_back(driver: ProjectQuota, project: int) -> None:
    where = layers(driver, DiskLimit(20 * MIB, None), project)

    def body() -> tuple[tuple[int, int], int, int]:
        filled = fill()
        copied_up = errno_of(lambda: os.chmod("big", 0o600))  # of 2 MiB
        seen = os.statvfs(".")
        os.unlink("full")
        os.chmod("big", 0o600)
        return filled, copied_up, seen.f_blocks * seen.f_frsize

    (written, failed), copied_up, seen = in_container(where, body)
    assert 19.8 * MIB < written <= 20 * MIB and failed in REFUSED
    assert copied_up in REFUSED, "no more fits, until something is removed"
    assert seen == 20 * MIB, "df shows the limit"
    used = driver.usage(project)
    assert used is not None and 2 * MIB <= used.space < 3 * MIB, "the file that was copied up"


def test_inodes_are_limited_exactly(driver: ProjectQuota, project: int) -> None:
    where = layers(driver, DiskLimit(None, 100), project)

    def touch(number: int) -> None:
        os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY))

    def body() -> tuple[int, int]:
        for number in range(200):
            if failed := errno_of(partial(touch, number)):
                return number, failed
        return 200, 0

    made, failed = in_container(where, body)
    assert failed in REFUSED and 90 <= made < 100, "upper, work and what overlayfs makes there count as well"
    used = driver.usage(project)
    assert used is not None and used.inodes == 100


def test_an_overlay_is_mounted_again_at_the_limit_if_it_gets_room(driver: ProjectQuota, project: int) -> None:
    """As instances are started again that have used up their limits: overlayfs makes files when it is mounted."""
    where = layers(driver, DiskLimit(5 * MIB, 50), project)
    in_container(where, fill)
    used = driver.usage(project)
    assert used is not None
    driver.limit(project, DiskLimit(used.space, used.inodes))

    def mount() -> None:
        with quota.without_privilege():  # xfs and Linux 6.18 make no exception for root
            root = mounts.overlay([str(where[0])], str(where[1]), str(where[2]))
            if os.fstatvfs(root).f_flag & os.ST_RDONLY:  # as container/service/launch.py finds out
                raise OSError(errno.ENOSPC, "read-only")

    assert errno_of(lambda: forked(mount)) in REFUSED, "the control"
    driver.limit(project, DiskLimit(used.space + ROOM.space, used.inodes + ROOM.inodes))
    assert errno_of(lambda: forked(mount)) == 0
    driver.limit(project, DiskLimit(used.space, used.inodes))
    with quota.without_privilege():
        assert errno_of(lambda: (where[1] / "more").write_bytes(bytes(MIB))) in REFUSED


def test_a_neighbour_and_the_host_are_not_limited(driver: ProjectQuota, project: int) -> None:
    in_container(layers(driver, DiskLimit(5 * MIB, None), project), fill)
    neighbour = layers(driver, DiskLimit(20 * MIB, None), next(_projects))
    write = os.O_CREAT | os.O_WRONLY
    assert in_container(neighbour, lambda: os.write(os.open("a", write), bytes(10 * MIB))) == 10 * MIB
    (driver.directory / "host").write_bytes(bytes(10 * MIB))


def test_root_inside_can_not_leave_its_project(driver: ProjectQuota, project: int) -> None:
    where = layers(driver, DiskLimit(5 * MIB, None), project)

    def body() -> tuple[int, ...]:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        file = os.open("mine", os.O_CREAT | os.O_RDWR)
        return (
            errno_of(lambda: quota.set_project(file, 0, inherit=False)),
            errno_of(lambda: quota.set_project(file, next(_projects), inherit=False)),
            errno_of(lambda: quota.set_project(fd, 0, inherit=True)),
            errno_of(lambda: quota.set_project(fd, project, inherit=False)),
            errno_of(lambda: quota.set_limits(fd, project, None, None)),
        )

    assert 0 not in in_container(where, body)
    fd = os.open(where[1], os.O_RDONLY)
    assert quota.get_project(fd) == (project, True)
    other = next(_projects)
    quota.set_project(fd, other, inherit=True)  # the control: root of the host can
    assert quota.get_project(fd) == (other, True)
    os.close(fd)


def test_a_released_project_has_no_limits(driver: ProjectQuota, project: int) -> None:
    driver.limit(project, DiskLimit(MIB, 10))
    fd = os.open(driver.directory, os.O_RDONLY)
    assert quota.get_usage(fd, project).space_limit == MIB and quota.get_usage(fd, project).inodes_limit == 10
    driver.release(project)
    assert quota.get_usage(fd, project).space_limit is None and driver.usage(project) == DiskUsage(0, 0)
    os.close(fd)


def test_quotactl_by_device_does_the_same(driver: ProjectQuota, project: int) -> None:
    """For kernels before Linux 5.14."""
    driver.limit(project, DiskLimit(3 * MIB, 7))
    fd, data = os.open(driver.directory, os.O_RDONLY), libc.buffer(quota._DQBLK.size)
    quota._quotactl_by_device(fd, quota._Q_GETQUOTA << 8 | quota._PRJQUOTA, project, data)
    assert (quota._DQBLK.unpack(data.raw)[0], quota._DQBLK.unpack(data.raw)[3]) == (3 * 1024, 7)
    os.close(fd)


def test_a_file_system_without_quotas_is_found_out(tmp_path: Path) -> None:
    """By a write past a limit, also where the quotas are only counted."""
    target = tmp_path / "mounted"
    target.mkdir()
    disks.make(tmp_path / "image", "plain", 40 * MIB)
    disks.mount(tmp_path / "image", "plain", target)
    try:
        found = open_quota(target)
        assert not found.enforced and "no project quotas" in str(found.refutation())
        assert found.usage(FIRST_PROJECT) is None and not found.trouble
    finally:
        disks.unmount(target)


@pytest.mark.parametrize(("kind", "size"), [("ext4", 40 * MIB), ("xfs", 300 * MIB)])
def test_a_pool_is_made_mounted_and_grows(tmp_path: Path, kind: str, size: int) -> None:
    pool = Pool(tmp_path / "pool.img", tmp_path / "pool")
    try:
        pool.open(size, kind)
    except (Unavailable, Failed) as error:
        assert not pool.is_mounted()
        pytest.skip(f"this kernel has no project quotas, tests/modern runs this: {error}")
    try:
        assert pool.file.stat().st_blocks * 512 >= size, "it is allocated"
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        options = next(line for line in lines if str(pool.mount_point) in line)
        assert "nosuid,nodev" in options and "prjquota" in options
        found = open_quota(pool.mount_point)
        assert found.enforced
        (pool.mount_point / "kept").write_text("kept")
        found.close()
        pool.open(size, kind)  # mounted already
        before = os.statvfs(pool.mount_point).f_blocks
        pool.open(size + 20 * MIB, kind)
        assert os.statvfs(pool.mount_point).f_blocks > before
        pool.unmount()
        assert not pool.is_mounted() and not (pool.mount_point / "kept").exists()
        pool.open(None, kind)
        assert (pool.mount_point / "kept").read_text() == "kept"
    finally:
        pool.unmount()


def test_a_pool_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool.img", tmp_path / "pool")
    with pytest.raises(Failed, match="does not fit"):
        pool.open(1 << 60, "ext4")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_pool_is_left_alone(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool.img", tmp_path / "pool")
    pool.file.write_bytes(b"something else" * 1000)
    with pytest.raises(Failed, match="neither ext4 nor xfs"):
        pool.open(1 << 20, "ext4")
    assert pool.file.read_bytes() == b"something else" * 1000 and not pool.is_mounted()
