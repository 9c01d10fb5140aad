"""`Guests`: the guests of this insulad on a hypervisor, by the IDs of their instances.

A guest is named PREFIX-ID, by the prefix of the settings. It has nothing of its own that has to outlive it: it is made
for a start, and removed after its end. Its console and network devices are found again by its name.
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from insula.control.instances.drivers.xen.keepers import Keepers
from insula.control.workers import Locks
from insula.kernel.terminal import make_raw
from insula.machine.hypervisor import (
    DiskConfig,
    GuestConfig,
    GuestKeeper,
    GuestState,
    Interface,
    Kernel,
)
from insula.machine.installation import GuestSize
from insula.machine.kept import GuestFiles
from insula.model.errors import Conflict, Failed, NotFound

PARAMETERS: Final = "quiet loglevel=0 panic=-1 rdinit=/init"
"""Of the guest's kernel, which takes its console for itself, and is to write nothing there."""
_CONSOLE = re.compile(r"/dev/pts/\d{1,9}")
_DEVICE = re.compile(r"vif\d{1,9}\.\d{1,4}")
_MAJORS = range(136, 144)  # of terminals in /dev/pts (Documentation/admin-guide/devices.txt of Linux)


class StartedGuest(NamedTuple):
    """A guest that runs: a descriptor of its console, and its network devices on this host by MAC address."""

    console: int
    devices: Mapping[str, str]


class Guests:
    """Locks are by instance: two calls for one guest run one after another."""

    def __init__(self, keepers: Keepers, prefix: str) -> None:
        self._keepers = keepers
        self._prefix = f"{prefix}-"
        self.locks = Locks()

    def config(
        self, instance_id: str, size: GuestSize, files: GuestFiles, disks: Sequence[DiskConfig], macs: Sequence[str]
    ) -> GuestConfig:
        """A para-virtualized guest."""
        return GuestConfig(
            name=self._prefix + instance_id,
            uuid=str(uuid.UUID(instance_id)),
            memory=size.memory,
            cpus=size.cpus,
            virtualization="pv",
            kernel=Kernel(str(files.kernel), str(files.initramfs), PARAMETERS),
            disks=disks,
            interfaces=[Interface(mac, script=str(files.vif)) for mac in macs],
            restarts=False,
        )

    async def start(self, config: GuestConfig) -> StartedGuest:
        """Make a guest and start it, in place of one that is left. The caller closes the console. After an error there
        may be a part of it: `remove`."""

        def start(keeper: GuestKeeper) -> StartedGuest:
            _remove(keeper, config.name)
            keeper.define(config)
            keeper.start(config.name)
            return _ends(keeper, config)

        return await self._keepers.do(start)

    async def remove(self, instance_id: str) -> None:
        """Turn a guest off, and forget it; nothing happens if there is none."""
        await self._keepers.do(lambda keeper: _remove(keeper, self._prefix + instance_id))

    async def pause(self, instance_id: str) -> None:
        """Stop a guest, unless it is. NotFound if it has ended."""
        await self._change(instance_id, "running", "paused")

    async def resume(self, instance_id: str) -> None:
        """Have a guest go on, unless it does. NotFound if it has ended."""
        await self._change(instance_id, "paused", "running")

    async def _change(self, instance_id: str, before: GuestState, after: GuestState) -> None:
        name = self._prefix + instance_id

        def change(keeper: GuestKeeper) -> None:
            state = keeper.state(name)
            if state == before:
                keeper.pause(name) if after == "paused" else keeper.resume(name)
            elif state != after:
                raise NotFound(f"the guest is {state}")

        await self._keepers.do(change)

    async def all(self) -> Mapping[str, GuestState]:
        """The guests of this insulad, by the IDs of their instances."""
        found = await self._keepers.do(lambda keeper: keeper.guests())
        return {name.removeprefix(self._prefix): state for name, state in found.items() if self._is_own(name)}

    def _is_own(self, name: str) -> bool:
        return (
            name.startswith(self._prefix) and re.fullmatch("[0-9a-f]{32}", name.removeprefix(self._prefix)) is not None
        )


def _remove(keeper: GuestKeeper, name: str) -> None:
    with suppress(NotFound):
        try:
            keeper.kill(name)
        except Conflict:  # it has just ended by itself
            if keeper.state(name) != "off":
                raise
        keeper.undefine(name)


def _ends(keeper: GuestKeeper, config: GuestConfig) -> StartedGuest:
    """The ends of a guest on this host. What the hypervisor says is checked, and a console that may have been another
    guest's by the time it was opened is not used."""
    devices = keeper.devices(config.name)
    for each in config.interfaces:
        if not _DEVICE.fullmatch(devices.get(each.mac, "")):
            raise Failed(f"Xen has made no network device for {each.mac}", "look at the log of libvirtd")
    path = keeper.console(config.name)
    console = open_console(path)
    try:
        if keeper.state(config.name) not in ("running", "paused") or keeper.console(config.name) != path:
            raise Failed("the guest ended as soon as it was started", "`xl dmesg` and the log of libvirtd tell more")
    except BaseException:
        os.close(console)
        raise
    return StartedGuest(console, devices)


def open_console(path: Path) -> int:
    """Open a terminal of /dev/pts, raw, and blocking. Failed if it is none."""
    wrong = Failed(f"{path} is no terminal", "the hypervisor names it as the console of a guest")
    if not _CONSOLE.fullmatch(str(path)):
        raise wrong
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Failed(f"the console {path} can't be opened: {error.strerror}", "is the guest still there?") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISCHR(status.st_mode) or os.major(status.st_rdev) not in _MAJORS:
            raise wrong
        make_raw(fd)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd
