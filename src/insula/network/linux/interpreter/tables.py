"""The tables of a stack as messages of the kernel (rtnetlink(7)), and what the interpreter makes of these.

Most messages are those of the last time. So a table is made again only if one of its messages has changed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Final, Generic, TypeVar

from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink import messages as rt
from insula.kernel.netlink.messages import Link, parse_link
from insula.network.linux.interpreter.routes import InstalledRoute, RoutingRule, parse_route, parse_rule

T = TypeVar("T")
Tunnels = dict[tuple[int, str], frozenset[tuple[str, int | None]]]
_FAILED: Final = 0x20  # NUD_FAILED


class RememberedTable(Generic[T]):
    """What `make` makes of the messages of a table, and of other things that are the same object until they change. It
    returns the same object if nothing has changed."""

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._last: tuple[Sequence[bytes], tuple[object, ...], T] | None = None

    def of(self, messages: Sequence[bytes], *others: object) -> T:
        last = self._last
        if last is None or last[0] != messages or any(a is not b for a, b in zip(last[1], others, strict=True)):
            last = self._last = messages, others, self._make(messages, *others)
        return last[2]


class RememberedLinks:
    """The links by index. Messages about bridges have a clock in them, so each link is remembered by itself."""

    def __init__(self) -> None:
        self._known: dict[bytes, Link] = {}
        self._last: Mapping[int, Link] = {}

    def of(self, messages: Sequence[bytes]) -> Mapping[int, Link]:
        self._known = {each: self._known.get(each) or parse_link(each) for each in messages}
        links = {link.index: link for link in self._known.values()}
        if links != self._last:
            self._last = links
        return self._last


def routes(messages: Sequence[bytes]) -> list[InstalledRoute]:
    return [route for body in messages if (route := parse_route(body))]


def rules(messages: Sequence[bytes]) -> list[RoutingRule]:
    return [parse_rule(body) for body in messages]


def addresses(messages: Sequence[bytes]) -> dict[tuple[int, int], int]:
    """Return the first global address of each device, by (version of IP, index)."""
    found: dict[tuple[int, int], int] = {}
    for body in messages:
        family, _, _, scope, index = rt.ADDR.unpack_from(body)
        parts = rtattr.parse(body[rt.ADDR.size :])
        packed = parts.get(rt.IFA_LOCAL) or parts.get(rt.IFA_ADDRESS)
        if packed and scope == 0:
            found.setdefault((6 if family == socket.AF_INET6 else 4, index), int.from_bytes(packed, "big"))
    return found


def neighbours(messages: Sequence[bytes]) -> dict[tuple[int, int, int], str]:
    """Return MAC addresses by (version of IP, index of the device, address)."""
    found: dict[tuple[int, int, int], str] = {}
    for body in messages:
        _, index, state, _, _ = rt.NEIGH.unpack_from(body)
        parts = rtattr.parse(body[rt.NEIGH.size :])
        if rt.NDA_DST in parts and rt.NDA_LLADDR in parts and not state & _FAILED:
            version = 6 if body[0] == socket.AF_INET6 else 4
            found[version, index, int.from_bytes(parts[rt.NDA_DST], "big")] = parts[rt.NDA_LLADDR].hex(":")
    return found


def entries(
    messages: Sequence[bytes], links: Mapping[int, Link]
) -> tuple[dict[int, dict[str, frozenset[int]]], Tunnels]:
    """Return the forwarding entries of bridges, and those of VXLAN devices."""
    found: dict[int, dict[str, frozenset[int]]] = {}
    tunnels: Tunnels = {}
    for body in messages:
        _, index, state, flags, _ = rt.NEIGH.unpack_from(body)
        link = links.get(index)
        if link is None:
            continue
        if link.kind == "vxlan" and flags & rt.NTF_SELF:
            _add_tunnel(tunnels, index, rtattr.parse(body[rt.NEIGH.size :]))
            continue
        if link.master is None or flags & rt.NTF_SELF or state & rt.NUD_PERMANENT:
            continue  # a permanent entry is an address of the bridge itself
        parts = rtattr.parse(body[rt.NEIGH.size :])
        if rt.NDA_LLADDR in parts:
            of_bridge, mac = found.setdefault(link.master, {}), parts[rt.NDA_LLADDR].hex(":")
            of_bridge[mac] = of_bridge.get(mac, frozenset()) | {index}
    return found, tunnels


def _add_tunnel(into: Tunnels, index: int, parts: Mapping[int, bytes]) -> None:
    """Add an entry of a VXLAN device; one that leads to no host, but to a group of next hops, has no name here."""
    if rt.NDA_LLADDR not in parts:
        return
    key = index, parts[rt.NDA_LLADDR].hex(":")
    host = str(ip_address(parts[rt.NDA_DST])) if rt.NDA_DST in parts else "unknown"
    vni = rtattr.integer(parts[rt.NDA_VNI]) if rt.NDA_VNI in parts else None
    into[key] = into.get(key, frozenset()) | {(host, vni)}
