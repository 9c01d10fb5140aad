"""Small file systems in files, with and without project quotas, for tests of disk quotas."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MIB = 1 << 20
MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "project,quota", "-E", "quotatype=prjquota"),
    "plain": ("mkfs.ext4", "-q", "-F", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}


def make(image: Path, kind: str, size: int) -> None:
    """Make a sparse file of `size` bytes with an empty file system of `kind`. Skips the test without its mkfs(8)."""
    if shutil.which(MAKE[kind][0]) is None:
        pytest.skip(f"there is no {MAKE[kind][0]} here; tests/modern runs this")
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*MAKE[kind], image], check=True)


def mount(image: Path, kind: str, target: Path) -> None:
    """Mount it with project quotas (not "plain"). Skips the test if this kernel has none."""
    options = "loop" if kind == "plain" else "loop,prjquota"
    done = subprocess.run(["mount", "-o", options, image, target], capture_output=True, text=True, check=False)
    if done.returncode and kind != "plain":
        said = done.stderr.strip()
        pytest.skip(f"this kernel can't mount {kind} with project quotas, tests/modern runs this: {said}")
    assert done.returncode == 0, done.stderr


def unmount(target: Path) -> None:
    subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
