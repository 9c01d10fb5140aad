"""`DeclaredOperations`: objects as files declare them."""

from __future__ import annotations

from collections.abc import Sequence

from insula.client.http import target
from insula.model.declared import ApplySpec, DeclaredItem
from insula.sdk import answers
from insula.sdk._sync.calls import Caller, request
from insula.sdk._sync.items import Items, as_sent, lines


class DeclaredOperations:
    """Declared state, of one tenant or (None) of the host and all tenants."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def apply(self, tenant: str | None, spec: ApplySpec) -> Items[DeclaredItem]:
        """Make objects as the files declare them; yields what was done about each. It is done while the items are
        read: what comes after the last one that was read may be left undone."""
        sent = request("POST", *_within(tenant), "apply", body=spec)
        return Items(self._caller, sent, lines(answers.DECLARED_ITEM))

    def diff(self, tenant: str | None, spec: ApplySpec) -> Sequence[DeclaredItem]:
        """Return what `apply` would do, with differences."""
        where = (*_within(tenant), "diff")
        return self._caller.change(answers.DECLARED_ITEMS, "POST", *where, body=spec, key=None)

    def dump(self, tenant: str | None = None) -> Items[bytes]:
        """Yield what there is as YAML, which `apply` takes, in pieces as they arrive."""
        return Items(self._caller, request("GET", *_within(tenant), "dump"), as_sent)

    def schema(self) -> str:
        """Return the JSON Schema of a document."""
        return self._caller.text(target("schema"))


def _within(tenant: str | None) -> tuple[str, ...]:
    return () if tenant is None else ("tenants", tenant)
