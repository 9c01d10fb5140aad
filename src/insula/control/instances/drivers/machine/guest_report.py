"""What a guest says of itself: the other side of `insula.machine.shim.guest_agent`. All of it may be a lie."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from ipaddress import ip_interface
from typing import Any, Final

from insula.control.instances.drivers.machine.shim import ask
from insula.model.guests import GuestReport, ReportedInterface

_PATIENCE: Final = 20.0
"""Seconds for three commands, of which each has less (`insula.machine.shim.guest_agent`)."""
_MOST: Final = 64 << 10  # bytes of the answer
_SHOWN: Final = 255  # characters of each text
_INTERFACES: Final = 32
_ADDRESSES: Final = 16  # of each interface
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


async def ask_guest(netns: int) -> GuestReport:
    """The report of the machine whose container has this network namespace, which is closed."""
    try:
        async with asyncio.timeout(_PATIENCE):
            answer = await ask(netns, {"ask": "guest"}, most=_MOST)
    except TimeoutError:
        answer = None
    return read(answer or {})


def read(answer: dict[str, Any]) -> GuestReport:
    """The report of what an agent has returned, by its commands; what is no answer to one is left out."""
    system = _object(answer.get("guest-get-osinfo"))
    return GuestReport(
        answered=any(name.startswith("guest-") for name in answer),
        hostname=_text(_object(answer.get("guest-get-host-name")).get("host-name")),
        system=_text(system.get("pretty-name")) or _text(system.get("name")),
        kernel=_text(system.get("kernel-release")),
        interfaces=[*_interfaces(answer.get("guest-network-get-interfaces"))],
    )


def _interfaces(found: Any) -> Iterator[ReportedInterface]:
    for each in found[:_INTERFACES] if isinstance(found, list) else ():
        if name := _text(_object(each).get("name")):
            mac, addresses = each.get("hardware-address"), each.get("ip-addresses")
            kept = addresses[:_ADDRESSES] if isinstance(addresses, list) else []
            known = mac if isinstance(mac, str) and _MAC.fullmatch(mac) else None
            yield ReportedInterface(name=name, mac=known, addresses=[*_addresses(kept)])


def _addresses(found: list[Any]) -> Iterator[str]:
    for each in map(_object, found):
        address, prefix = each.get("ip-address"), each.get("prefix")
        if isinstance(address, str) and isinstance(prefix, int):
            try:
                yield ip_interface(f"{address[:_SHOWN].partition('%')[0]}/{prefix}").with_prefixlen
            except ValueError:
                continue


def _object(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _text(found: Any) -> str | None:
    """A text on one line: what is not printable is escaped."""
    if not isinstance(found, str):
        return None
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in found[:_SHOWN])
    return text[:_SHOWN] or None
