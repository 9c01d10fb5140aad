"""Leases: which addresses an instance may reach, for which names, until when.

A lease lasts longer than its name is cached: `LEAST` seconds or the TTL of the answer, and `GRACE` more, while clients
are told at most `answers.MAX_TTL`. It is renewed while connection tracking has a connection to its address. Leases are
of one instance: what another has asked for is not open to it.

Nothing here talks to the kernel: each method returns a `LeaseChange`, which `lessor` commits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from insula.network.names.elements import LeaseElement
from insula.network.names.permission import may_lease, permits
from insula.network.names.rules import ClientRules, Destination, EgressRules, destinations

LEAST: Final = 300.0  # seconds
GRACE: Final = 60.0
RENEWED: Final = 180.0  # seconds that a lease has left at least after a sweep that found a connection
SLACK: Final = 5.0  # seconds by which a lease may be shorter: a name that is asked for all the time changes no element
PER_NAME: Final = 1_000  # addresses of a name, for each instance
PER_CLIENT: Final = 10_000  # addresses of an instance
PER_TENANT: Final = 200_000  # addresses of all instances together; then no more are leased


@dataclass
class Grant:
    """What was leased for one name that was asked for; `names` has its aliases as well."""

    names: frozenset[str]
    expires: float


@dataclass
class Lease:
    """An address that is leased to a client.

    `installed` is what the kernel has, by address of the client and destination, with the time when it expires.
    `commented` are the names in the comments of its elements.
    """

    grants: dict[str, Grant] = field(default_factory=dict)
    installed: dict[tuple[str, Destination], float] = field(default_factory=dict)
    commented: frozenset[str] = frozenset()


@dataclass
class LeaseChange:
    """Elements to add or to refresh, with the seconds that they have left and their names; and elements to delete."""

    refreshed: list[tuple[LeaseElement, float, list[str]]] = field(default_factory=list)
    deleted: list[LeaseElement] = field(default_factory=list)
    evicted: int = 0


class Leases:
    """The leases of a tenant's instances."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.rules = EgressRules()
        self._leases: dict[str, dict[str, Lease]] = {}  # by client and address, the oldest first
        self._of_name: dict[tuple[str, str], dict[str, None]] = {}  # by client and name: addresses, the oldest first

    # -- questions -------------------------------------------------------------------------------------------------

    def names_of(self, client: str, address: str) -> set[str]:
        """Return the names that an address is leased for now."""
        lease, now = self._leases.get(client, {}).get(address), self._clock()
        return (
            {name for grant in lease.grants.values() if grant.expires > now for name in grant.names} if lease else set()
        )

    def covers(self, client: str, address: str, port: int, name: str) -> bool:
        """Whether the client may connect to a name at an address and TCP port: a rule allows it, and the address is
        leased for the name."""
        return name in self.names_of(client, address) and permits(self.rules, client, address, port, name)

    def listed(self) -> Iterator[tuple[str, str, list[str], float]]:
        """Yield (client, address, names, seconds left) of all leases."""
        now = self._clock()
        for client, leases in self._leases.items():
            for address, lease in leases.items():
                if left := max((grant.expires - now for grant in lease.grants.values()), default=0.0):
                    yield client, address, sorted(self.names_of(client, address)), left

    # -- changes ---------------------------------------------------------------------------------------------------

    def grant(self, client: str, names: list[str], addresses: Iterable[str], ttl: float) -> LeaseChange | None:
        """Lease addresses to a client for the first of `names`; the others are its aliases.

        Returns None if the client's rules don't allow the name or one of the addresses, or there are too many leases.
        """
        rules = self.rules.clients.get(client)
        matching = rules.matching(names[0]) if rules and names else []
        addresses = list(addresses)
        if rules is None or not matching or not all(may_lease(self.rules, rules, each) for each in addresses):
            return None
        if sum(map(len, self._leases.values())) > PER_TENANT:
            return None
        change, expires = LeaseChange(), self._clock() + max(ttl, LEAST) + GRACE
        for address in addresses:
            lease = self._touch(client, address, names[0])
            before = lease.grants.get(names[0])
            known = before.names if before else frozenset()
            until = max(expires, before.expires if before else 0.0)
            lease.grants[names[0]] = Grant(known | frozenset(names), until)
            self._install(change, rules, address, lease)
        self._evict(change, client, names[0])
        return change

    def replace(self, rules: EgressRules) -> LeaseChange:
        """Use other rules. What they no longer allow is deleted, what they allow in addition is added."""
        self.rules, change = rules, LeaseChange()
        for client in list(self._leases):
            new = rules.clients.get(client)
            for address, lease in list(self._leases[client].items()):
                if new is None or not may_lease(rules, new, address):
                    self._delete(change, client, address)
                    continue
                for name in [name for name in lease.grants if not new.matching(name)]:
                    self._forget(client, address, name)
                self._install(change, new, address, lease)
        return change

    def renew(self, connected: set[tuple[str, str]]) -> LeaseChange:
        """Forget what has expired, and renew leases to which there are connections, pairs of source and destination."""
        change, now = LeaseChange(), self._clock()
        used = {(self.rules.by_address.get(source), address) for source, address in connected}
        for client in list(self._leases):
            rules = self.rules.clients.get(client)
            for address, lease in list(self._leases[client].items()):
                for name, grant in list(lease.grants.items()):
                    if (client, address) in used and grant.expires > now:
                        grant.expires = max(grant.expires, now + RENEWED)
                    elif grant.expires <= now:
                        self._forget(client, address, name)
                if not lease.grants:
                    self._leases[client].pop(address, None)
                elif rules is not None:
                    self._install(change, rules, address, lease)
            if not self._leases[client]:
                del self._leases[client]
        return change

    def restore(self, elements: Iterable[tuple[LeaseElement, float, list[str]]]) -> LeaseChange:
        """Take over elements that the kernel has, with the seconds that they have left and their names, as far as the
        rules allow. Returns the elements to delete."""
        now, change = self._clock(), LeaseChange()
        for element, left, names in elements:
            client = self.rules.by_address.get(element.source)
            if client is None or not names or left <= 0:  # it ends now, or never would
                change.deleted.append(element)
                continue
            for name in names:
                lease = self._touch(client, element.address, name)
                before = lease.grants.get(name)
                lease.grants[name] = Grant(frozenset([name]), max(now + left, before.expires if before else 0.0))
                lease.installed[element.source, element.destination] = now + left
                lease.commented |= {name}
        allowed = self.replace(self.rules)
        return LeaseChange(allowed.refreshed, [*change.deleted, *allowed.deleted])

    def undo(self, change: LeaseChange) -> None:
        """Note that the kernel has refused a change: what it should have refreshed counts as missing."""
        for element, _, _ in change.refreshed:
            client = self.rules.by_address.get(element.source, "")
            if (lease := self._leases.get(client, {}).get(element.address)) is not None:
                lease.installed.pop((element.source, element.destination), None)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _touch(self, client: str, address: str, name: str) -> Lease:
        """Return the lease of an address, and make it the youngest of its client and of its name."""
        leases = self._leases.setdefault(client, {})
        leases[address] = lease = leases.pop(address, None) or Lease()
        order = self._of_name.setdefault((client, name), {})
        order.pop(address, None)
        order[address] = None
        return lease

    def _install(self, change: LeaseChange, rules: ClientRules, address: str, lease: Lease) -> None:
        """Add the differences between what the grants of a lease allow now and what is installed to `change`."""
        now, wanted = self._clock(), dict[tuple[str, Destination], float]()
        grants = {name: grant for name, grant in lease.grants.items() if grant.expires > now}
        sources = [each for each in rules.addresses if (":" in each) == (":" in address)]
        for name, grant in grants.items():
            for each in destinations(rules.matching(name), rules, address, self.rules.operator):
                for source in sources:
                    wanted[source, each] = max(wanted.get((source, each), 0.0), grant.expires)
        names = list(grants)
        renamed, lease.commented = lease.commented != grants.keys(), frozenset(names)
        for (source, destination), expires in wanted.items():
            if renamed or lease.installed.get((source, destination), 0.0) < expires - SLACK:
                change.refreshed.append((LeaseElement(source, address, destination), expires - now, names))
                lease.installed[source, destination] = expires
        for source, destination in lease.installed.keys() - wanted.keys():
            if lease.installed.pop((source, destination)) > now:
                change.deleted.append(LeaseElement(source, address, destination))

    def _forget(self, client: str, address: str, name: str) -> None:
        """Remove one grant of a lease."""
        self._leases[client][address].grants.pop(name, None)
        order = self._of_name.get((client, name), {})
        order.pop(address, None)
        if not order:
            self._of_name.pop((client, name), None)

    def _delete(self, change: LeaseChange, client: str, address: str) -> None:
        """Remove a lease with all its elements."""
        lease = self._leases[client][address]
        for name in list(lease.grants):
            self._forget(client, address, name)
        del self._leases[client][address]
        change.deleted += [LeaseElement(source, address, each) for source, each in lease.installed]

    def _evict(self, change: LeaseChange, client: str, name: str) -> None:
        """Remove the oldest leases of a name or a client that has too many."""
        rules, order = self.rules.clients[client], self._of_name[client, name]
        while len(order) > PER_NAME:
            address = next(iter(order))
            self._forget(client, address, name)
            lease = self._leases[client][address]
            if lease.grants:
                self._install(change, rules, address, lease)
            else:
                self._delete(change, client, address)
            change.evicted += 1
        while len(self._leases[client]) > PER_CLIENT:
            self._delete(change, client, next(iter(self._leases[client])))
            change.evicted += 1
