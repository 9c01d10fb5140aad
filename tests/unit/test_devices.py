"""Device nodes in a directory that others can change: a file in place of a node is not given away."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.container.create.copy_up import copy_up
from insula.container.create.devices import DeviceNode

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and make devices")


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd, umask = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY), os.umask(0)
    yield fd
    os.umask(umask)
    os.close(fd)


def null(mode: int = 0o620) -> DeviceNode:
    return DeviceNode("/dev/null", stat.S_IFCHR | mode, os.makedev(1, 3), 1234, 5678)


def test_a_node_gets_its_owner_and_stays_as_it_is(root: int, tmp_path: Path) -> None:
    for make in (null().make, DeviceNode("/dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3), 1, 1).make):
        make(root, "dev/null")
        found = (tmp_path / "dev" / "null").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o620)
        assert (stat.S_ISCHR(found.st_mode), found.st_rdev) == (True, os.makedev(1, 3))


@pytest.mark.parametrize("there", ["file", "link", "another device", "directory"])
def test_another_file_in_its_place_keeps_its_owner(root: int, tmp_path: Path, there: str) -> None:
    place = tmp_path / "dev" / "null"
    place.parent.mkdir()
    (tmp_path / "precious").touch()
    if there == "file":
        os.link(tmp_path / "precious", place)
    elif there == "link":
        place.symlink_to("../precious")
    elif there == "directory":
        place.mkdir()
    else:
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    with pytest.raises(OSError, match="in the place of the device") as error:
        null().make(root, "dev/null")
    assert error.value.errno == errno.EEXIST
    assert (place.lstat().st_uid, (tmp_path / "precious").stat().st_uid) == (0, 0)
    with pytest.raises(FileExistsError):
        null().make_unseen(root, "dev/null")


def test_in_a_new_file_system(root: int, tmp_path: Path) -> None:
    null().make_unseen(root, "null")
    found = (tmp_path / "null").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_rdev) == (
        1234,
        5678,
        0o620,
        os.makedev(1, 3),
    )


def test_devices_are_copied_as_devices(tmp_path: Path) -> None:
    """Never by what they give: /dev/zero has no end."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    os.mknod(source / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    os.mkfifo(source / "fifo")
    (source / "file").write_text("x")
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (source, target)]
    copy_up(*fds)
    for fd in fds:
        os.close(fd)
    assert (target / "zero").stat().st_rdev == os.makedev(1, 5)
    assert stat.S_ISFIFO((target / "fifo").stat().st_mode)
    assert (target / "file").read_text() == "x"
