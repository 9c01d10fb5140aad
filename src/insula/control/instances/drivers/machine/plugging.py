"""Network devices of a machine that runs: the other side of `insula.machine.shim.hotplug`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from insula.control.instances.drivers.base import Connect
from insula.control.instances.drivers.machine import network
from insula.control.instances.drivers.machine.shim import ask
from insula.kernel import tap
from insula.kernel.rollback import Rollback
from insula.model.errors import Failed, NotFound
from insula.network.fabric import Places, TapNic

_PATIENCE: Final = 25.0
"""Seconds for QEMU and the guest, which have less (`insula.machine.shim.hotplug`)."""
_SHOWN: Final = 200


async def plug(netns: Callable[[], int], beside: Places, missing: Places, connect: Connect) -> None:
    """Plug ports into a machine that runs, beside those that it has. `netns` opens the network namespace of its
    container. Failed, NotFound."""
    have = (await asked(netns(), {"ask": "devices"})).get("ports")
    for count, (of, port) in enumerate(missing, 1):
        with Rollback() as opened:
            if isinstance(have, list) and port.index in have:  # it was plugged in before insulad was killed
                nic, given = TapNic(None), list[int]()
            else:
                given = [opened.hold(await asyncio.to_thread(tap.make))]
                nic = TapNic(os.dup(given[0]))
            await connect(nic, port.index)
            there = _network([*beside, *missing[:count]])
            question = {"ask": "plug", "port": network.device(port, of), "network": there}
            await asked(netns(), question, given)


async def unplug(netns: int, index: int, beside: Places) -> None:
    """Have a machine that runs let go of a port; `beside` are those that it keeps. Failed, NotFound."""
    await asked(netns, {"ask": "unplug", "index": index, "network": _network(beside)})


def _network(places: Places) -> dict[str, Any]:
    ordered = sorted(places, key=lambda place: network.number(place[1]))
    return network.plan([port for _, port in ordered], [of for of, _ in ordered])


async def asked(netns: int, question: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
    """The answer of the machine's shim, without an error. `netns` is closed."""
    try:
        async with asyncio.timeout(_PATIENCE):
            answer = await ask(netns, question, descriptors)
    except TimeoutError:
        raise Failed("the machine does not answer in time", "look at the load of the host, or start it again") from None
    if answer is None:
        raise NotFound("the machine has ended", "start it again")
    if "error" in answer:
        raise Failed(f"the machine refuses: {str(answer['error'])[:_SHOWN]}", "try again, or start it again")
    return answer
