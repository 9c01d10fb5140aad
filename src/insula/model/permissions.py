"""The table of permissions and roles (role-based access control, NIST INCITS 359).

A permission has a fixed *scope*. One of scope "tenant" is held in a tenant, and concerns objects of that tenant. One of
scope "host" concerns the whole cloud. One of scope "self" belongs to every principal, and concerns only the caller.

A *role* is a set of permissions, and is bound to a principal either in one tenant or on the host. The roles
`operator` and `auditor` are bound on the host, and hold their tenant permissions in every tenant. No role holds
permissions by a pattern: a new permission belongs to no role until it is added to the table.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Role = Literal["operator", "auditor", "admin", "member", "viewer"]

HOST_ROLES: tuple[Role, ...] = ("operator", "auditor")
TENANT_ROLES: tuple[Role, ...] = ("admin", "member", "viewer")


class Permission(NamedTuple):
    """A permission: its name, its scope, the roles that hold it, and what it allows."""

    name: str
    scope: Literal["host", "tenant", "self"]
    roles: tuple[Role, ...]
    allows: str


def _permission(name: str, scope: Literal["host", "tenant", "self"], roles: str, allows: str) -> Permission:
    return Permission(name, scope, tuple(roles.split()), allows)  # type: ignore[arg-type]


_ALL = "operator auditor admin member viewer"
TABLE = (
    _permission("self.read", "self", "", "see oneself: name, roles, tokens"),
    _permission("self.token", "self", "", "make and revoke tokens of one's own"),
    _permission("self.join", "self", "", "exchange an invitation for a token, once"),
    _permission("self.login", "self", "", "see by which providers to log in; nobody needs a proof for it"),
    _permission("self.migration", "self", "", "send an instance to this host by a ticket, which is the only proof"),
    _permission("host.read", "host", "operator auditor", "see the host: status, doctor, verify, whois"),
    _permission("metrics.read", "host", "operator auditor", "read the metrics of the host and of all tenants"),
    _permission("host.down", "host", "operator", "stop everything, and end insulad"),
    _permission("host.repair", "host", "operator", "have installed again what `insula verify` finds"),
    _permission("host.certificates", "host", "operator", "rotate the certificate authorities"),
    _permission("audit.read", "host", "operator auditor", "read the audit log of all tenants"),
    _permission("audit.key", "host", "operator", "begin with a new key of the audit log, and see it once"),
    _permission("user.read", "host", "operator auditor", "see users, their roles and tokens"),
    _permission("user.write", "host", "operator", "create and remove users, bind them on the host, make their tokens"),
    _permission("tenant.create", "host", "operator", "create tenants"),
    _permission("tenant.remove", "host", "operator", "remove tenants"),
    _permission("tenant.limits", "host", "operator", "change a tenant's limits"),
    _permission("host.apply", "host", "operator", "apply declared state of tenants, users, and all that tenants have"),
    _permission("tenant.guarantee", "host", "operator", "set floors and ceilings of a tenant as a whole"),
    _permission("operator-policy.read", "host", "operator auditor", "see policies above those of tenants"),
    _permission("operator-policy.write", "host", "operator", "make, change and remove policies above those of tenants"),
    _permission("tenant.read", "tenant", _ALL, "see the tenant, its limits and usage"),
    _permission("usage.read", "tenant", _ALL, "see what the tenant has used and reserved over time"),
    _permission("binding.read", "tenant", "operator auditor admin", "see the roles in the tenant"),
    _permission("binding.write", "tenant", "operator admin", "bind others to roles that one holds, and unbind them"),
    _permission("service-account.read", "tenant", "operator auditor admin", "see the tenant's service accounts"),
    _permission("service-account.write", "tenant", "operator admin", "make service accounts, and tokens for them"),
    _permission("set.read", "tenant", _ALL, "compare files with what there is, and dump it"),
    _permission("set.write", "tenant", "operator admin member", "apply declared state; each object is checked too"),
    _permission("network.read", "tenant", _ALL, "see networks and routers"),
    _permission("peering.read", "tenant", _ALL, "see peerings with other tenants, and offers"),
    _permission("peering.write", "tenant", "operator admin", "offer, accept and end peerings with other tenants"),
    _permission("policy.read", "tenant", _ALL, "see policies and address groups"),
    _permission("policy.write", "tenant", "operator admin member", "create, change and remove policies"),
    _permission("network.write", "tenant", "operator admin member", "create, change and remove networks and routers"),
    _permission("floating-ip.read", "tenant", _ALL, "see floating addresses"),
    _permission(
        "floating-ip.write", "tenant", "operator admin member", "allocate, attach and release floating addresses"
    ),
    _permission("load-balancer.read", "tenant", _ALL, "see load balancers and their backends"),
    _permission("load-balancer.write", "tenant", "operator admin member", "create, change and remove load balancers"),
    _permission("guarantee.read", "tenant", _ALL, "see floors and ceilings"),
    _permission("guarantee.write", "tenant", "operator admin member", "set floors and ceilings of instances"),
    _permission("image.read", "tenant", _ALL, "see images"),
    _permission("image.pull", "tenant", "operator admin member", "fetch images from registries"),
    _permission("image.push", "tenant", "operator admin member", "send images to registries"),
    _permission("image.registry", "tenant", "operator", "fetch, send and build images in the network of the host"),
    _permission("image.write", "tenant", "operator admin member", "import, load, tag and remove images"),
    _permission("image.export", "tenant", "operator admin member", "save images"),
    _permission("instance.read", "tenant", _ALL, "see instances, their use, and events"),
    _permission("instance.write", "tenant", "operator admin member", "run, change, stop and remove instances"),
    _permission("instance.logs", "tenant", "operator admin member", "read what instances have printed"),
    _permission("instance.files", "tenant", "operator admin member", "read and write files in instances"),
    _permission("instance.exec", "tenant", "operator admin member", "run further processes in instances"),
    _permission("instance.attach", "tenant", "operator admin member", "use the input and output of instances"),
    _permission("instance.capabilities", "tenant", "operator admin", "run instances with capabilities (--cap-add)"),
    _permission("instance.nesting", "tenant", "operator admin", "run instances in which containers run (--nesting)"),
    _permission("instance.sysctls", "tenant", "operator admin", "run instances with kernel parameters (--sysctl)"),
    _permission("instance.sockets", "tenant", "operator admin", "run instances with more socket families, or AIO"),
)
"""Every permission, with the roles that hold it."""

PERMISSIONS = {permission.name: permission for permission in TABLE}
BY_INVITATION = frozenset({"self.join"})
"""The permission that an invitation gives, and nothing else does."""
BY_ANYBODY = frozenset({"self.login", "self.migration"})
"""The permissions that take no proof."""
OF_EVERYBODY = frozenset(each.name for each in TABLE if each.scope == "self") - BY_INVITATION
_OF_ROLE = {role: frozenset(p.name for p in TABLE if role in p.roles) for role in (*HOST_ROLES, *TENANT_ROLES)}


def permissions_of(role: Role) -> frozenset[str]:
    """Return the names of the permissions that a role holds."""
    return _OF_ROLE[role]


NOT_BY_TOKEN = frozenset({"self.token", "user.write", "binding.write", "service-account.write"})
"""Permissions that no token gives, whatever its owner holds: a stolen token must not make others, which would be
valid after it is revoked."""
