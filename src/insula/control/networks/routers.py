"""Routers: create, look at, change, remove.

Every change rewrites the tenant's guard (allocation/quotas.py). So a network can't be removed while a router is about
to join it, and two routers can't join the same network at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from insula.control.allocation.quotas import add, subtract
from insula.control.allocation.transaction import guarded
from insula.control.context import Context
from insula.control.instances.specs import check_labels, cli_command
from insula.control.keys import NETWORKS, ROUTERS, TENANTS, USAGE
from insula.control.networks.controller import NetworkController
from insula.control.tenants import Tenants
from insula.model import rules
from insula.model.errors import Conflict, Failed, InsulaError, Invalid, NotFound
from insula.model.routers import Router, RouterPatch, RouterStatus, RouterView, StaticRoute
from insula.model.units import check_label
from insula.model.views import Usage
from insula.network.routes import check_routes, parse_destination, parse_route
from insula.store.typed import Found

Changing = Callable[[Router], Router]


class Routers:
    def __init__(self, context: Context, tenants: Tenants, controller: NetworkController) -> None:
        self.context = context
        self.tenants = tenants
        self.controller = controller

    async def find(self, tenant: str, name: str) -> Found[Router]:
        """The router and its revision, or NotFound."""
        check_label("tenant", tenant)
        if found := await ROUTERS.get(self.context.store, tenant, check_label("router", name)):
            return found
        await self.tenants.find(tenant)
        raise NotFound(f"tenant {tenant} has no router {name}", f"{cli_command(tenant, 'router ls')} lists them")

    async def get(self, tenant: str, name: str) -> RouterView:
        return await self._view((await self.find(tenant, name)).value)

    async def list(self, tenant: str) -> list[RouterView]:
        await self.tenants.find(tenant)
        routers = await ROUTERS.readable(self.context.store, tenant)
        return list(await asyncio.gather(*map(self._view, routers)))

    async def _view(self, router: Router) -> RouterView:
        """The router with its state on this host, measured now."""
        tenant = (await self.tenants.find(router.tenant)).value
        networks = await NETWORKS.readable(self.context.store, tenant.name)
        fabric = self.context.fabric
        try:
            status = await self.context.fabric_call(tenant.name, fabric.router_status, tenant, networks, router)
        except InsulaError as error:
            status = RouterStatus(ready=False, reason=error.message)
        return RouterView(router=router, status=status)

    async def create(
        self,
        tenant: str,
        name: str,
        networks: Sequence[str] = (),
        routes: Iterable[StaticRoute] = (),
        labels: dict[str, str] | None = None,
    ) -> RouterView:
        """Create a router and wait until it works. Invalid, Conflict, NotFound; Failed changes nothing."""
        check_label("router", name)
        router = Router(
            tenant=tenant,
            name=name,
            networks=_distinct(networks),
            routes=_parsed(self.context, routes),
            labels=check_labels(labels or {}),
            created=time.time(),
        )
        await self.tenants.find(tenant)

        async def attempt(guard: Found[Usage]) -> None:
            owner = await self.tenants.find(tenant)
            if await ROUTERS.get(self.context.store, tenant, name):
                raise Conflict(f"tenant {tenant} has a router {name} already", "choose another name")
            rest = add(owner.value, guard.value, Usage(routers=1))
            await self._check(router)
            await self.context.store.transact(
                [TENANTS.unchanged(owner, tenant), USAGE.unchanged(guard, tenant), ROUTERS.absent(tenant, name)],
                [ROUTERS.put(router, tenant, name), USAGE.put(rest, tenant)],
            )

        await guarded(self.context.store, tenant, attempt)
        try:
            await self._installed(router)
        except BaseException:
            await self._delete(tenant, name)
            raise
        return await self._view(router)

    async def update(self, tenant: str, name: str, patch: RouterPatch) -> RouterView:
        """Have it join and leave networks, and add and remove routes: all or nothing. Invalid, Conflict, NotFound;
        Failed changes nothing."""
        added = _parsed(self.context, patch.add_routes)
        removed = [str(parse_destination(each)) for each in patch.remove_routes]
        if not (patch.join or patch.leave or added or removed):
            raise Invalid("there is nothing to change", "give a network to join or leave, or a route")

        def changed(router: Router) -> Router:
            return msgspec.structs.replace(
                router, networks=_joined(router, patch.join, patch.leave), routes=_routes(router, added, removed)
            )

        return await self._change(tenant, name, changed)

    async def replace(
        self, tenant: str, name: str, networks: Sequence[str], routes: Iterable[StaticRoute], labels: dict[str, str]
    ) -> RouterView:
        """Replace all that can be changed. Invalid, Conflict, NotFound; Failed changes nothing."""
        new = {"networks": _distinct(networks), "routes": _parsed(self.context, routes), "labels": check_labels(labels)}
        return await self._change(tenant, name, lambda router: msgspec.structs.replace(router, **new))

    async def _change(self, tenant: str, name: str, changed: Changing) -> RouterView:
        before, after = await self._commit(tenant, name, changed)
        try:
            await self._installed(after)
        except BaseException:
            with contextlib.suppress(InsulaError):  # it was removed, or its networks were
                await self._commit(tenant, name, lambda _: before)
                await self.controller.converged(tenant)
            raise
        return await self._view(after)

    async def _commit(self, tenant: str, name: str, changed: Changing) -> tuple[Router, Router]:
        async def attempt(guard: Found[Usage]) -> tuple[Router, Router]:
            found = await self.find(tenant, name)
            router = changed(found.value)
            await self._check(router)
            await self.context.store.transact(
                [USAGE.unchanged(guard, tenant), ROUTERS.unchanged(found, tenant, name)],
                [ROUTERS.put(router, tenant, name), USAGE.put(guard.value, tenant)],
            )
            return found.value, router

        return await guarded(self.context.store, tenant, attempt)

    async def _check(self, router: Router) -> None:
        """Check a router against what the tenant has now. Invalid, Conflict, NotFound."""
        store, tenant = self.context.store, router.tenant
        if len(router.networks) > rules.MAX_ROUTER_NETWORKS or len(router.routes) > rules.MAX_ROUTES:
            most = f"{rules.MAX_ROUTER_NETWORKS} networks and {rules.MAX_ROUTES} routes"
            raise Invalid(f"router {router.name} has too many networks or routes", f"it may have {most}")
        networks = {network.name: network for network in await NETWORKS.readable(store, tenant)}
        for name in router.networks:
            if name not in networks:
                ls = cli_command(tenant, "network ls")
                raise NotFound(f"tenant {tenant} has no network {check_label('network', name)}", f"{ls} lists them")
        for other in await ROUTERS.list(store, tenant):
            if other.name != router.name and (both := sorted({*other.networks} & {*router.networks})):
                leave = cli_command(tenant, f"router update {other.name} --leave {both[0]}")
                raise Conflict(f"network {both[0]} belongs to router {other.name}", f"{leave} takes it out")
        check_routes(router.name, [networks[name] for name in router.networks], router.routes)

    async def _installed(self, router: Router) -> None:
        """Return when the controller has installed the router on this host. Raises what prevents it."""
        errors = await self.controller.converged(router.tenant)
        if error := errors.get("all"):
            raise error
        status = (await self._view(router)).status
        if not status.ready:
            what = f"router {router.name} could not be installed: {status.reason or 'for an unknown reason'}"
            raise errors.get("routes") or errors.get("tenant") or Failed(what, "see insulad's log")

    async def remove(self, tenant: str, name: str) -> None:
        """Remove a router: its networks are apart from then on."""
        await self.find(tenant, name)
        await self._delete(tenant, name)

    async def _delete(self, tenant: str, name: str) -> None:
        async def attempt(guard: Found[Usage]) -> None:
            found = await ROUTERS.get(self.context.store, tenant, name)
            if found is None:
                return
            rest = subtract(guard.value, Usage(routers=1))
            await self.context.store.transact(
                [USAGE.unchanged(guard, tenant), ROUTERS.unchanged(found, tenant, name)],
                [ROUTERS.delete(tenant, name), USAGE.put(rest, tenant)],
            )

        await guarded(self.context.store, tenant, attempt)
        with contextlib.suppress(InsulaError):  # the tenant was removed, or everything is being taken down
            await self.controller.converged(tenant)


def _parsed(context: Context, routes: Iterable[StaticRoute]) -> list[StaticRoute]:
    return [parse_route(route, reserved=context.fabric.reserved) for route in routes]


def _distinct(names: Sequence[str]) -> list[str]:
    for name in names:
        check_label("network", name)
    return list(dict.fromkeys(names))


def _joined(router: Router, join: Sequence[str], leave: Sequence[str]) -> list[str]:
    for name in _distinct(leave):
        if name not in router.networks:
            raise NotFound(f"router {router.name} does not join network {name}", f"it joins {_listed(router.networks)}")
        if name in join:
            raise Invalid(f"network {name} can't both join and leave", "give it once")
    return _distinct([*(name for name in router.networks if name not in leave), *join])


def _routes(router: Router, added: Sequence[StaticRoute], removed: Sequence[str]) -> list[StaticRoute]:
    """The routes after a change. One that is added replaces that to the same destination."""
    now = {route.destination: route for route in router.routes}
    for destination in removed:
        if now.pop(destination, None) is None:
            raise NotFound(
                f"router {router.name} has no route to {destination}", f"it has routes to {_listed(list(now))}"
            )
    new: Mapping[str, StaticRoute] = {route.destination: route for route in added}
    if len(new) < len(added):
        check_routes(router.name, [], added)  # raises: a destination is there twice
    return list({**now, **new}.values())


def _listed(names: Sequence[str]) -> str:
    return (", ".join(names[:5]) + (", …" if len(names) > 5 else "")) if names else "none"
