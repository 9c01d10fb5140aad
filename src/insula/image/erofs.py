"""A root file system of an image for virtual machines: all of its layers in one read-only file (EROFS, erofs.rst).

It is made by mkfs.erofs(1) of a read-only overlay of the layers, in a child process that has namespaces of its own (no
network, no other processes, its own mounts), limited resources, and only the capability to read files whoever owns
them. What an image contains is data for it; links are not followed.

The child runs as ``python -m insula.image.erofs``, with a job in JSON on the standard input; `make` is the parent's
side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from insula.image import confine
from insula.image.job import Job
from insula.image.limits import ExtractionLimits
from insula.kernel import capabilities, mounts, syscalls
from insula.model.errors import Failed, InsulaError

PROGRAM = "mkfs.erofs"
_SECONDS = 600.0
_KEPT = ("DAC_READ_SEARCH",)
_OPTIONS = ("--quiet", "-Enoinline_data")


# -- the parent's side -----------------------------------------------------------------------------


def make(layers: Sequence[Path], target: Path, directory: Path, work: Job) -> None:
    """Make the file `target` of layers, topmost first. `directory` is for work, and empty. Unavailable, Failed."""
    work.limit(_SECONDS)
    tree = directory / "tree"
    empty = directory / "empty"
    for each in (tree, empty):
        each.mkdir()
    job = {"layers": [str(path) for path in (*layers, empty)], "tree": str(tree), "target": str(target)}
    command = [*confine.NAMESPACES, "unshare", "--mount", sys.executable, "-s", "-P", "-m", "insula.image.erofs"]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    except FileNotFoundError as error:
        raise confine.missing(error) from None
    _, said = work.communicate(child, json.dumps(job).encode())
    if child.returncode:
        why = said.decode(errors="replace").strip()[-200:]
        hint = "free some space, or see whether erofs-utils is installed"
        raise Failed(f"the image can't be made a file system of a virtual machine: {why}", hint)
    with target.open("rb") as file:
        os.fsync(file.fileno())


# -- the child's side ------------------------------------------------------------------------------


def main() -> None:
    """Mount the layers, drop all other rights, and become mkfs.erofs."""
    job: dict[str, Any] = json.load(sys.stdin)
    tree = mounts.filesystem("overlay", _lower(job["layers"]), source="overlay", place=job["tree"])
    mounts.set_attributes(tree, syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)
    syscalls.move_mount(tree, syscalls.AT_FDCWD, job["tree"])
    os.close(tree)
    confine.limit(ExtractionLimits())
    kept = capabilities.to_mask(_KEPT)
    rights = capabilities.Capabilities(kept, kept, kept, kept, kept)
    os.setgroups([])
    capabilities.before_setuid(rights)
    capabilities.after_setuid(rights)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    os.execvp(PROGRAM, [PROGRAM, *_OPTIONS, job["target"], job["tree"]])


def _lower(layers: Sequence[str]) -> list[str]:
    """Return the options of an overlay without an upper directory. The layers are named by short links, relative to the
    current directory: all options must fit into one page."""
    os.chdir("/proc/self/fd")
    return [f"lowerdir={':'.join(str(os.open(path, os.O_PATH | os.O_DIRECTORY)) for path in layers)}"]


if __name__ == "__main__":
    try:
        main()
    except (OSError, InsulaError) as failure:
        sys.exit(str(failure))
