"""Empty disks of machines, as e2fsck and tune2fs see them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from insula.machine import blank
from insula.machine.blank import BlankDisks

SIZE = 1 << 30


@pytest.fixture(autouse=True)
def guests_kernel() -> None:
    """None is needed, but e2fsprogs."""
    if not shutil.which("mkfs.ext4", path="/sbin"):
        pytest.skip("e2fsprogs is not installed")


def check(disk: Path) -> int:
    return subprocess.run(["/sbin/e2fsck", "-fn", disk], capture_output=True, timeout=60).returncode


def facts(disk: Path) -> dict[str, str]:
    done = subprocess.run(["/sbin/dumpe2fs", "-h", disk], capture_output=True, text=True, check=True, timeout=60)
    return dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)


def test_disks_are_alike_but_for_uuid_and_seed(tmp_path: Path) -> None:
    disks = BlankDisks(tmp_path / "blank")
    made = [tmp_path / "one", tmp_path / "other"]
    for each in made:
        disks.make(each, SIZE)
    one, other = (facts(each) for each in made)
    assert {name for name in one if one[name] != other[name]} == {
        *("Filesystem UUID", "Directory Hash Seed", "Checksum"),
    }
    assert [check(each) for each in made] == [0, 0]
    for each in made:
        found = each.stat()
        assert (found.st_size, found.st_mode & 0o777) == (SIZE, 0o600) and found.st_blocks << 9 < 2 << 20
    assert [each.name for each in (tmp_path / "blank").iterdir()] == [str(SIZE)], "it was made once"


def test_a_wrong_checksum_is_seen(tmp_path: Path) -> None:
    """What the test above would see if the checksum were not computed as ext4 does."""
    disk = tmp_path / "disk"
    BlankDisks(tmp_path / "blank").make(disk, SIZE)
    with disk.open("r+b") as file:
        block = bytearray(os.pread(file.fileno(), 1024, 1024))
        struct.pack_into("<I", block, 0x3FC, blank.crc32c(block[:0x3FC]) ^ 1)
        os.pwrite(file.fileno(), block, 1024)
    assert check(disk) != 0


def test_only_some_sizes_are_kept(tmp_path: Path) -> None:
    disks = BlankDisks(tmp_path / "blank")
    for number in range(18):
        disks.make(tmp_path / "disk", (16 + number) << 20)
    kept = {int(each.name) >> 20 for each in (tmp_path / "blank").iterdir()}
    assert kept == set(range(18, 34))
