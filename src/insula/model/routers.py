"""Routers: what joins networks of a tenant, and where their packets go.

Networks of one tenant are apart. A router joins some of them: instances of one then reach those of the others through
their gateways. A static route sends packets for further addresses to a next hop, an instance that forwards them.
"""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Annotated

from insula.model import fields, rules
from insula.model.objects import Struct


class StaticRoute(Struct, kw_only=True):
    """A route: packets to `destination`, in CIDR notation, go to `next_hop`, an address in one of the router's
    networks. The longest destination that has an address decides (RFC 1812, 5.2.4.3)."""

    destination: fields.Cidr
    next_hop: fields.IpAddress


RouterNetworks = Annotated[list[fields.Label], fields.at_most(rules.MAX_ROUTER_NETWORKS)]
StaticRoutes = Annotated[list[StaticRoute], fields.at_most(rules.MAX_ROUTES)]
Destinations = Annotated[list[fields.Cidr], fields.at_most(rules.MAX_ROUTES)]


class Router(Struct, kw_only=True):
    """A router of a tenant. A network belongs to at most one; `routes` hold for the networks of this router only."""

    tenant: str
    name: str
    networks: list[str] = []
    routes: list[StaticRoute] = []
    labels: dict[str, str] = {}
    created: float


class RouterStatus(Struct, kw_only=True):
    """The measured status of a router: `ready` is True if its paths and routes are installed on this host."""

    ready: bool
    reason: str | None = None


class RouterView(Struct, kw_only=True):
    router: Router
    status: RouterStatus


class RouterSpec(Struct, kw_only=True):
    """The request of `insula router create`."""

    name: fields.Label
    networks: RouterNetworks = []
    routes: StaticRoutes = []
    labels: fields.Labels = {}


class RouterPatch(Struct, kw_only=True):
    """Changes of a router, all or none: networks that it joins and leaves, routes by their destination. A route that is
    added replaces one to the same destination."""

    join: RouterNetworks = []
    leave: RouterNetworks = []
    add_routes: StaticRoutes = []
    remove_routes: Destinations = []
