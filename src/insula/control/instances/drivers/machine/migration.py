"""`MachineMigrations`: which machines move to another host, and come from one, by records in their directories; see
`Migrations`. How they move is in moving.py."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from insula.control.instances.drivers.machine import disk, moving
from insula.control.instances.drivers.machine.moment import MachineDevices, devices_of
from insula.control.instances.drivers.machine.relay import STALL
from insula.control.instances.drivers.machine.shim import ask
from insula.control.instances.drivers.machine.sizes import LEAST, MOST
from insula.control.instances.drivers.migration import HostLink, Unsettled
from insula.kernel import records
from insula.machine.qemu.devices import SLOTS
from insula.machine.qemu.root import QEMU
from insula.model.errors import Conflict, Failed, Unavailable
from insula.model.migration import MachineFacts, MigrationTarget
from insula.model.objects import Instance, disks_of

_MOST_DISK: Final = 1 << 40
_VERSIONED: Final = re.compile(r"pc-q35-\d+\.\d+")
_VERSION: Final = re.compile(r"version (\d+\.\d+\.\d+)")


class MachineMigrations:
    """Moves of virtual machines; see `Migrations`. Files in the directory of an instance: `leaving` has the
    `MigrationTarget` that it was given to, and nothing before that; `sessions` has the numbers by which one that has
    arrived goes on, until it does."""

    def __init__(
        self, directory: Callable[[str], Path], disk: Callable[[str], Path], netns: Callable[[str], int]
    ) -> None:
        self._directory, self._disk, self._netns = directory, disk, netns
        self._expected: dict[str, MachineFacts] = {}

    # -- the source ------------------------------------------------------------------------------------------------

    async def facts(self, instance: Instance) -> MachineFacts:
        try:
            async with asyncio.timeout(STALL):
                found = await ask(self._netns(instance.id), {"ask": "describe"})
        except TimeoutError:
            found = None
        if not found or "qemu" not in found:
            what = f"instance {instance.name} does not tell what it is"
            raise Failed(what, "if an older Insula has started it, restart it; else try again")
        shown = {name: str(found.get(name))[:100] for name in ("qemu", "machine", "accelerator", "processor")}
        disk, has = (await asyncio.to_thread(self._disk(instance.id).stat)).st_size, devices_of(found)
        if {*has.disks} != {*_further(instance)}:
            what = f"the further disks of {instance.name} are changing, or its guest has let go of one"
            raise Conflict(what, "try again; if that does not help, stop and start it")
        facts: dict[str, Any] = {**shown, **has.without_disks()}
        return MachineFacts(**facts, disk=disk, further=has.disks)

    async def leave(self, instance: Instance, target: MigrationTarget, link: HostLink) -> None:
        record = self._leaving(instance.id)

        async def give(_: dict[str, Any]) -> None:
            await asyncio.to_thread(records.replace, record, msgspec.json.encode(target))

        await asyncio.to_thread(records.replace, record, b"")
        try:
            await moving.leave(lambda: self._netns(instance.id), link, give, _further(instance))
        except Unsettled:
            raise
        except BaseException:
            await asyncio.shield(asyncio.to_thread(record.unlink, missing_ok=True))
            raise

    def given(self, instance_id: str) -> MigrationTarget | None:
        try:
            written = records.read(self._leaving(instance_id))
        except FileNotFoundError:
            return None
        return msgspec.json.decode(written, type=MigrationTarget) if written else None

    def is_leaving(self, instance_id: str) -> bool:
        return self._leaving(instance_id).exists()

    async def settle(self, instance_id: str, *, gone: bool) -> None:
        await moving.settle(lambda: self._netns(instance_id), gone=gone)
        if not gone:  # else it goes with the instance, which must not be started before
            await asyncio.to_thread(self._leaving(instance_id).unlink, missing_ok=True)

    def _leaving(self, instance_id: str) -> Path:
        return self._directory(instance_id) / "leaving"

    # -- the destination -------------------------------------------------------------------------------------------

    async def check(self, facts: MachineFacts) -> None:
        here = await asyncio.to_thread(_of_this_host)
        for name, what in (("qemu", "QEMU"), ("accelerator", "accelerator")):
            if here[name] != getattr(facts, name):
                raise Conflict(
                    f"the machine runs with the {what} {getattr(facts, name)}, and the other host has {here[name]}",
                    "stop it, and move its data, or make both hosts the same",
                )
        if facts.processor == "host" or facts.processor != here["processor"]:
            what = f"the machine has the processor {facts.processor}, which other hosts may not have"
            raise Conflict(what, "machines move only between hosts that emulate processors (TCG), so far")
        if not _VERSIONED.fullmatch(facts.machine):
            raise Conflict(f"the machine is of type {facts.machine}, which has no version", "restart it, and try again")
        memory, cpus = facts.memory + sum(facts.modules), facts.cpus + facts.plugged
        try:
            msgspec.convert({name: getattr(facts, name) for name in MachineDevices().without_disks()}, MachineDevices)
        except msgspec.ValidationError:
            raise Conflict("the machine has devices that this host has no places for", "use another host") from None
        if not (LEAST <= memory << 20 <= MOST and 0 < cpus <= (os.cpu_count() or 1)):
            what = f"the machine has {memory} MiB and {cpus} processors, which this host can't give it"
            raise Conflict(what, "use a host that has as many")
        slots = [*facts.slots, *facts.further.values()]
        if not facts.slots or len({*slots}) != len(slots) or not {*slots} <= {*SLOTS}:
            raise Conflict(
                "the network devices or disks of the machine are where this host has no places", "use another host"
            )
        if not disk.LEAST <= facts.disk <= _MOST_DISK:
            raise Conflict("the size of the machine's disk is not one that this host makes", "use another host")

    def expect(self, instance_id: str, facts: MachineFacts | None) -> None:
        if facts:
            self._expected[instance_id] = facts
        else:
            self._expected.pop(instance_id, None)

    def expected(self, instance: Instance) -> MachineFacts | None:
        """What a start of the instance waits for; None if it is an ordinary one. Failed if it may not be started."""
        if instance.arriving:
            if instance.id in self._expected:
                return self._expected[instance.id]
            raise Failed(f"instance {instance.name} was being moved here, and did not arrive", "it is removed")
        if self.is_leaving(instance.id):
            target = self.given(instance.id)
            where = f" given to {target.addresses[0]}" if target else " being moved"
            what = f"instance {instance.name} was{where}, and it is not known yet whether it runs there"
            raise Failed(what, "it is asked again and again; `insula ps` shows it when that is known")
        return None

    def make_disk(self, instance_id: str, size: int) -> None:
        """Make a disk with nothing on it yet. OSError."""
        with self._disk(instance_id).open("wb") as made:
            os.fchmod(made.fileno(), 0o600)
            made.truncate(size)

    async def arrive(self, instance: Instance, link: HostLink, own: Callable[[], Awaitable[None]]) -> None:
        async def recorded(numbers: dict[str, int]) -> None:
            await asyncio.to_thread(records.replace, self._sessions(instance.id), json.dumps(numbers).encode())
            await own()

        await moving.arrive(lambda: self._netns(instance.id), link, recorded, len(_further(instance)))

    def question(self, instance_id: str) -> dict[str, Any]:
        """What a machine is asked to learn whether it is ready: one that has arrived has to be told to go on."""
        try:
            return {"ask": "own", "sessions": moving.checked(json.loads(records.read(self._sessions(instance_id))))}
        except (FileNotFoundError, ValueError):
            return {"ask": "ready"}

    def finish(self, instance_id: str) -> None:
        """Forget that a machine has arrived, now that it goes on. OSError. Blocks."""
        self._sessions(instance_id).unlink(missing_ok=True)

    def disown(self, instance_id: str) -> None:
        self._sessions(instance_id).unlink(missing_ok=True)

    def _sessions(self, instance_id: str) -> Path:
        return self._directory(instance_id) / "sessions"


def _further(instance: Instance) -> list[str]:
    """The names of its further disks, in order."""
    return sorted(each.name for each in disks_of(instance.spec))


def _of_this_host() -> dict[str, str]:
    """The version of QEMU, and how machines are started. Unavailable."""
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=STALL).stdout
    found = _VERSION.search(said)
    if not found:
        raise Unavailable("QEMU does not tell its version", "is it installed?")
    return {"qemu": found[1], "accelerator": "tcg", "processor": "max"}
