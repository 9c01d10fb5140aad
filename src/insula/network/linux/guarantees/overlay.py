"""Packets of the overlay in the tree of this host: those of tenants' networks between hosts (RFC 7348).

They don't pass the tenants' uplinks: VXLAN sends them from a socket of the host, and receives them there. Two filters
on the underlay device redirect them, before they leave and when they arrive, to the same two devices as those of the
uplinks (shaper.py). There they are given to the class of their tenant by the network's number (VNI), with a hash table
of 256 buckets, so that one comparison mostly suffices. So a floor is about all that a tenant sends or receives over
the link, and nothing else of the underlay device is changed.

What a tenant sends to one certain host may have a class of its own (destinations.py): its filters are before the others
of their bucket.

The outer IP header has no options: that is how the kernel's VXLAN makes it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Final, NamedTuple

from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import U32Match

PRIORITIES: Final = {"out": 4789, "in": 4790}
"""The priorities of the filters on the underlay device, by which they are told from others', and from each other: the
kernel lists filters of u32 for both parents."""
_PARENTS: Final = {"out": tc.EGRESS, "in": tc.INGRESS}
_UDP = 17
_FIRST, _FIRST_OF_ALL = 1, 0x800  # the numbers in a bucket of filters with a destination, and of those for all others


class OuterHeaders(NamedTuple):
    """A version of IP on the underlay: its EtherType, the number of its hash table, the 32 bits that have the number of
    the next protocol, and the lengths of the outer headers up to the destination, up to UDP, and up to the VNI."""

    ethertype: int
    table: int
    protocol: U32Match
    destination: int
    udp: int
    vni: int


_HEADERS: Final = {
    4: OuterHeaders(0x0800, 1, U32Match(_UDP << 16, 0x00FF0000, 8), 16, 20, 32),
    6: OuterHeaders(0x86DD, 2, U32Match(_UDP << 8, 0x0000FF00, 4), 24, 40, 52),
}


def redirect(rtnl: Rtnl, underlay: int, devices: Mapping[str, int], *, version: int, port: int) -> None:
    """Redirect VXLAN packets that leave the underlay device (an index) to the device "out", and those that arrive to
    "in". `port` is the UDP port."""
    headers = _HEADERS[version]
    for direction, to in devices.items():
        parent, priority = _PARENTS[direction], PRIORITIES[direction]
        have = tc.u32_redirections(rtnl, underlay, parent, priority)
        if have == [to]:
            continue
        rtnl.execute(tc.add_clsact(underlay))
        if have:
            rtnl.execute(tc.delete_filters(underlay, parent, priority))
        matches = _matches(headers, port)
        rtnl.execute(tc.u32_redirect(underlay, parent, matches, to, priority=priority, protocol=headers.ethertype))


def stop(rtnl: Rtnl, underlay: int) -> None:
    """Remove the filters from the underlay device. Other filters stay, and the discipline that holds them."""
    if tc.qdisc(rtnl, underlay, tc.CLSACT) is not None:
        rtnl.execute(*(tc.delete_filters(underlay, _PARENTS[each], PRIORITIES[each]) for each in PRIORITIES))


def is_redirected(rtnl: Rtnl, underlay: int, devices: Mapping[str, int]) -> bool:
    """Return whether the filters are there."""
    return all(
        tc.u32_redirections(rtnl, underlay, _PARENTS[direction], PRIORITIES[direction]) == [to]
        for direction, to in devices.items()
    )


def classify(
    rtnl: Rtnl,
    device: int,
    to_class: int,
    vnis: Sequence[int],
    *,
    version: int,
    port: int,
    destination: str | None = None,
) -> None:
    """Have packets of these networks go to a class of the device (an index), and no others to that class. With
    `destination` only those to that host."""
    headers = _HEADERS[version]
    have = tc.u32_classes(rtnl, device)
    if not tc.has_u32_link(rtnl, device):
        protocol = headers.ethertype
        rtnl.execute(
            tc.u32_table(device, headers.table, priority=1, protocol=protocol),
            tc.u32_link(
                device, _matches(headers, port), headers.table, 0x0000FF00, headers.vni, priority=1, protocol=protocol
            ),
        )
    rtnl.execute(*_changes(device, headers, to_class, vnis, have, destination))


def _changes(
    device: int,
    headers: OuterHeaders,
    to_class: int,
    vnis: Sequence[int],
    have: Mapping[int, tuple[int, int]],
    destination: str | None,
) -> list[Request]:
    """Return requests for the filters of a class. `have` are (class, VNI with eight bits of zero) by the filter."""
    mine = {value >> 8: number for number, (to, value) in have.items() if to == to_class}
    first, more = (_FIRST_OF_ALL, []) if destination is None else (_FIRST, _to(headers, destination))
    stale = [number for vni, number in mine.items() if vni not in vnis]
    requests = [tc.delete_u32(device, number, priority=1, protocol=headers.ethertype) for number in stale]
    taken = set(have) - {*stale}
    for vni in vnis:
        if vni in mine:
            continue
        base = headers.table << 20 | (vni & 0xFF) << 12
        node = next(n for n in range(first, first + 0x7FF) if base | n not in taken)
        taken.add(base | node)
        requests.append(
            tc.u32_class(
                device,
                [U32Match(vni << 8, 0xFFFFFF00, headers.vni), *more],
                to_class,
                priority=1,
                protocol=headers.ethertype,
                table=headers.table,
                bucket=vni & 0xFF,
                node=node,
            )
        )
    return requests


def _to(headers: OuterHeaders, destination: str) -> list[U32Match]:
    """Return what packets to this host have at their outer destination."""
    packed = ip_address(destination).packed
    words = struct.unpack(f"!{len(packed) // 4}I", packed)
    return [U32Match(word, 0xFFFFFFFF, headers.destination + 4 * number) for number, word in enumerate(words)]


def _matches(headers: OuterHeaders, port: int) -> list[U32Match]:
    return [headers.protocol, U32Match(port, 0x0000FFFF, headers.udp)]
