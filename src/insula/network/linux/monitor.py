"""What the kernel tells of changes in tenants' namespaces and in the host's, as far as a proof of isolation depends on
them.

Changes of insulad's own making are known by the port ids of its sockets. Some messages have none, as most of links: a
carrier that comes belongs to the change before it. So these count as insulad's own for a moment after one of its own.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Final

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import messages as rt
from insula.kernel.netlink.monitor import Change, RouteMonitor, RulesMonitor, Transaction
from insula.kernel.netlink.port_ids import is_own
from insula.kernel.netns import call_in
from insula.network.fabric import NamespaceChange, Watcher
from insula.network.linux.calls import Calls, about_host
from insula.network.linux.tenant import TenantNamespace
from insula.network.names.process import LESSOR

_BRIDGE: Final = 7  # AF_BRIDGE
_LINK_LOCAL: Final = 253  # RT_SCOPE_LINK
_LEASES: Final = frozenset(
    f"{name}{version}" for name in ("leases", "lease_protocols", "checked") for version in (4, 6)
)
"""Sets that the lessor of egress by name changes when an instance asks for a name."""
_MOMENT: Final = 2.0
"""Seconds; the kernel tells of carriers, and of addresses that nobody else has, after a second at most."""


class NamespaceMonitor:
    """Two sockets in the network namespace of the calling thread. Its methods never block."""

    def __init__(self) -> None:
        self._routes = RouteMonitor()
        self._rules = RulesMonitor()
        self._links: dict[tuple[int, int], object] = {}  # as they were told last, by family and index
        self._last_own = float("-inf")
        with Rtnl() as rtnl:
            for family in (socket.AF_UNSPEC, _BRIDGE):
                for body in rtnl.dump(rt.RTM_GETLINK, rt.LINK.pack(family, 0, 0, 0, 0)):
                    self._differs(body, gone=False)

    def filenos(self) -> tuple[int, int]:
        return self._routes.fileno(), self._rules.fileno()

    def close(self) -> None:
        self._routes.close()
        self._rules.close()

    def read(self) -> NamespaceChange:
        """Return what has changed since the last time. What was lost may have been a change by another program."""
        changes, lost = self._routes.read()
        transactions, also_lost = self._rules.transactions()
        ports = {change.port for change in changes if self._matters(change)}
        ports |= {each.port for each in transactions if not _only_leases(each)}
        own = any(is_own(port) for port in ports if port)
        if own:
            self._last_own = time.monotonic()
        others = [port for port in ports if not is_own(port)]
        if time.monotonic() < self._last_own + _MOMENT:
            others = [port for port in others if port]
        return NamespaceChange(own=own, other=lost or also_lost or bool(others))

    def _matters(self, change: Change) -> bool:
        """Whether anything that is proven may depend on the change."""
        kind, body = change.type, change.body
        if kind in (rt.RTM_NEWLINK, rt.RTM_DELLINK):
            return self._differs(body, gone=kind == rt.RTM_DELLINK)
        if kind in (rt.RTM_NEWADDR, rt.RTM_DELADDR):
            return int(rt.ADDR.unpack_from(body)[3]) != _LINK_LOCAL
        if kind in (rt.RTM_NEWNETCONF, rt.RTM_DELNETCONF):
            return rt.parse_netconf(body) in (rt.NETCONFA_IFINDEX_ALL, rt.NETCONFA_IFINDEX_DEFAULT)
        return True

    def _differs(self, body: bytes, *, gone: bool) -> bool:
        """Whether a link is not as it was told before. Much that is told of links is none of their settings."""
        family, _, index, _, _ = rt.LINK.unpack_from(body)
        told = rt.bridge_port_settings(body) if family == _BRIDGE else rt.parse_link(body)
        before = self._links.pop((family, index), None)
        if not gone:
            self._links[family, index] = told
        return gone or told != before


def _only_leases(transaction: Transaction) -> bool:
    """Whether a transaction is the lessor's, and about leases only."""
    sets = transaction.sets
    return sets is not None and sets <= _LEASES and transaction.thread == LESSOR


class Monitors:
    """The open monitors: none as long as there is no `watcher`. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str | None, NamespaceMonitor] = {}
        self.watcher: Watcher | None = None

    def open(self, tenant: str | None, netns: int | None) -> None:
        """Open the monitor of a tenant's namespace; without one, that of the calling thread's."""
        with self._lock:
            if (old := self._open.pop(tenant, None)) and self.watcher:  # of a namespace that was replaced
                self.watcher.closed(tenant, old)
            if self.watcher:
                made = NamespaceMonitor() if netns is None else call_in(netns, NamespaceMonitor)
                self._open[tenant] = made
                self.watcher.opened(tenant, made)

    def close(self, tenant: str | None) -> None:
        """Have the watcher close a monitor; no error if there is none."""
        with self._lock:
            monitor = self._open.pop(tenant, None)
            if monitor and self.watcher:
                self.watcher.closed(tenant, monitor)

    def close_all(self) -> None:
        for tenant in list(self._open):
            self.close(tenant)


class HasMonitors:
    """The part of a fabric that has its namespaces watched."""

    _calls: Calls
    _tenants: dict[str, TenantNamespace]

    def __init__(self) -> None:
        self._monitors = Monitors()

    @about_host
    def watch(self, watcher: Watcher | None) -> None:
        """Open monitors of the namespaces that are in use, and from now on of each that is taken into use."""
        self._monitors.close_all()
        self._monitors.watcher = watcher
        self._monitors.open(None, None)
        for name in list(self._tenants):
            with self._calls.of(name):
                if namespace := self._tenants.get(name):
                    self._monitors.open(name, namespace.netns)
