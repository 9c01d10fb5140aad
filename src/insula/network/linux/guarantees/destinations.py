"""Ceilings of what tenants send to other hosts: those that a receiver sets which would be overloaded.

Each is a class below that of the tenant (tree.py), to which filters give the packets of the tenant's networks with this
outer destination (overlay.py). They are there only while there is an overload, and don't outlive the daemon: the next
one removes what it finds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import HtbClass
from insula.model.guarantees import Shaping
from insula.network.linux.guarantees import overlay, tree
from insula.network.linux.underlay import Underlay


class DestinationFlow(NamedTuple):
    """What a tenant, by its index, sends to another host, by its underlay address."""

    tenant: int
    receiver: str


class DestinationCeilings:
    """The ceilings of one host. It is used by one thread at a time; methods raise OSError."""

    def __init__(self, underlay: Underlay) -> None:
        self._underlay = underlay
        self._ceilings: dict[DestinationFlow, int] = {}  # bits a second
        self._numbers: dict[DestinationFlow, int] = {}
        self._networks: dict[DestinationFlow, Sequence[int]] = {}  # the numbers (VNI) that filters were made for

    def set(self, receiver: str, ceilings: Mapping[int, int]) -> Iterable[int]:
        """Replace the ceilings of what is sent to this host, by the tenant. Return the tenants that are concerned.

        Flows beyond the number of classes are not limited."""
        concerned = set(ceilings) | {flow.tenant for flow in self._ceilings if flow.receiver == receiver}
        for tenant in concerned:
            flow = DestinationFlow(tenant, receiver)
            if tenant not in ceilings:
                self._forget(flow)
            elif flow in self._numbers or (free := self._free()) is None:
                self._ceilings[flow] = ceilings[tenant]
            else:
                self._ceilings[flow], self._numbers[flow] = ceilings[tenant], free
        return concerned

    def has(self, tenant: int) -> bool:
        return any(flow.tenant == tenant for flow in self._numbers)

    def forget(self, tenant: int) -> None:
        """Forget the ceilings of a tenant that is removed."""
        for flow in [each for each in self._ceilings if each.tenant == tenant]:
            self._forget(flow)

    def _forget(self, flow: DestinationFlow) -> None:
        self._ceilings.pop(flow, None)
        self._numbers.pop(flow, None)
        self._networks.pop(flow, None)

    def _free(self) -> int | None:
        taken = set(self._numbers.values())
        return next((number for number in range(tree.MAX_DESTINATIONS) if number not in taken), None)

    def apply(
        self, host: Rtnl, device: int, tenant: int, shaping: Shaping, vnis: Sequence[int], have: Mapping[int, HtbClass]
    ) -> None:
        """Make classes and filters of a tenant on the device (an index) equal to its ceilings. `have` are the classes
        that there are."""
        flows = {tree.destination(number): flow for flow, number in self._numbers.items() if flow.tenant == tenant}
        children = {n for n, each in have.items() if tree.is_destination(n) and each.parent == tree.tenant(tenant)}
        self.delete(host, device, children - set(flows))
        for number, flow in flows.items():
            wanted = tree.destination_class(self._numbers[flow], tenant, self._ceilings[flow], shaping)
            if tree.changed({number: wanted}, have):
                host.execute(tc.set_class(device, wanted))
            if number not in have:
                host.execute(tc.set_bfifo(device, number, tree.queue(wanted.ceiling)))
            if number not in have or self._networks.get(flow) != vnis:
                self._classify(host, device, number, vnis, flow.receiver)
                self._networks[flow] = vnis

    def delete(self, host: Rtnl, device: int, numbers: Collection[int]) -> None:
        """Delete classes, after the filters that lead to them."""
        for number in numbers:
            self._classify(host, device, number, (), None)
            host.execute(tc.delete_class(device, number))

    def _classify(self, host: Rtnl, device: int, number: int, vnis: Sequence[int], destination: str | None) -> None:
        version, port = self._underlay.version, self._underlay.port
        overlay.classify(host, device, number, vnis, version=version, port=port, destination=destination)
