"""Interpret traffic control on the host (tc(8)): the filters of each tenant's uplink, and the trees of classes.

The kernel itself runs the installed program of a filter on a packet of the tenant (BPF_PROG_TEST_RUN), and tells which
class it chooses.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Final

from insula.kernel.ebpf.load import priority
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import HtbClass
from insula.network.interpreter.queues import InstalledQueues, InstanceClass, PassedClass
from insula.network.linux.interpreter.host import UplinkView

_PARENTS: Final = {"out": tc.INGRESS, "in": tc.EGRESS}  # as seen from the host's end of the uplink
_OUTSIDE: Final = "192.0.2.1"  # RFC 5737
_OUTSIDE6: Final = "2001:db8::1"  # RFC 3849


def queues(
    host: Rtnl, uplinks: Sequence[UplinkView], guaranteed: Mapping[tuple[str, int], Sequence[str]]
) -> InstalledQueues:
    """Read the classes that tenants' packets pass. `guaranteed` are the addresses of instances with floors, by tenant
    and number of the guarantee. OSError."""
    tenants: dict[tuple[str, str], PassedClass] = {}
    networks: dict[tuple[int, str], Sequence[PassedClass]] = {}
    instances: dict[tuple[str, int, str], Sequence[InstanceClass]] = {}
    rests: dict[tuple[str, str], PassedClass] = {}
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
                try:
                    found = trees[each.to].of_instance(priority(each.program, _frame(own, direction)))
                    for (tenant, number), some in guaranteed.items():
                        if tenant == uplink.tenant:
                            chosen = [priority(each.program, _frame(address, direction)) for address in some]
                            instances[tenant, number, direction] = [trees[each.to].of_instance(n) for n in chosen]
                except OSError:
                    unread.add((uplink.tenant, direction))
                    continue
                tenants[uplink.tenant, direction], rests[uplink.tenant, direction] = found
    return InstalledQueues(tenants, networks, instances, rests, unread)


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
        return self._class(way[-2])

    def of_instance(self, number: int) -> InstanceClass:
        """Return the class with a number, and the one below the root on the way from there."""
        leaf = self._classes.get(number)
        return InstanceClass(self.passed(number), self._class(leaf) if leaf else PassedClass(self._device, 0))

    def networks(self, host: Rtnl) -> list[tuple[int, Sequence[PassedClass]]]:
        """Return the classes of packets between hosts, by VNI: what each filter for it says. There are several if
        packets to some hosts have a ceiling."""
        found: dict[int, list[PassedClass]] = {}
        for _, (number, value) in sorted(tc.u32_classes(host, self._index).items()):
            passed = self.passed(number)
            if passed not in found.setdefault(value >> 8, []):
                found[value >> 8].append(passed)
        return list(found.items())

    def _class(self, each: HtbClass) -> PassedClass:
        return PassedClass(self._device, each.number, each.rate, each.ceiling)


def _frame(own: str, direction: str) -> bytes:
    """Return an Ethernet frame with a UDP packet from an address to the outside ("out"), or from there. Nobody looks at
    its checksums."""
    six = ":" in own
    ends = (own, _OUTSIDE6 if six else _OUTSIDE)
    addresses = b"".join(ip_address(each).packed for each in (ends if direction == "out" else ends[::-1]))
    datagram = struct.pack("!HHHH", 40000, 9, 26, 0) + bytes(18)
    if six:
        return bytes(12) + struct.pack("!HIHBB", 0x86DD, 6 << 28, len(datagram), 17, 64) + addresses + datagram
    header = struct.pack("!BBHHHBBH", 0x45, 0, 46, 0, 0, 64, 17, 0)
    return bytes(12) + struct.pack("!H", 0x0800) + header + addresses + datagram
