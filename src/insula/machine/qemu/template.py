"""A template: a machine that was booted once and stopped, of which others are copies (docs/system/vm-templating.rst).

A boot takes seconds, a copy a tenth of one. The template's memory is a file, and a copy maps it privately
(MAP_PRIVATE, mmap(2)): pages are shared until the copy writes to them. The state of its devices and processors is a
small file beside it (state.py).

Nothing of a tenant is in a template: kernel, agent, and placeholders for disks and network devices. A copy must not be
able to change it. So both are memfds that are sealed against writing (memfd_create(2), F_SEAL_WRITE), which even a QEMU
in the hands of its guest can't lift.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import subprocess
import time

from insula.kernel.rollback import Rollback
from insula.machine import protocol
from insula.machine.qemu.command_line import (
    AcceleratorName,
    GuestDisk,
    GuestInterface,
    MachineConfig,
    arguments,
    descriptors,
)
from insula.machine.qemu.devices import BUS
from insula.machine.qemu.state import DISK, save
from insula.machine.shim.qmp import Qmp, QmpError
from insula.model.cpython import dumps, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DISKS = (GuestDisk("image", -1, read_only=True), GuestDisk("disk", -1))
INTERFACES = tuple(GuestInterface(f"52:54:00:00:00:{slot - 1:02x}", slot=slot) for slot in BUS.slots)
"""Network devices before they get MAC addresses of their own. A template has the first."""
LARGEST = 1 << 40
"""Bytes of the placeholder for an image, whose file system knows its own size."""
_END = 10.0
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE
_F_ADD_SEALS = 1033
_BOOT = 120.0
_SAID, _SHOWN = 1 << 16, 200  # bytes that are looked at, and characters that are shown
_GOES_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # else a machine that nobody talks to would run for ever


def make(
    kernel: str,
    initramfs: str,
    memory: int,
    cpus: int = 1,
    *,
    program: dict[str, Any] | None = None,
    accelerator: AcceleratorName = "tcg",
    patience: float = _BOOT,
    began: Callable[[subprocess.Popen[bytes]], object] = lambda _: None,
) -> tuple[int, int]:
    """Boot a machine with `memory` MiB, and return descriptors of its memory and of its state, sealed. It is prepared
    for programs whose OCI configs are like that of `program` (`insula.agent.warm`). `began` is told its process, which
    may be killed.

    OSError; QmpError with QEMU's own last error, also if the agent does not come up within `patience` seconds.
    """
    with Rollback() as undo, Rollback() as own:
        ram = undo.hold(os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC))
        os.ftruncate(ram, memory << 20)
        state = undo.hold(os.memfd_create("state", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC))
        said = own.hold(os.memfd_create("errors", os.MFD_CLOEXEC))
        disks = [own.hold(_blank(read_only=disk.read_only)) for disk in DISKS]
        monitor, of_monitor = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        agent, of_agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        config = placeholders(kernel, initramfs, memory)._replace(
            cpus=cpus,
            agent=of_agent.fileno(),
            qmp=of_monitor.fileno(),
            memory_fd=ram,
            shared=True,
            disks=[disk._replace(fd=fd) for disk, fd in zip(DISKS, disks, strict=True)],
            accelerator=accelerator,
        )
        process = subprocess.Popen(
            [*_GOES_WITH_US, *arguments(config)],
            pass_fds=descriptors(config),
            stdin=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            began(process)
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))  # it aborts where KVM is but does not work
            of_monitor.close()
            of_agent.close()
            qmp = Qmp(monitor)
            end = time.monotonic() + patience
            _wait_for(protocol.HELLO, agent, end)
            if program:
                request = dumps({"verb": "prepare", "config": program}).encode()
                agent.sendall(protocol.encode(1, protocol.REQUEST, request))
                _wait_for(protocol.REPLY, agent, end)
            save(qmp, state)
            qmp.execute("quit")
            process.wait(_END)
        except (OSError, QmpError) as error:  # a connection that it has reset, or a time limit, too
            process.kill()
            process.wait()
            raise QmpError(f"{error}{_last_error(said)}") from error
        finally:
            process.kill()
            process.wait()
        for fd in (ram, state):
            seal(fd)
        undo.keep()
    return ram, state


def _last_error(said: int) -> str:
    """The last error of QEMU in a file, for the end of a message. An assertion that has failed may come behind it."""
    lines = os.pread(said, _SAID, 0).decode(errors="replace").splitlines()
    [*_, why] = [line for line in lines if "error" in line] or lines or [""]
    return f": {why[:_SHOWN]}" if why else ""


def seal(fd: int) -> None:
    """Forbid everybody to write to a memfd, for ever. EBUSY if it is mapped for that.

    A descriptor that is open for reading only is not enough: whoever has it opens the file again, for writing, as
    /proc/self/fd/N.
    """
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)


def placeholders(kernel: str, initramfs: str, memory: int) -> MachineConfig:
    """The machine of a template, whose disks and network devices a copy has in the same places with its own behind."""
    return MachineConfig(
        kernel=kernel, initramfs=initramfs, memory=memory, agent=-1, qmp=-1, disks=DISKS, interfaces=INTERFACES[:1]
    )


def _blank(*, read_only: bool) -> int:
    """A descriptor of an empty disk; one that may be written can't stand for one that may not."""
    fd = os.memfd_create("blank", os.MFD_CLOEXEC)
    os.ftruncate(fd, LARGEST if read_only else DISK)
    if not read_only:
        return fd
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _wait_for(wanted: int, agent: socket.socket, end: float) -> None:
    """Wait for a frame of the agent, of the kind that is `wanted`."""
    decoder = protocol.FrameDecoder()
    while select.select([agent], [], [], max(0.0, end - time.monotonic()))[0]:
        data = agent.recv(1 << 16)
        if not data:
            raise QmpError("the machine has ended")
        for _, kind, payload in decoder.feed(data):
            if kind == wanted:
                return
            if kind == protocol.ERROR:
                raise QmpError(f"the agent of the template refuses: {payload.decode(errors='replace')}")
    raise TimeoutError("the agent of the template has not answered in time")
