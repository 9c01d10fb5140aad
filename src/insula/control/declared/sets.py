"""The sets of declared state in the store.

An object is a member of one set at most: its membership is one entry, named by the object. Every write compares the
set's revision, so that nothing becomes a member of a set that was removed meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Mapping

from insula.control.allocation.transaction import guarded
from insula.control.context import Context
from insula.control.declared.kinds.base import ObjectReference
from insula.control.declared.merge import Form
from insula.control.keys import HOST, MEMBERS, SETS, TENANTS, USAGE
from insula.model.declared import ApplySet, SetMember
from insula.model.errors import Conflict
from insula.model.units import check_label
from insula.model.views import Usage
from insula.store.protocol import Compare, TransactionConflict
from insula.store.typed import Found

_KEY = re.compile("[a-z0-9/-]{1,200}")
"""Names that are parts of keys. Those of groups of OpenID Connect have any characters."""
MAX_SETS = 100
"""Sets of one tenant, or of the host."""


class Sets:
    def __init__(self, context: Context) -> None:
        self.context = context

    async def find(self, tenant: str | None, name: str) -> Found[ApplySet] | None:
        """Return a set of a tenant, of the host for None. Invalid."""
        return await SETS.get(self.context.store, tenant or HOST, check_label("set", name))

    async def open(self, tenant: str | None, name: str) -> Found[ApplySet]:
        """Return a set, and create it if there is none. Invalid; NotFound for the tenant; Conflict for one too many."""
        if found := await self.find(tenant, name):
            return found
        new = ApplySet(id=secrets.token_hex(8), name=name, tenant=tenant, created=time.time())
        key = (tenant or HOST, name)
        store = self.context.store
        if len((await store.list(SETS.prefix(key[0]))).entries) >= MAX_SETS:
            hint = "empty one of them: `insula apply --set NAME --prune --allow-empty --yes`"
            raise Conflict(f"there are {MAX_SETS} sets", hint)

        async def attempt(guard: Found[Usage]) -> int:
            """A tenant that is removed at the same time leaves no set behind, as the guard is compared."""
            assert tenant is not None
            owner = await TENANTS.get(store, tenant)
            compares = [Compare(TENANTS.key(tenant), owner.revision if owner else -1), USAGE.unchanged(guard, tenant)]
            writes = [SETS.put(new, *key), USAGE.put(guard.value, tenant)]
            return await store.transact([SETS.absent(*key), *compares], writes)

        try:
            if tenant is None:
                return Found(new, await store.transact([SETS.absent(*key)], [SETS.put(new, *key)]))
            return Found(new, await guarded(store, tenant, attempt))
        except TransactionConflict:
            raise Conflict(f"set {name} was made at the same time", "try again") from None

    async def members(self, found: Found[ApplySet] | None) -> Mapping[ObjectReference, Found[SetMember]]:
        """Return the members of a set, whether the objects exist or not."""
        if found is None:
            return {}
        tenant = found.value.tenant
        snapshot = await self.context.store.list(MEMBERS.prefix(tenant) if tenant else MEMBERS.prefix_all())
        members = {}
        for entry in snapshot.entries:
            member = MEMBERS.decode(entry)
            if member.set == found.value.id:
                owner, kind, name = MEMBERS.parts(entry.key)
                ref = ObjectReference(kind, None if owner == HOST else owner, member.object or name)
                members[ref] = Found(member, entry.revision)
        return members

    async def member(self, ref: ObjectReference) -> Found[SetMember] | None:
        return await MEMBERS.get(self.context.store, *_key(ref))

    async def is_alive(self, member: SetMember) -> bool:
        """Whether the set still exists that the member belongs to."""
        found = await self.find(member.tenant, member.name)
        return found is not None and found.value.id == member.set

    async def record(
        self, of: Found[ApplySet], ref: ObjectReference, uid: str, applied: Form, before: Found[SetMember] | None
    ) -> None:
        """Record an object as a member, in place of what was recorded before. Conflict."""
        found, named = of.value, None if _KEY.fullmatch(ref.name) else ref.name
        member = SetMember(set=found.id, tenant=found.tenant, name=found.name, uid=uid, object=named, applied=applied)
        if before and before.value == member:
            return
        compares = [SETS.unchanged(of, of.value.tenant or HOST, of.value.name)]
        compares.append(Compare(MEMBERS.key(*_key(ref)), before.revision if before else 0))
        try:
            await self.context.store.transact(compares, [MEMBERS.put(member, *_key(ref))])
        except TransactionConflict:
            raise Conflict(f"{ref} was applied by another set at the same time", "apply it again") from None

    async def drop(self, ref: ObjectReference, before: Found[SetMember]) -> None:
        """Forget a member, unless it was recorded again meanwhile."""
        try:
            key = _key(ref)
            await self.context.store.transact([MEMBERS.unchanged(before, *key)], [MEMBERS.delete(*key)])
        except TransactionConflict:
            pass

    async def close(self, of: Found[ApplySet]) -> None:
        """Remove a set without members."""
        if not await self.members(of):
            key = (of.value.tenant or HOST, of.value.name)
            with contextlib.suppress(TransactionConflict):
                await self.context.store.transact([SETS.unchanged(of, *key)], [SETS.delete(*key)])


def _key(ref: ObjectReference) -> tuple[str, str, str]:
    name = ref.name if _KEY.fullmatch(ref.name) else f"~{hashlib.sha256(ref.name.encode()).hexdigest()}"
    return ref.tenant or HOST, ref.kind, name
