"""The root file system of a machine's container: QEMU, the Python of the shim, and their libraries, read-only.

It is made once for each version of what is in it, as a directory, and serves all machines as the only layer of an
overlay, as an image's layers serve containers. There is no shell in it, no other program, and no configuration.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import insula
from insula.machine.guest import python

QEMU = "/usr/bin/qemu-system-x86_64"
KERNEL, INITRAMFS = "/boot/vmlinux", "/boot/initramfs"
SHIM = "/shim"
_DATA = (
    "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",  # built in from version 8 on
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/keymaps/en-us",  # for keys of viewers that send symbols only
    "/usr/share/qemu/vgabios-stdvga.bin",
    "/usr/share/seabios/vgabios-stdvga.bin",
    "/usr/share/seabios/bios-256k.bin",
)
_MODULES = ("insula.machine.shim.serve", "insula.machine.shim.start", "insula.machine.shim.client", "traceback")
_SHIM = """\
#!{interpreter} -ISB
import sys
if sys.argv[1:2] == ["exec"]:
    from insula.machine.shim.client import main
    main()
from insula.machine.shim.start import start
started = start()
from insula.machine.shim.serve import main
main(started)
"""
_LIBRARY = re.compile(r"(/\S+) \(0x")
_DIRECTORIES = ("dev", "proc", "sys", "tmp")


def build(root: Path, kernel: bytes, initramfs: bytes) -> None:
    """Fill the directory `root`, which is new. OSError; RuntimeError if the shim can't be imported."""
    build_shim(root)
    for path in (QEMU, *(each for each in _DATA if os.path.exists(each))):
        _copy(root, path)
    for library in {*_libraries(QEMU), *(each for data in _DATA if data.endswith(".so") for each in _libraries(data))}:
        _copy(root, library)
    _write(root, KERNEL, kernel, 0o644)
    _write(root, INITRAMFS, initramfs, 0o644)


def build_shim(root: Path) -> None:
    """Fill the directory `root`, which is new, with the shim alone. OSError; RuntimeError if it can't be imported."""
    for name in _DIRECTORIES:
        (root / name).mkdir()
    needed = python.closure(_MODULES, Path(insula.__file__).parents[1])
    for path, data in needed.files.items():
        _write(root, path, data, 0o755)
    for path, target in needed.links.items():
        _link(root, path, target)
    _write(root, SHIM, _SHIM.format(interpreter=needed.interpreter).encode(), 0o755)


def _libraries(program: str) -> Iterator[str]:
    """The libraries that the dynamic linker finds for a program (ldd(1)), by the names that it looks for."""
    if os.path.exists(program):
        done = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=10)
        yield from _LIBRARY.findall(done.stdout)


def _copy(root: Path, path: str) -> None:
    """Copy a file, at its own path: symbolic links above it are followed."""
    target = Path(f"{root}{path}")
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def _write(root: Path, path: str, data: bytes, mode: int) -> None:
    target = Path(f"{root}{path}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    target.chmod(mode)


def _link(root: Path, path: str, target: str) -> None:
    link = Path(f"{root}{path}")
    link.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(link):
        link.symlink_to(target)
