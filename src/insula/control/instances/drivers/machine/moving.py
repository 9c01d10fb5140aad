"""What insulad does while a machine moves to another host: it talks to the shim, and passes bytes between QEMU and the
link to the other host (`insula.machine.shim.departure`, `arrival`).

    source                                     destination
      │                      MESSAGE receiving ◄── QEMU waits
      ├── DISK, FURTHER, MEMORY ─────────────►
      ◄── DISK, FURTHER ──────────────────────┤
    all was sent, the machine stands still      all is there
      │                        MESSAGE arrived ◄─┤
    records that it is given away
      ├─► MESSAGE own                           records that it is this host's, and has it go on
      │                        MESSAGE running ◄─┤
    its end

Who has the record `own` has the machine. Before the source has recorded that it gives the machine away, it goes on
there whatever happens. After that the source does nothing before the destination has said whether it has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Final

from insula.control.instances.drivers.machine.relay import (
    DISK,
    MEMORY,
    STALL,
    LinkChannel,
    relayed,
    telling,
    unless_lost,
    waiting,
    widen,
)
from insula.control.instances.drivers.machine.shim import Conversation, ask, connected
from insula.control.instances.drivers.migration import HostLink, Unsettled
from insula.model.errors import Failed, NotFound
from insula.model.stream import Kind

LONGEST: Final = 3600.0
"""Seconds for disk and memory."""
_PREPARING: Final = 60.0
_AGAIN, _MOST_AGAIN = 0.005, 0.1
_MOST_SESSIONS: Final = 1 << 31


async def leave(
    netns: Callable[[], int],
    link: HostLink,
    give: Callable[[dict[str, Any]], Awaitable[None]],
    further: Sequence[str] = (),
) -> None:
    """Send the machine whose container has this network namespace to the other end of the link, with its `further`
    disks, which are sorted by their names; return when it runs there. `give` records that it is given away, with
    numbers that the other host needs.

    Failed, NotFound: it goes on here, unless it has ended. Unsettled: the connection was lost when it was given away,
    so that the other host has to be asked whether it has it. What is decided is told by `settle`.
    """
    try:
        await _leave(netns, link, give, further)
    except Unsettled:
        raise
    except BaseException:
        await asyncio.shield(asyncio.ensure_future(settle(netns, gone=False)))
        raise


async def _leave(
    netns: Callable[[], int],
    link: HostLink,
    give: Callable[[dict[str, Any]], Awaitable[None]],
    further: Sequence[str],
) -> None:
    channels = [*_of_disks(len(further)), MEMORY]
    with contextlib.ExitStack() as opened:
        pairs = [socket.socketpair() for _ in channels]
        theirs = [opened.enter_context(each) for _, each in pairs]
        widen(*theirs)
        async with relayed(link, dict(zip(channels, (ours for ours, _ in pairs), strict=True))) as relay:
            await relay.told("receiving", _PREPARING)
            given, question = [each.fileno() for each in theirs], {"ask": "migrate", "disks": [*further]}
            shim = await Conversation.begin(netns(), question, given, "it was not moved")
            opened.close()
            with closing(shim):
                watching = asyncio.ensure_future(relay.watch())
                try:
                    await unless_lost(relay, shim.told("copied", LONGEST))
                    numbers = await unless_lost(relay, shim.told("sent", LONGEST))
                finally:
                    watching.cancel()
                await relay.told("arrived")
                await give(numbers)
            try:
                await relay.tell("own", numbers)
                await relay.told("running")
            except Failed as error:
                raise Unsettled(error.message, error.hint or "") from None


def _of_disks(further: int) -> list[LinkChannel]:
    """The channels of the disks of a machine with so many further ones."""
    return [DISK, *(LinkChannel(Kind.FURTHER, number) for number in range(further))]


async def arrive(
    netns: Callable[[], int],
    link: HostLink,
    own: Callable[[dict[str, int]], Awaitable[None]],
    further: int = 0,
) -> None:
    """Receive a machine from the other end of the link, with so many further disks, in the container that has this
    network namespace; return when it runs here. `own` records that it is this host's, with the numbers by which it goes
    on. Failed, NotFound: it is not here, and nobody may have it go on, unless `own` was called."""
    channels = _of_disks(further)
    listener, disks = waiting(len(channels))
    memory, of_memory = socket.socketpair()
    widen(*disks, memory)
    with closing(listener), closing(of_memory):
        ends = {**dict(zip(channels, disks, strict=True)), MEMORY: memory}
        async with relayed(link, ends) as relay, telling(relay):
            await _listening(netns)
            given = [listener.fileno(), of_memory.fileno()]
            shim = await Conversation.begin(netns(), {"ask": "arrive"}, given, "it can't be received")
            listener.close()
            of_memory.close()
            with closing(shim):
                await shim.told("receiving", STALL)
                await relay.tell("receiving")
                await unless_lost(relay, shim.told("arrived", LONGEST))
                await relay.tell("arrived")
                await own(numbers := checked(await relay.told("own")))
            await settle_arrival(netns, numbers)
            with contextlib.suppress(Failed):  # the source asks again
                await relay.tell("running")


def checked(numbers: Any) -> dict[str, int]:
    """The numbers of sessions that another host has sent. Failed."""
    try:
        first, last = int(numbers["first"]), int(numbers["last"])
        if 0 < first <= last < _MOST_SESSIONS:
            return {"first": first, "last": last}
    except (KeyError, TypeError, ValueError):
        pass
    raise Failed("the other host answers with what is no answer")


async def settle_arrival(netns: Callable[[], int], numbers: Mapping[str, int]) -> dict[str, Any] | None:
    """Have a machine that is this host's go on; return its answer, None if it has ended."""
    return await ask(netns(), {"ask": "own", "sessions": dict(numbers)})


async def settle(netns: Callable[[], int], *, gone: bool) -> None:
    """Tell a machine that was to move whether it runs at the other host, and return when it goes on here, or ends."""
    with contextlib.suppress(NotFound, TimeoutError):
        async with asyncio.timeout(STALL):
            await ask(netns(), {"ask": "end" if gone else "back"})


async def _listening(netns: Callable[[], int]) -> None:
    """Return when the shim listens. Failed if it does not, NotFound if it has ended."""
    end, pause = time.monotonic() + STALL, _AGAIN
    while time.monotonic() < end:
        try:
            (await connected(netns())).close()
        except OSError:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MOST_AGAIN)
        else:
            return
    raise Failed("QEMU does not start in time", "look at the load of the host, and try again")
