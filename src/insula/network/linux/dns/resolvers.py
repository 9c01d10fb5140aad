"""The resolvers of tenants: one dnsmasq for each, and a second one for networks without a way out.

A query is a way out too: its name can carry anything to a server of the sender's choice. So queries from networks with
`outbound` none are translated (rules.py) to a resolver that knows the tenant's own names, and asks nobody else. It runs
while the tenant has such a network.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from insula.kernel.netns import call_in
from insula.model.objects import Network, Tenant
from insula.network.linux.dns.resolver import Resolver, answers
from insula.network.linux.gateway_rules import CLOSED_DNS_PORT

log = logging.getLogger("insula.network")
_BINDS = 0.2  # seconds within which dnsmasq listens at a gateway that was announced
_STARTS = 5


class TenantResolvers:
    """The resolvers of all tenants; see `Resolver` for the arguments. Beside `directory` is one for the second ones."""

    def __init__(self, directory: Path, groups: str | None = None) -> None:
        self._open = Resolver(directory, groups)
        self._closed = Resolver(directory.with_name(f"{directory.name}-closed"), groups, port=CLOSED_DNS_PORT)

    def _of(self, tenant: str) -> list[Resolver]:
        return [self._open, *([self._closed] if self._closed.knows(tenant) else [])]

    @contextlib.contextmanager
    def ensuring(
        self, tenant: Tenant, netns: int, servers: Sequence[str], closed: bool | None = None
    ) -> Iterator[None]:
        """Start the tenant's resolvers while the block runs, unless they run; they have started when it ends. `closed`
        tells whether there is to be a second one; None leaves it as it is. Failed."""
        with contextlib.ExitStack() as starting:
            starting.enter_context(self._open.ensuring(tenant, netns, servers))
            if closed is False and self._closed.knows(tenant.name):
                self._closed.remove(tenant.name)
            elif closed or self._closed.knows(tenant.name):
                starting.enter_context(self._closed.ensuring(tenant, netns, ()))
            yield

    def await_network(self, tenant: Tenant, netns: int, servers: Sequence[str], network: Network) -> None:
        """Return when the resolver answers at a new gateway. If it doesn't, it is started again.

        dnsmasq (`--bind-dynamic`) listens at an address when the kernel announces it. Once in some ten times it does
        not, and announcements that follow don't change that; when it starts, it listens at all that are there.
        """
        gateways = [each for each in (network.gateway, network.gateway6) if each]

        def answer() -> bool:
            return all(answers(each, tenant.name, _BINDS) for each in gateways)

        for _ in range(_STARTS):
            if call_in(netns, answer):
                return
            log.info("the resolver of tenant %s does not listen at %s, and is started again", tenant.name, gateways)
            self.stop(tenant.name)
            with self.ensuring(tenant, netns, servers):
                pass

    def set_names(self, tenant: Tenant, names: Mapping[str, Sequence[str]]) -> None:
        """Replace all names of a tenant."""
        for each in self._of(tenant.name):
            each.set_names(tenant, names)

    def add_name(self, tenant: Tenant, name: str, addresses: Sequence[str]) -> None:
        """Add addresses to a name."""
        for each in self._of(tenant.name):
            each.add_name(tenant, name, addresses)

    def remove_name(self, tenant: str, name: str, addresses: Sequence[str]) -> None:
        """Remove addresses from a name."""
        for each in self._of(tenant):
            each.remove_name(tenant, name, addresses)

    def running(self, tenant: Tenant, netns: int, servers: Sequence[str]) -> bool:
        """Whether the tenant's resolvers run, with the arguments that they should have."""
        closed = not self._closed.knows(tenant.name) or self._closed.running(tenant, netns, ())
        return closed and self._open.running(tenant, netns, servers)

    def stop(self, tenant: str) -> None:
        """Stop the tenant's resolvers; its names stay."""
        for each in self._of(tenant):
            each.stop(tenant)

    def remove(self, tenant: str) -> None:
        """Stop the tenant's resolvers and remove its names."""
        for each in self._of(tenant):
            each.remove(tenant)

    def tenants(self) -> list[str]:
        """Return the names of all tenants that have files here."""
        return sorted({*self._open.tenants(), *self._closed.tenants()})

    def close(self) -> None:
        """Remove the directories when no tenant is left."""
        self._open.close()
        self._closed.close()
