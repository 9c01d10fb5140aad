"""The part of a fabric that tells how much arrives at this host, and limits what it sends to others."""

from __future__ import annotations

from collections.abc import Mapping

from insula.kernel.netlink import Rtnl
from insula.kernel.nftables import Nft
from insula.model.objects import Port, Tenant
from insula.model.policies import Direction
from insula.network.fabric import Arrivals, Queue
from insula.network.linux.calls import Calls, about_host, about_tenant
from insula.network.linux.guarantees.shaper import Shaper


class HasShaper:
    _calls: Calls
    shaper: Shaper

    def _handles(self) -> tuple[Rtnl, Nft]:
        raise NotImplementedError

    @about_tenant
    def queues(self, tenant: Tenant, port: Port, direction: Direction, *, outside: bool) -> list[Queue]:
        """Read the classes from the kernel."""
        return self.shaper.queues(self._handles()[0], tenant.index, port, direction, outside=outside)

    @about_host
    def dropped_arrivals(self) -> int | None:
        """Read one number of the kernel."""
        return self.shaper.dropped_arrivals(self._handles()[0])

    @about_host
    def arrivals(self) -> Arrivals | None:
        """Read the counters of all classes for what arrives."""
        return self.shaper.arrivals(self._handles()[0])

    @about_host
    def limit_senders(self, receiver: str, ceilings: Mapping[int, int]) -> None:
        """Make a class for each tenant and receiver."""
        self.shaper.limit_senders(self._handles()[0], receiver, ceilings)
