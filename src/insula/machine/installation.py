"""What all virtual machines of a host share: the root of their containers, and templates, made when they are needed.

    BOOT/KEY/rootfs/          the root file system of a machine's container (qemu/root.py)
    BOOT/KEY/accelerator      how processors are made, as it was tried (qemu/accelerator.py)
    BOOT/KEY/SIZE/memory      a template of that size, as in 512-2: MiB and processors (qemu/template.py)
    BOOT/KEY/SIZE/state
    BOOT/KEY/ofN/SIZE/...     the same, of the tenant with the index N alone
    BOOT/blank/               empty disks (blank.py)

BOOT is the host's boot ID: templates are of one boot, and what is of an earlier one is removed. KEY stands for all that
goes in: QEMU, the kernel, Python and Insula. A file on the disk can't be sealed as a memfd can, so a template is read
into one again by each process that needs it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import insula
from insula.kernel import copies
from insula.kernel.rollback import Rollback
from insula.machine.blank import BlankDisks
from insula.machine.guest import initramfs, python
from insula.machine.qemu import accelerator, root, template
from insula.machine.qemu.accelerator import Accelerator
from insula.machine.shim.qmp import QmpError
from insula.model.cpython import dumps
from insula.model.errors import Failed, Unavailable

KERNELS: Final = Path("/var/cache/insula/kernels")
"""Kernels that `scripts/kernel` has fetched, each a directory with vmlinux and modules/."""
PROGRAMS: Final = {root.QEMU: "qemu-system-x86", "/sbin/mkfs.ext4": "e2fsprogs", "/usr/bin/mkfs.erofs": "erofs-utils"}
"""Programs that machines need, and their Debian packages."""
HINT: Final = "scripts/kernel, in the checkout of Insula, installs what virtual machines need; or leave out --vm"
_MOST_TEMPLATES: Final = 4
_PACKAGES: Final = ("agent", "container", "kernel", "machine", "model")


class GuestSize(NamedTuple):
    """The size of a guest: MiB of memory, and processors."""

    memory: int
    cpus: int = 1

    def __str__(self) -> str:
        return f"{self.memory}-{self.cpus}"


class TemplateKey(NamedTuple):
    """Which template it is: of machines of a size, for all tenants or for the one with the index `owner`."""

    size: GuestSize
    owner: int | None = None

    @property
    def path(self) -> str:
        return str(self.size) if self.owner is None else f"of{self.owner}/{self.size}"


class SealedTemplate(NamedTuple):
    """Descriptors of a template: its memory, and the state of its devices. Nobody can write to them."""

    memory: int
    state: int

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.state)


class Installation:
    """The machines' part of a host, below `directory`. Methods block, and may be called from any thread."""

    programs: Mapping[str, str] = PROGRAMS

    def __init__(self, directory: Path, boot: str, program: dict[str, Any]) -> None:
        """`program` is the OCI config of a usual program, which templates are prepared for."""
        self._directory = directory
        self._boot = boot
        self._program = program
        self._lock = threading.Lock()  # of what follows
        self._changed = threading.Condition(self._lock)
        self._templates: dict[TemplateKey, SealedTemplate] = {}  # in the order of use
        self._making: set[TemplateKey] = set()
        self._base: Path | None = None
        self._accelerator: Accelerator | None = None
        self._booting: dict[TemplateKey, subprocess.Popen[bytes]] = {}
        self.blank = BlankDisks(directory / boot / "blank")

    def root(self) -> Path:
        """Return the root file system for machines' containers. Unavailable, Failed."""
        with self._lock:
            return self._made() / "rootfs"

    def accelerator(self) -> Accelerator:
        """Return how processors of machines are made. It is tried once a boot of the host. Unavailable, Failed."""
        with self._lock:
            base = self._made()
            if self._accelerator is None:
                boot = f"{base}/rootfs"
                record = base / "accelerator"
                self._accelerator = accelerator.choose(boot + root.KERNEL, boot + root.INITRAMFS, record)
            return self._accelerator

    def template(self, size: GuestSize, owner: int | None = None) -> SealedTemplate:
        """Return copies of a template's descriptors, for the caller to close. If there is none of that size, a machine
        is booted; who asks for the same one meanwhile waits for it, and nobody else. `owner` is the index of a tenant
        with templates of its own. Unavailable, Failed."""
        how = self.accelerator()
        key = TemplateKey(size, owner)
        with self._changed:
            base = self._made()
            while key in self._making:
                self._changed.wait()
            if found := self._templates.pop(key, None):
                return self._keep(key, found)
            self._making.add(key)
        made: SealedTemplate | None = None
        try:
            made = self._read(base / key.path, size) or self._boot_one(base, key, how)
        finally:
            with self._changed:
                self._making.discard(key)
                self._changed.notify_all()
                given = self._keep(key, made) if made else None
        assert given is not None
        return given

    def _keep(self, key: TemplateKey, found: SealedTemplate) -> SealedTemplate:
        """Keep a template as the last one used, and return copies of its descriptors."""
        self._templates[key] = found
        while len(self._templates) > _MOST_TEMPLATES:
            self._templates.pop(next(iter(self._templates))).close()
        return SealedTemplate(os.dup(found.memory), os.open(f"/proc/self/fd/{found.state}", os.O_RDONLY))

    def prepare(self, size: GuestSize) -> bool:
        """Make a template in advance. Return whether that was possible."""
        try:
            self.template(size).close()
        except (Unavailable, Failed):
            return False
        return True

    def known(self) -> tuple[Accelerator | None, list[GuestSize]]:
        """Return how processors are made, if that was tried since the host was booted, and the sizes of which there are
        templates. Nothing is made. Unavailable."""
        base = self._directory / self._boot / _key(check(self.programs), self.programs, self._program)
        sizes = [GuestSize(*map(int, each.name.split("-"))) for each in base.glob("*-*") if (each / "state").exists()]
        return accelerator.known(base / "accelerator"), sorted(sizes)

    def close(self) -> None:
        """Close the templates, and give up those that are being made."""
        for process in list(self._booting.values()):
            process.kill()
        with self._lock:
            for each in self._templates.values():
                each.close()
            self._templates.clear()

    # -- making ----------------------------------------------------------------------------------------------------

    def _made(self) -> Path:
        """The directory of the root, which is made if it is not there."""
        if self._base and self._base.is_dir():
            return self._base
        kernel = check(self.programs)
        base = self._directory / self._boot / _key(kernel, self.programs, self._program)
        if not base.is_dir():
            draft = base.with_name(f"{base.name}.new")
            try:
                self._sweep()
                shutil.rmtree(draft, ignore_errors=True)
                (draft / "rootfs").mkdir(parents=True)
                self._build(draft, kernel)
                draft.rename(base)
            except (OSError, LookupError, RuntimeError) as error:
                raise Failed(f"the root of machines can't be made: {error}", "see `insula doctor`") from error
        self._base = base
        return base

    def _build(self, draft: Path, kernel: Path) -> None:
        root.build(draft / "rootfs", (kernel / "vmlinux").read_bytes(), initramfs.build(kernel / "modules"))

    def _sweep(self) -> None:
        """Remove what is of earlier boots of the host: no machine uses it."""
        if self._directory.is_dir():
            for each in self._directory.iterdir():
                if each.name != self._boot:
                    shutil.rmtree(each, ignore_errors=True)

    def _boot_one(self, base: Path, key: TemplateKey, how: Accelerator) -> SealedTemplate:
        size = key.size
        image = (f"{base}/rootfs{root.KERNEL}", f"{base}/rootfs{root.INITRAMFS}")

        def began(process: subprocess.Popen[bytes]) -> None:
            self._booting[key] = process

        try:
            made = SealedTemplate(
                *template.make(*image, *size, program=self._program, accelerator=how.name, began=began)
            )
        except (OSError, QmpError) as error:
            hint = "try --cold; look at the load and the memory of the host"
            raise Failed(
                f"a template with {size.memory} MiB and {size.cpus} processors can't be made: {error}", hint
            ) from error
        finally:
            self._booting.pop(key, None)
        self._write(base / key.path, made)
        return made

    def _write(self, directory: Path, made: SealedTemplate) -> None:
        draft = directory.with_name(f"{directory.name}.new")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            for name, fd in made._asdict().items():
                with (draft / name).open("wb") as file:
                    copies.copy(fd, file.fileno())
            draft.rename(directory)
        except OSError:  # it serves this process, and the next one makes another
            shutil.rmtree(draft, ignore_errors=True)

    def _read(self, directory: Path, size: GuestSize) -> SealedTemplate | None:
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
                copies.copy(fd, made[-1])
                template.seal(made[-1])
        if os.fstat(made[0]).st_size != size.memory << 20:
            return None
        return SealedTemplate(*made)


def check(programs: Mapping[str, str] = PROGRAMS) -> Path:
    """Return the directory of the guests' kernel. Unavailable says what is missing, and how to get it."""
    missing = [package for program, package in programs.items() if not os.access(program, os.X_OK)]
    if missing:
        what = f"virtual machines need {' and '.join(missing)}, which this host does not have"
        raise Unavailable(what, HINT)
    kernels = sorted(path.parent for path in KERNELS.glob("*/vmlinux"))
    if not kernels:
        raise Unavailable("the kernel of virtual machines is not on this host", HINT)
    return kernels[-1]


def _key(kernel: Path, programs: Mapping[str, str], program: dict[str, Any]) -> str:
    """A name for all that goes into a root and a template, by the sizes and times of the files, and the program."""
    source = Path(insula.__file__).parent
    files = [kernel / "vmlinux", *map(Path, programs), Path(python.PYTHON).resolve(), *_sources(source)]
    found = [f"{path} {(status := path.stat()).st_size} {status.st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join([*found, dumps(program)]).encode()).hexdigest()[:16]


def _sources(source: Path) -> Iterator[Path]:
    for package in _PACKAGES:
        yield from sorted((source / package).rglob("*.py"))
