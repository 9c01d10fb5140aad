"""`OwnedKind`: kinds whose objects belong to a tenant, and whose verbs find and remove them by their names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from insula.control.context import Context
from insula.control.declared.kinds.base import AccessMode, Current, DeclaredKind, ObjectReference, Verbs, form_of
from insula.control.declared.merge import Form
from insula.control.identities.authority import Authority
from insula.model.errors import NotFound
from insula.store.typed import Found, Keyspace


class OwnedVerbs(Protocol):
    """The verbs of such a kind, as far as they are alike."""

    context: Context

    async def find(self, tenant: str, name: str) -> Found[Any]: ...

    async def remove(self, tenant: str, name: str) -> None: ...


class OwnedKind(DeclaredKind):
    """The base of these kinds. `keys` are those of the objects in the store; `family` is the first part of the names of
    the permissions that their routes take, as in network.read and network.write."""

    keys: ClassVar[Keyspace[Any]]
    family: ClassVar[str]

    @abstractmethod
    def verbs_of(self, verbs: Verbs) -> OwnedVerbs:
        """Return the verbs of this kind."""

    def spec_of(self, ref: ObjectReference, found: Any) -> Form:
        """Return the spec of an object as it is stored: by default its fields of the same names."""
        form = form_of(found)
        return {name: form[name] for name in self.spec.__struct_fields__}

    def uid(self, found: Any) -> str:
        """Return an ID that another object of the same name doesn't have."""
        return str(found.created)

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return f"{self.family}.{'read' if access == 'read' else 'write'}"

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        assert tenant is not None
        return [each.name for each in await self.keys.readable(self.verbs_of(verbs).context.store, tenant)]

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        assert ref.tenant is not None
        try:
            found = (await self.verbs_of(verbs).find(ref.tenant, ref.name)).value
        except NotFound:
            return None
        return Current({"labels": found.labels, "spec": self.spec_of(ref, found)}, self.uid(found))

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        assert ref.tenant is not None
        await self.verbs_of(verbs).remove(ref.tenant, ref.name)
