"""Entries of `mounts` are mounted in the listed order (runtime-spec, config.md#mounts), each over those before it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.system.oci.conftest import Box

BASE = 0x50000000
users = pytest.mark.parametrize("user", [False, True])


@pytest.fixture
def source(box: Box) -> Path:
    """A directory of the host with a file, which everybody may read."""
    path = box.path / "source"
    path.mkdir()
    (path / "file").write_text("of the host\n")
    return path


def tmpfs(box: Box, destination: str, *options: str) -> None:
    box.mounts.append({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": [*options]})


def places(box: Box) -> list[str]:
    """The mount points, in the order of /proc/self/mountinfo."""
    return box.out("cut -d' ' -f5 /proc/self/mountinfo").split()


@users
def test_mountinfo_has_the_listed_order(box: Box, source: Path, user: bool) -> None:
    """The kernel sorts it by the mounts' IDs (since Linux 6.8), which grow as mounts are made."""
    if user:
        box.map_ids((0, BASE, 65536))
    box.mounts.insert(0, {"destination": "/early", "type": "bind", "source": str(source), "options": ["bind"]})
    for number in range(3):
        box.bind(source, f"/bound{number}")
        tmpfs(box, f"/made{number}")
    box.linux |= {"maskedPaths": ["/proc/keys"], "readonlyPaths": ["/proc/sys"]}
    listed = [entry["destination"] for entry in box.mounts]
    found = [path for path in places(box) if path not in ("/", "/proc/keys", "/proc/sys")]
    assert [path for path in found if not re.match("/sys/fs/cgroup/.", path)] == listed


@users
def test_the_root_is_first_and_protected_paths_are_last(box: Box, user: bool) -> None:
    if user:
        box.map_ids((0, BASE, 65536))
    box.linux |= {"maskedPaths": ["/proc/keys"], "readonlyPaths": ["/proc/sys"]}
    found = places(box)
    assert found[0] == "/" and sorted(found[-2:]) == ["/proc/keys", "/proc/sys"]


@users
@pytest.mark.parametrize("place", ["/dev/shm", "/sys/fs", "/mnt"])
def test_a_later_mount_hides_earlier_ones_below(box: Box, source: Path, place: str, user: bool) -> None:
    if user:
        box.map_ids((0, BASE, 65536))
    box.mounts[:] = [entry for entry in box.mounts if not entry["destination"].startswith("/sys/")]
    if place == "/mnt":
        tmpfs(box, "/mnt")
    box.bind(source, "/dev/shm/x" if place == "/dev/shm" else f"{place}/cgroup")
    assert "of the host" in box.out(f"cat {place}/*/file"), "the control"
    box.mounts.append({"destination": place, "type": "tmpfs", "source": "tmpfs"})
    assert box.out(f"ls {place}") == ""


@users
def test_a_source_that_an_earlier_entry_makes(box: Box, source: Path, user: bool) -> None:
    """Its path is the root file system's, in which there is nothing before."""
    (source / "deep/over").mkdir(parents=True)
    (source / "deep/file").write_text("deep\n")
    (box.path / "by-link").symlink_to("rootfs")
    if user:
        box.map_ids((0, BASE, 65536))
    box.bind(source, "/mnt")
    tmpfs(box, "/mnt/deep/over")
    box.bind(box.rootfs / "mnt", "/final", "ro")
    box.bind(Path("by-link/mnt/deep"), "/deep", "rbind")
    box.bind(box.rootfs / "mnt/file", "/one/file")
    script = "cat /final/file /deep/file /one/file; cut -d' ' -f5 /proc/self/mountinfo | grep over; touch /final/x"
    result = box.run(script)
    assert result.out.split("\n") == ["of the host", "deep", "of the host", "/mnt/deep/over", "/deep/over", ""]
    assert "Read-only file system" in result.err


@users
def test_an_idmapped_source_that_an_earlier_entry_makes(box: Box, source: Path, user: bool) -> None:
    """The mapping takes the host's rights, the source is the container's."""
    os.chown(source / "file", 1000, 1000)
    ids = [{"containerID": 1000, "hostID": BASE + 7 if user else 7, "size": 1}]
    if user:
        box.map_ids((0, BASE, 65536))
    box.bind(source, "/mnt")
    box.bind(box.rootfs / "mnt", "/plain")
    box.bind(box.rootfs / "mnt", "/mapped", uidMappings=ids, gidMappings=ids)
    box.bind(box.rootfs / "mnt/file", "/one/file", uidMappings=ids, gidMappings=ids)
    found = box.out("stat -c %u /plain/file /mapped/file /one/file; cat /mapped/file")
    assert found.split("\n")[:4] == ["65534" if user else "1000", "7", "7", "of the host"]


def test_a_source_in_the_root_is_the_roots(box: Box, source: Path) -> None:
    """Its links lead nowhere outside, wherever an earlier entry brought them from."""
    (source / "link").symlink_to(box.path)
    box.bind(source, "/mnt")
    box.bind(box.rootfs / "mnt/link", "/final")
    assert "mount /final" in box.refused()
    (box.rootfs / str(box.path).lstrip("/")).mkdir(parents=True)
    assert box.out("ls /final") == "", "of the container's own path of that name"


def test_more_than_fit_into_a_message(box: Box, source: Path) -> None:
    """A message between processes takes a few dozen descriptors."""
    for number in range(100):
        (source / str(number)).touch()
        box.bind(source / str(number), f"/many/{number}")
    assert [path for path in places(box) if path.startswith("/many/")] == [f"/many/{n}" for n in range(100)]


def test_an_entry_that_fails_is_named(box: Box, source: Path) -> None:
    box.bind(source, "/first")
    box.bind(source / "not-there", "/second")
    line = box.refused()
    assert "mount /second" in line and f"{source}/not-there" in line and "No such file or directory" in line


def test_nothing_reaches_the_host(box: Box, source: Path) -> None:
    """The root is attached at its path, in the container's mount namespace only."""
    mount = Path("/proc/self/mountinfo")
    subprocess.run(["mount", "--bind", box.rootfs, box.rootfs], check=True)
    try:
        subprocess.run(["mount", "--make-shared", box.rootfs], check=True)
        before = mount.read_text()
        box.bind(source, "/mnt")
        box.out("true")
        assert mount.read_text() == before
        for propagation in ("shared", "rshared", "slave", "private"):
            box.linux["rootfsPropagation"] = propagation
            box.out("true")
            assert mount.read_text() == before, propagation
    finally:
        subprocess.run(["umount", box.rootfs], check=True)
