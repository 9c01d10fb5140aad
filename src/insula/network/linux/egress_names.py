"""Egress by name in the fabric: which instances have rules with names, and which queries go to the gate.

A change is made in this order. First the gate has the new rules in force: leases and checked connections that they
forbid are gone. Then the sets of instances whose queries are redirected are changed, and the next epoch begins. So what
was taken back is closed for open connections too. Policies follow.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from insula.kernel.netlink import NetlinkError, Request
from insula.kernel.netlink.nftables import NftablesSocket, add_elements, delete_elements
from insula.kernel.netns import call_in
from insula.model.errors import Failed
from insula.model.objects import Port, Tenant
from insula.network.fabric import NameLease
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.linux import keys
from insula.network.linux.epoch import Epoch
from insula.network.linux.gates import NameGates
from insula.network.names import elements
from insula.network.names.compiler import ClientCompiler, egress_rules, has_names
from insula.network.names.rules import EgressRules

_FAMILY: Final = "inet"
_NAMED: Final = {4: "named4", 6: "named6"}


class EgressNames:
    """The rules with names of all tenants. `own` are ranges of the host that names must not lead to."""

    def __init__(self, gates: NameGates, table: str, own: Sequence[str]) -> None:
        self._gates, self._table, self._own = gates, table, own
        self._lock = threading.Lock()  # for the dictionaries
        self._intents: dict[str, TenantIntent] = {}  # the last of each tenant
        self._named: dict[str, bool] = {}  # whether its policies have names: there may be a thousand
        self._compilers: dict[str, ClientCompiler] = {}
        self._ports: dict[str, dict[int, Port]] = {}  # by tenant and index
        self._rules: dict[str, EgressRules] = {}  # that are in force, of tenants that have some

    def apply(self, intent: TenantIntent, netns: int, servers: Sequence[str]) -> None:
        """Put the rules of a whole intent in force. Failed.

        `servers` are the upstream name servers, as "address#port".
        """
        with self._lock:
            self._remember(intent)
            self._ports[intent.tenant.name] = {port.index: port for port in intent.ports}
        self._apply(intent.tenant.name, netns, servers)

    def enforce(self, tenant: Tenant, policy: PolicyIntent, netns: int, servers: Sequence[str]) -> None:
        """Put changed policies in force. Failed."""
        with self._lock:
            intent = self._intents.get(tenant.name) or TenantIntent(tenant=tenant)
            self._remember(msgspec.structs.replace(intent, policy=policy))
        self._apply(tenant.name, netns, servers)

    def admit(self, port: Port, labels: Mapping[str, str], netns: int, servers: Sequence[str]) -> None:
        """Put the rules of a port in force that is about to be plugged. Failed."""
        with self._lock:
            self._ports.setdefault(port.tenant, {})[port.index] = port
            if not self._named.get(port.tenant):
                return
            intent = self._intents[port.tenant]
            policy = msgspec.structs.replace(intent.policy, labels={**intent.policy.labels, port.instance: labels})
            self._intents[port.tenant] = msgspec.structs.replace(intent, policy=policy)
        self._apply(port.tenant, netns, servers)

    def withdraw(self, port: Port, netns: int, servers: Sequence[str]) -> None:
        """End the leases of a port that is unplugged: another instance may get its addresses. Failed."""
        with self._lock:
            self._ports.get(port.tenant, {}).pop(port.index, None)
            rules = self._rules.get(port.tenant)
            if rules is None or port.instance not in rules.clients:
                return
        self._apply(port.tenant, netns, servers)

    def _remember(self, intent: TenantIntent) -> None:
        name = intent.tenant.name
        self._intents[name] = intent
        if name not in self._compilers or not self._compilers[name].fits(intent.policy):
            self._compilers[name] = ClientCompiler(intent.policy)
            self._named[name] = has_names(intent.policy.policies)

    def _apply(self, tenant: str, netns: int, servers: Sequence[str]) -> None:
        with self._lock:
            before = self._rules.get(tenant)
            intent, ports = self._intents[tenant], [*self._ports.get(tenant, {}).values()]
            named, compiler = self._named[tenant], self._compilers[tenant]
        if before is None and not named and not self._gates.has_files(tenant):
            return
        upstream = [(host, int(port)) for host, _, port in (each.partition("#") for each in servers)]
        rules = egress_rules(msgspec.structs.replace(intent, ports=ports), upstream, self._own, compiler)
        changed = rules != before or (bool(rules.clients) and not self._gates.running(tenant, netns))
        if changed:
            self._gates.apply(intent.tenant, netns, rules)
        try:
            with call_in(netns, NftablesSocket) as nftables:
                self._redirect(nftables, before, rules)
                if not rules.clients:
                    self._forget_leases(nftables)
                if changed:  # open connections are judged anew
                    epoch = Epoch(nftables, self._table)
                    epoch.is_valid()
                    epoch.transact()
        except OSError as error:
            raise Failed(f"names of tenant {tenant} can't be redirected: {error}", "run `insula doctor`") from error
        with self._lock:
            if rules.clients:
                self._rules[tenant] = rules
            else:
                self._rules.pop(tenant, None)

    def leases(self, tenant: str) -> list[NameLease]:
        """Return the leases of a tenant's instances. Failed."""
        listed = self._gates.leases(tenant) if self._gates.has_files(tenant) else []
        return [NameLease(each.instance, each.address, tuple(each.names), each.seconds) for each in listed]

    def drift(self, tenant: str, netns: int) -> list[str]:
        """Return differences between what is in force and what should be, as text."""
        rules = self._rules.get(tenant)
        if rules is None:
            return []
        found = [] if self._gates.running(tenant, netns) else ["the gate of names does not run"]
        with contextlib.suppress(NetlinkError), call_in(netns, NftablesSocket) as nftables:
            for version, name in _NAMED.items():
                if set(nftables.keys(_FAMILY, self._table, name)) != set(_packed(rules.by_address, version)):
                    found.append(f"set {name} has not the instances with rules with names")
        return found

    def remove(self, tenant: str) -> None:
        """End the processes of a tenant, and forget its rules."""
        with self._lock:
            for each in (self._intents, self._named, self._compilers, self._ports, self._rules):
                each.pop(tenant, None)
        self._gates.remove(tenant)

    def tenants(self) -> list[str]:
        """Return the names of all tenants that have files here."""
        return self._gates.tenants()

    # -- sets ------------------------------------------------------------------------------------------------------

    def _redirect(self, nftables: NftablesSocket, before: EgressRules | None, rules: EgressRules) -> None:
        """Have the queries of the instances with rules redirected, and no others'. NetlinkError.

        `before` are the rules that were in force. The sets are read if these aren't known, or didn't change: somebody
        else may have changed the sets.
        """
        if before is not None and before != rules:
            had, wanted = before.by_address.keys(), rules.by_address.keys()
            try:
                nftables.transact(*self._changes(had - wanted, wanted - had))
                return
            except NetlinkError as error:
                if error.errno != errno.ENOENT:  # an element that should have been there
                    raise
        have = {
            keys.unpacked(str(version), key)[0]
            for version, name in _NAMED.items()
            for key in nftables.keys(_FAMILY, self._table, name)
        }
        nftables.transact(*self._changes(have - rules.by_address.keys(), rules.by_address.keys() - have))

    def _changes(self, gone: Iterable[str], new: Iterable[str]) -> list[Request]:
        return [
            request
            for version, name in _NAMED.items()
            for change, addresses in ((delete_elements, gone), (add_elements, new))
            for request in change(_FAMILY, self._table, name, _packed(addresses, version))
        ]

    def _forget_leases(self, nftables: NftablesSocket) -> None:
        """Delete all leases, which are left if the gate did not run. NetlinkError."""
        requests: list[Request] = []
        for name in elements.SETS:
            found = nftables.keys(_FAMILY, self._table, name)
            requests += add_elements(_FAMILY, self._table, name, found)  # one that ends now would be an error
            requests += delete_elements(_FAMILY, self._table, name, found)
        nftables.transact(*requests)


def _packed(addresses: Iterable[str], version: int) -> list[bytes]:
    """Return the addresses of one IP version as keys."""
    return [keys.packed(str(version), (each,)) for each in addresses if (":" in each) == (version == 6)]
