"""What insulad does while a machine stands still, for a snapshot: the other side of `insula.machine.shim.moment`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from insula.control.instances.drivers.machine.shim import Conversation
from insula.machine.qemu.devices import MODULES, MOST_MEMORY, SLOTS
from insula.model.errors import Failed, InsulaError
from insula.model.objects import Struct
from insula.model.rules import MAX_DISKS

_PATIENCE: Final = 60.0  # seconds until it stands still, and until it goes on
_SAVING: Final = 600.0
_SHOWN: Final = 300
_HELD: Final = 5.0  # seconds in which programs should be held; else the container is frozen with them running


_Mib = Annotated[int, msgspec.Meta(ge=0, le=MOST_MEMORY)]
_Slot = Annotated[int, msgspec.Meta(ge=min(SLOTS), le=max(SLOTS))]
_Disks = dict[str, Annotated[int, msgspec.Meta(ge=0, le=max(SLOTS))]]


class MachineDevices(Struct, kw_only=True):
    """What a machine has: MiB of memory, and of modules that were plugged in; processors, and how many were plugged in
    besides; slots that have network devices; and the slots of further disks by their names, 0 for those in none."""

    memory: _Mib = 0
    modules: Annotated[list[_Mib], msgspec.Meta(max_length=MODULES)] = msgspec.field(default_factory=list)
    cpus: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    plugged: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    slots: Annotated[list[_Slot], msgspec.Meta(max_length=len(SLOTS))] = msgspec.field(default_factory=list)
    disks: Annotated[_Disks, msgspec.Meta(max_length=MAX_DISKS)] = msgspec.field(default_factory=dict)

    def without_disks(self) -> dict[str, Any]:
        """The others, by their names."""
        found = msgspec.structs.asdict(self)
        del found["disks"]
        return found


def devices_of(answer: Mapping[str, Any]) -> MachineDevices:
    """What a machine says that it has; one that an earlier Insula has started says nothing of its disks. Failed."""
    try:
        return msgspec.convert(
            {name: answer[name] for name in MachineDevices.__struct_fields__ if name in answer}, MachineDevices
        )
    except msgspec.ValidationError:
        raise Failed("the machine answers with what is no answer") from None


class Stood(NamedTuple):
    """A machine that stood still: for how many seconds, under which version of QEMU, as which type of machine, and with
    which devices."""

    seconds: float
    qemu: str
    machine: str
    devices: MachineDevices = MachineDevices()


async def stand_still(
    netns: int,
    memory: int | None,
    work: Callable[[], Awaitable[object]],
    give_up: Callable[[], object] = lambda: None,
) -> Stood:
    """Have the machine whose container has this network namespace stand still, do the work, and have it go on. Its
    memory is written to the descriptor `memory` meanwhile, which is closed, as `netns` is. Failed, NotFound if it ends.

    The machine goes on whatever happens here, also when this process is killed. If it fails meanwhile, `give_up` has
    the work end.
    """
    try:
        given = [] if memory is None else [memory]
        shim = await Conversation.begin(netns, {"ask": "moment"}, given, "no snapshot was made")
    finally:
        if memory is not None:
            os.close(memory)
    with closing(shim):
        kind = await _told(shim, "stopped", _PATIENCE)
        working = asyncio.ensure_future(work())
        try:
            if memory is not None:
                await _told(shim, "saved", _SAVING)
            await asyncio.wait([working], timeout=_SAVING)
        finally:
            if not working.done():
                give_up()
            await asyncio.wait([working])  # it uses files of the caller
        working.result()
        shim.tell("go")
        seconds = await _told(shim, "running", _PATIENCE)
    if not isinstance(seconds, int | float) or not isinstance(kind, dict):
        raise Failed("the machine answers with what is no answer")
    qemu, machine = (str(kind.get(name))[:_SHOWN] for name in ("qemu", "machine"))
    return Stood(float(seconds), qemu, machine, devices_of(kind))


@asynccontextmanager
async def programs_held(netns: int) -> AsyncIterator[None]:
    """Hold the programs of the machine whose container has this network namespace, if that is done soon: they go on
    when it has the time and fresh random numbers, after the body, or when the container runs again. `netns` is
    closed."""
    async with AsyncExitStack() as stack:
        with suppress(OSError, InsulaError):
            shim = await Conversation.begin(netns, {"ask": "freeze"}, [], "its programs were not held")
            stack.enter_context(closing(shim))
            await _told(shim, "frozen", _HELD)
        yield


async def _told(shim: Conversation, what: str, seconds: float) -> Any:
    try:
        return await shim.told(what, seconds)
    except TimeoutError:
        hint = "look at the load of the host; the machine goes on as soon as it can"
        raise Failed("the machine does not stand still in time", hint) from None
