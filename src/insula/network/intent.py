"""The intent of a tenant: all that it wants of the networks on one host, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from insula.model.objects import Network, Port, Struct, Tenant


class TenantIntent(Struct, kw_only=True):
    """Everything that a fabric has to know of one tenant. What a fabric is to do more becomes a field with a default.

    `ports` are those of all instances of this host, also of those that don't run: a port is plugged in when its
    instance starts, and taken away when it is in no intent any more. `names` are what the tenant's resolver answers,
    with their addresses, and nothing else. With `complete` False something may be wanted that is not in here, because
    a record of the store can't be read: only what an earlier intent had is taken away.
    """

    tenant: Tenant
    networks: Sequence[Network] = ()
    ports: Sequence[Port] = ()
    names: Mapping[str, Sequence[str]] = {}
    complete: bool = True
