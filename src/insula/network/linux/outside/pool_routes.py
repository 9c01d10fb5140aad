"""Routes that end the packets to floating addresses of the pool which no tenant has.

The network outside routes the whole pool to this host. Without these routes the host would send a packet to a free
address back by its default route, and it would go in circles until its hop limit is used up (RFC 4632, section 5.1,
rule 2). An address that leads to a tenant has a longer route. The sender gets ICMP "host unreachable".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import ip_network
from pathlib import Path

from insula.kernel.netlink import Rtnl, host_routes


class PoolRoutes:
    """`pool` are the ranges, in CIDR notation. `path` is a file with those that have routes, so that the routes of an
    earlier pool are found again; it is on a file system that is empty after a reboot, as the routing table is."""

    def __init__(self, path: Path, pool: Iterable[str], rtnl: Rtnl) -> None:
        self._path = path
        self._pool = sorted({str(ip_network(each)) for each in pool})
        self._rtnl = rtnl

    def ensure(self) -> None:
        """Add the routes that are missing, and delete those of an earlier pool. OSError."""
        earlier = self._recorded()
        if earlier != self._pool:
            self._record(sorted({*earlier, *self._pool}))
        self._rtnl.execute(*(host_routes.delete_unreachable(each) for each in earlier if each not in self._pool))
        self._rtnl.execute(*(host_routes.add_unreachable(each) for each in self._missing()))
        if earlier != self._pool:
            self._record(self._pool)

    def remove(self) -> None:
        """Delete them all. OSError."""
        self._rtnl.execute(*(host_routes.delete_unreachable(each) for each in self._recorded()))
        self._path.unlink(missing_ok=True)

    def drift(self) -> list[str]:
        """Return what is missing, as text."""
        return [f"host: the route that ends packets to {each} is missing" for each in self._missing()]

    def _missing(self) -> list[str]:
        installed = host_routes.unreachable(self._rtnl) if self._pool else ()
        return [each for each in self._pool if each not in installed]

    def _recorded(self) -> list[str]:
        try:
            return list(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return []

    def _record(self, ranges: list[str]) -> None:
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(ranges))
        draft.rename(self._path)
