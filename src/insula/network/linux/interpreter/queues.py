"""Interpret traffic control on the host (tc(8)): the filters of each tenant's uplink, and the trees of classes.

The kernel itself runs the installed program of a filter on a packet of the tenant (BPF_PROG_TEST_RUN), and tells which
class it chooses.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

from insula.kernel.ebpf.load import priority
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import HtbClass
from insula.network.interpreter.queues import InstalledQueues, PassedClass
from insula.network.linux.interpreter.host import UplinkView

_PARENTS: Final = {"out": tc.INGRESS, "in": tc.EGRESS}  # as seen from the host's end of the uplink
_OUTSIDE: Final = "192.0.2.1"  # RFC 5737


def queues(host: Rtnl, uplinks: Sequence[UplinkView]) -> InstalledQueues:
    """Read the classes that tenants' packets pass. OSError."""
    tenants: dict[tuple[str, str], PassedClass] = {}
    networks: dict[tuple[int, str], PassedClass] = {}
    trees: dict[int, _Tree] = {}
    unread: set[tuple[str, str]] = set()
    for uplink in uplinks:
        index = host.index(uplink.device)
        if index is None or tc.qdisc(host, index, tc.CLSACT) is None:
            continue
        own = dict(uplink.addresses)[4]
        for direction, parent in _PARENTS.items():
            for each in tc.filters(host, index, parent)[:1]:  # the first one redirects all
                if each.to is None:
                    continue
                if each.to not in trees:
                    trees[each.to] = _Tree(host, each.to)
                    networks |= {(vni, direction): found for vni, found in trees[each.to].networks(host)}
                source, target = (own, _OUTSIDE) if direction == "out" else (_OUTSIDE, own)
                try:
                    number = priority(each.program, _frame(source, target))
                except OSError:
                    unread.add((uplink.tenant, direction))
                    continue
                tenants[uplink.tenant, direction] = trees[each.to].passed(number)
    return InstalledQueues(tenants, networks, unread)


class _Tree:
    """The tree of a device."""

    def __init__(self, host: Rtnl, index: int) -> None:
        link = next((each for each in host.links() if each.index == index), None)
        self._index = index
        self._device = link.name if link else f"device {index}"
        self._classes = tc.classes(host, index)

    def passed(self, number: int) -> PassedClass:
        """Return the class below the root, on the way from a class with this number to the root."""
        way: list[HtbClass] = []
        while (each := self._classes.get(number)) and each not in way:
            way.append(each)
            number = each.parent
        if len(way) < 2:
            return PassedClass(self._device, 0)
        return PassedClass(self._device, way[-2].number, way[-2].rate, way[-2].ceiling)

    def networks(self, host: Rtnl) -> list[tuple[int, PassedClass]]:
        """Return the classes of packets between hosts, by VNI: what the first filter for each says."""
        found: dict[int, PassedClass] = {}
        for _, (number, value) in sorted(tc.u32_classes(host, self._index).items()):
            found.setdefault(value >> 8, self.passed(number))
        return list(found.items())


def _frame(source: str, target: str) -> bytes:
    """Return an Ethernet frame with a UDP packet, whose checksums nobody looks at."""
    header = struct.pack("!BBHHHBBH", 0x45, 0, 46, 0, 0, 64, 17, 0)
    addresses = ip_address(source).packed + ip_address(target).packed
    datagram = struct.pack("!HHHH", 40000, 9, 26, 0) + bytes(18)
    return bytes(12) + struct.pack("!H", 0x0800) + header + addresses + datagram
