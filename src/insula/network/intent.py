"""The intent of a tenant: the networks, ports and names that it wants on one host, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from insula.model.objects import Network, Port, Struct, Tenant


class TenantIntent(Struct, kw_only=True):
    """Everything that a fabric installs for one tenant. A new capability of fabrics becomes a field with a default.

    `ports` are those of all instances of this host, running or not: a port is plugged when its instance starts, and
    removed when it is no longer in the intent. `names` are all names that the tenant's resolver answers, with their
    addresses. `complete` is False if a record of the store can't be read, so that parts may be missing here: then only
    parts of earlier intents are removed.
    """

    tenant: Tenant
    networks: Sequence[Network] = ()
    ports: Sequence[Port] = ()
    names: Mapping[str, Sequence[str]] = {}
    complete: bool = True
