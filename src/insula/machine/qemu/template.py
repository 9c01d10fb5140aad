"""A template: a machine that was booted once and stopped, of which others are copies (docs/system/vm-templating.rst).

A boot takes seconds, a copy a tenth of one. The template's memory is a file, and a copy maps it privately
(MAP_PRIVATE, mmap(2)): pages are shared until the copy writes to them. The state of its devices and processors is a
small file beside it, made with the migration capability `x-ignore-shared`, which leaves out memory that is a file.

Nothing of a tenant is in a template: kernel, agent, and placeholders for disks and network devices. A copy must not be
able to change it. So the memory is a memfd that is sealed against writing (memfd_create(2), F_SEAL_WRITE), which even a
QEMU in the hands of its guest can't lift.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import time

from insula.kernel.rollback import Rollback
from insula.machine import protocol
from insula.machine.qemu.command_line import GuestDisk, GuestInterface, MachineConfig, arguments, descriptors
from insula.machine.shim.qmp import DEADLINE, Qmp, QmpError
from insula.model.cpython import socket

CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}]
DISKS = (GuestDisk("image", -1, read_only=True), GuestDisk("disk", -1))
INTERFACES = (GuestInterface("52:54:00:00:00:00"),)
LARGEST, SMALLEST = 1 << 40, 1 << 20
"""Sizes of the placeholders, in bytes: an image's file system knows its own size, and a disk is resized to its own."""
_PAUSE = 0.0005
_END = 10.0
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE
_F_ADD_SEALS = 1033
_BOOT = 120.0


def make(kernel: str, initramfs: str, memory: int) -> tuple[int, int]:
    """Boot a machine with `memory` MiB, and return descriptors of its memory, sealed, and of its state.

    QmpError, OSError; TimeoutError if the agent does not come up.
    """
    with Rollback() as undo, Rollback() as own:
        ram = undo.hold(os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC))
        os.ftruncate(ram, memory << 20)
        state = undo.hold(os.memfd_create("state", os.MFD_CLOEXEC))
        disks = [own.hold(_blank(read_only=disk.read_only)) for disk in DISKS]
        monitor, of_monitor = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        agent, of_agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        config = placeholders(kernel, initramfs, memory)._replace(
            agent=of_agent.fileno(),
            qmp=of_monitor.fileno(),
            memory_fd=ram,
            shared=True,
            disks=[disk._replace(fd=fd) for disk, fd in zip(DISKS, disks, strict=True)],
        )
        process = subprocess.Popen(arguments(config), pass_fds=descriptors(config), stdin=subprocess.DEVNULL)
        try:
            of_monitor.close()
            of_agent.close()
            qmp = Qmp(monitor)
            _wait_for_agent(agent)
            save(qmp, state)
            qmp.execute("quit")
            process.wait(_END)
        finally:
            process.kill()
            process.wait()
        seal(ram)
        undo.keep()
    return ram, state


def seal(memory: int) -> None:
    """Forbid everybody to write to a memfd, for ever. EBUSY if it is mapped for that."""
    fcntl.fcntl(memory, _F_ADD_SEALS, _SEALS)


def placeholders(kernel: str, initramfs: str, memory: int) -> MachineConfig:
    """The machine of a template, whose disks and network devices a copy has in the same places with its own behind."""
    return MachineConfig(
        kernel=kernel, initramfs=initramfs, memory=memory, agent=-1, qmp=-1, disks=DISKS, interfaces=INTERFACES
    )


def save(qmp: Qmp, state: int) -> None:
    """Stop a machine, and write the state of its devices and processors to a descriptor. QmpError."""
    qmp.execute("stop")
    qmp.execute("migrate-set-capabilities", capabilities=CAPABILITIES)
    qmp.give("state", state)
    qmp.execute("migrate", uri="fd:state")
    end = time.monotonic() + DEADLINE
    while (found := qmp.execute("query-migrate").get("status")) != "completed":
        if found == "failed" or time.monotonic() > end:
            raise QmpError("the state can't be written")
        time.sleep(_PAUSE)


def load(qmp: Qmp, state: int, disk: int) -> None:
    """Load a state, in a machine that waits for one, and let it run. `disk` is the size of its own disk. QmpError."""
    qmp.execute("migrate-set-capabilities", capabilities=CAPABILITIES)
    qmp.execute("migrate-incoming", uri=f"fd:{state}")
    end = time.monotonic() + DEADLINE
    while qmp.execute("query-status")["status"] == "inmigrate":
        if time.monotonic() > end:
            raise QmpError("the state can't be loaded")
        time.sleep(_PAUSE)
    qmp.execute("block_resize", **{"node-name": "disk1", "size": disk})
    qmp.execute("cont")


def _blank(*, read_only: bool) -> int:
    """A descriptor of an empty disk; one that may be written can't stand for one that may not."""
    fd = os.memfd_create("blank", os.MFD_CLOEXEC)
    os.ftruncate(fd, LARGEST if read_only else SMALLEST)
    if not read_only:
        return fd
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _wait_for_agent(agent: socket.socket) -> None:
    decoder = protocol.FrameDecoder()
    end = time.monotonic() + _BOOT
    while select.select([agent], [], [], max(0.0, end - time.monotonic()))[0]:
        data = agent.recv(1 << 16)
        if not data:
            raise QmpError("the machine has ended")
        for _, kind, _ in decoder.feed(data):
            if kind == protocol.HELLO:
                return
    raise TimeoutError("the agent of the template does not come up")
