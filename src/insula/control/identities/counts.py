"""`AccountQuotas`: the quotas of a tenant's service accounts, and of their tokens and certificates.

Those of users belong to no tenant: the setting `quotas.user_tokens` limits how many each has.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from insula.control.allocation.quotas import change, subtract
from insula.control.allocation.transaction import guard, retried, turn
from insula.control.context import Context
from insula.control.identities.cache import IdentityCache
from insula.control.keys import CERTIFICATES, TENANTS, TOKENS, USAGE
from insula.control.tenants import Tenants
from insula.model.principals import Principal
from insula.model.views import Usage
from insula.store.protocol import Compare, Delete, Write
from insula.store.typed import Keyspace

Parts = tuple[Sequence[Compare], Sequence[Write]]
"""Compares and writes of a transaction."""


class StoredProof(NamedTuple):
    """A token or certificate in the store."""

    keyspace: Keyspace[Any]
    id: str

    def delete(self) -> Delete:
        return self.keyspace.delete(self.id)


class AccountQuotas:
    def __init__(self, context: Context, tenants: Tenants, cache: IdentityCache) -> None:
        self.store = context.store
        self.tenants = tenants
        self.cache = cache

    def together(self, principal: Principal) -> Sequence[str]:
        """The IDs of the principals whose proofs are counted together: the service accounts of its tenant."""
        if principal.tenant is None:
            return [principal.id]
        return [each.id for each in self.cache.principals() if each.tenant == principal.tenant]

    async def stored(self, principals: Sequence[str], before: float | None = None) -> Sequence[StoredProof]:
        """The tokens and certificates of these principals that the store has; with `before` those that expire until
        then."""
        wanted, found = set(principals), []
        for keyspace, known in ((TOKENS, self.cache.tokens()), (CERTIFICATES, self.cache.certificates())):
            for each in [*known]:
                if each.principal in wanted and (before is None or each.expires <= before):
                    proof = StoredProof(keyspace, each.id)
                    if await keyspace.get(self.store, each.id):
                        found.append(proof)
        return found

    async def less(self, principal: Principal, less: Usage) -> Parts:
        """The parts of a transaction after which the tenant has so much less; none for a user."""
        if (tenant := principal.tenant) is None:
            return [], []
        usage = await guard(self.store, tenant)
        return [USAGE.unchanged(usage, tenant)], [USAGE.put(subtract(usage.value, less), tenant)]

    async def exchanged(self, principal: Principal, *, less: int, more: int) -> Parts:
        """The same for a change of the number of its tokens. QuotaExceeded."""
        if (tenant := principal.tenant) is None:
            return [], []
        owner, usage = await self.tenants.find(tenant), await guard(self.store, tenant)
        rest = change(owner.value, usage.value, Usage(tokens=less), Usage(tokens=more))
        return [USAGE.unchanged(usage, tenant), TENANTS.unchanged(owner, tenant)], [USAGE.put(rest, tenant)]

    async def in_turn(self, principal: Principal, attempt: Callable[[], Awaitable[None]]) -> None:
        """Call `attempt`, and again while its transaction fails; in turn with others that change the tenant's usage."""
        if principal.tenant is None:
            await retried(attempt)
        else:
            async with turn(self.store, principal.tenant):
                await retried(attempt)
