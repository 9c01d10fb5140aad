"""What all virtual machines of a host share: the root of their containers, and templates, made when they are needed.

    BOOT/KEY/rootfs/          the root file system of a machine's container (qemu/root.py)
    BOOT/KEY/MEMORY/memory    a template with so many MiB (qemu/template.py)
    BOOT/KEY/MEMORY/state

BOOT is the host's boot ID: templates are of one boot, and what is of an earlier one is removed. KEY stands for all that
goes in: QEMU, the kernel, Python and Insula. A file on the disk can't be sealed as a memfd can, so a template is read
into one again by each process that needs it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import insula
from insula.kernel.rollback import Rollback
from insula.machine.guest import initramfs, python
from insula.machine.qemu import root, template
from insula.machine.shim.qmp import QmpError
from insula.model.errors import Failed, Unavailable

KERNELS: Final = Path("/var/cache/insula/kernels")
"""Kernels that `scripts/kernel` has fetched, each a directory with vmlinux and modules/."""
PROGRAMS: Final = {root.QEMU: "qemu-system-x86", "/sbin/mkfs.ext4": "e2fsprogs", "/usr/bin/mkfs.erofs": "erofs-utils"}
"""Programs that machines need, and their Debian packages."""
_MOST_TEMPLATES: Final = 4
_CHUNK: Final = 1 << 20
_PACKAGES: Final = ("agent", "container", "kernel", "machine", "model")


class SealedTemplate(NamedTuple):
    """Descriptors of a template: its memory, which nobody can write, and the state of its devices."""

    memory: int
    state: int

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.state)


class Installation:
    """The machines' part of a host, below `directory`. Methods block, and may be called from any thread."""

    def __init__(self, directory: Path, boot: str) -> None:
        self._directory = directory
        self._boot = boot
        self._lock = threading.Lock()
        self._templates: dict[int, SealedTemplate] = {}  # by memory, the order of use
        self._base: Path | None = None

    def root(self) -> Path:
        """Return the root file system for machines' containers. Unavailable, Failed."""
        with self._lock:
            return self._made() / "rootfs"

    def template(self, memory: int) -> SealedTemplate:
        """Return copies of a template's descriptors, for the caller to close; it has `memory` MiB. If there is none, a
        machine is booted. Unavailable, Failed."""
        with self._lock:
            base = self._made()
            found = self._templates.pop(memory, None)
            if found is None:
                found = self._read(base / str(memory), memory) or self._boot_one(base, memory)
            self._templates[memory] = found
            while len(self._templates) > _MOST_TEMPLATES:
                self._templates.pop(next(iter(self._templates))).close()
            return SealedTemplate(os.dup(found.memory), os.open(f"/proc/self/fd/{found.state}", os.O_RDONLY))

    def close(self) -> None:
        with self._lock:
            for each in self._templates.values():
                each.close()
            self._templates.clear()

    # -- making ----------------------------------------------------------------------------------------------------

    def _made(self) -> Path:
        """The directory of the root, which is made if it is not there."""
        if self._base and self._base.is_dir():
            return self._base
        kernel = check()
        base = self._directory / self._boot / _key(kernel)
        if not base.is_dir():
            draft = base.with_name(f"{base.name}.new")
            try:
                self._sweep()
                shutil.rmtree(draft, ignore_errors=True)
                (draft / "rootfs").mkdir(parents=True)
                root.build(draft / "rootfs", (kernel / "vmlinux").read_bytes(), initramfs.build(kernel / "modules"))
                draft.rename(base)
            except (OSError, LookupError, RuntimeError) as error:
                raise Failed(f"the root of machines can't be made: {error}", "see `insula doctor`") from error
        self._base = base
        return base

    def _sweep(self) -> None:
        """Remove what is of earlier boots of the host: no machine uses it."""
        if self._directory.is_dir():
            for each in self._directory.iterdir():
                if each.name != self._boot:
                    shutil.rmtree(each, ignore_errors=True)

    def _boot_one(self, base: Path, memory: int) -> SealedTemplate:
        boot = f"{base}/rootfs"
        try:
            made = SealedTemplate(*template.make(boot + root.KERNEL, boot + root.INITRAMFS, memory))
        except (OSError, QmpError, TimeoutError) as error:
            hint = "try --cold; look at the load and the memory of the host"
            raise Failed(f"a template with {memory} MiB can't be made: {error}", hint) from error
        self._write(base / str(memory), made)
        return made

    def _write(self, directory: Path, made: SealedTemplate) -> None:
        draft = directory.with_name(f"{directory.name}.new")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir()
            for name, fd in made._asdict().items():
                with (draft / name).open("wb") as file:
                    _copy(fd, file.fileno())
            draft.rename(directory)
        except OSError:  # it serves this process, and the next one makes another
            shutil.rmtree(draft, ignore_errors=True)

    def _read(self, directory: Path, memory: int) -> SealedTemplate | None:
        with Rollback() as undo:
            try:
                read = [
                    undo.hold(os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC)) for name in ("memory", "state")
                ]
            except FileNotFoundError:
                return None
            made = []
            for fd in read:
                made.append(os.memfd_create("template", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC))
                _copy(fd, made[-1])
        template.seal(made[0])
        if os.fstat(made[0]).st_size != memory << 20:
            return None
        return SealedTemplate(*made)


def check() -> Path:
    """Return the directory of the guests' kernel. Unavailable says what is missing, and how to get it."""
    missing = [package for program, package in PROGRAMS.items() if not os.access(program, os.X_OK)]
    if missing:
        what = f"virtual machines need {' and '.join(missing)}, which this host does not have"
        raise Unavailable(what, f"apt-get install {' '.join(missing)}, or leave out --vm")
    kernels = sorted(path.parent for path in KERNELS.glob("*/vmlinux"))
    if not kernels:
        raise Unavailable("the kernel of virtual machines is not on this host", "scripts/kernel fetches it")
    return kernels[-1]


def _key(kernel: Path) -> str:
    """A name for all that goes into a root and a template, by the sizes and times of the files."""
    source = Path(insula.__file__).parent
    files = [kernel / "vmlinux", Path(root.QEMU), Path(python.PYTHON).resolve(), *_sources(source)]
    found = [f"{path} {(status := path.stat()).st_size} {status.st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _sources(source: Path) -> Iterator[Path]:
    for package in _PACKAGES:
        yield from sorted((source / package).rglob("*.py"))


def _copy(source: int, target: int) -> None:
    """Copy a file with its holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        at = os.lseek(source, begin, os.SEEK_HOLE)
        while begin < at:
            data = os.pread(source, min(_CHUNK, at - begin), begin)
            begin += os.pwrite(target, data, begin)
