"""Load balancers: create, look at, change, remove.

A balancer claims its ports of external addresses (external.py), and reserves its addresses of networks as instances'
ports do. Every change rewrites the tenant's guard (allocation/quotas.py), so that no floating address or network that
it uses is removed meanwhile.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from ipaddress import ip_network

import msgspec

from insula.control.allocation.quotas import add, subtract
from insula.control.allocation.reservations import Reservation
from insula.control.allocation.transaction import Proposal, allocate, guard, retried, turn
from insula.control.context import Context
from insula.control.instances.specs import check_labels, cli_command
from insula.control.keys import EXTERNAL, FLOATING_IPS, HEALTHY, LOAD_BALANCERS, NETWORKS, TENANTS, USAGE
from insula.control.networks.backends import backends_of, places_of
from insula.control.networks.controller import NetworkController
from insula.control.networks.external import ClaimedRange, External
from insula.control.networks.policy_checks import check_selector
from insula.control.tenants import Tenants
from insula.model import publishing, rules
from insula.model.errors import Conflict, InsulaError, Invalid, NotFound
from insula.model.external import ExternalClaim
from insula.model.load_balancers import (
    BackendCheck,
    BalancerAddress,
    LoadBalancer,
    LoadBalancerPatch,
    LoadBalancerSpec,
    LoadBalancerView,
)
from insula.model.objects import Network
from insula.model.units import check_label, shorten
from insula.model.views import Usage
from insula.network import addresses
from insula.store.typed import Found

_INDEX = "balancer-index"
_MAX_INDEX = 1 << 24
_SPECIFIED = ("name", "listen", "on", "port", "select", "instances", "affinity", "health", "labels")
BalancerChange = Callable[[LoadBalancer], LoadBalancer]


class LoadBalancers:
    def __init__(self, context: Context, tenants: Tenants, controller: NetworkController) -> None:
        self.context = context
        self.tenants = tenants
        self.controller = controller
        self.external = External(context)

    async def find(self, tenant: str, name: str) -> Found[LoadBalancer]:
        """The load balancer and its revision, or NotFound."""
        check_label("tenant", tenant)
        if found := await LOAD_BALANCERS.get(self.context.store, tenant, check_label("load balancer", name)):
            return found
        await self.tenants.find(tenant)
        raise NotFound(f"tenant {tenant} has no load balancer {name}", f"{cli_command(tenant, 'lb ls')} lists them")

    async def get(self, tenant: str, name: str) -> LoadBalancerView:
        return await self._view((await self.find(tenant, name)).value)

    async def list(self, tenant: str) -> list[LoadBalancerView]:
        await self.tenants.find(tenant)
        return [await self._view(each) for each in await LOAD_BALANCERS.readable(self.context.store, tenant)]

    async def _view(self, balancer: LoadBalancer) -> LoadBalancerView:
        floating = {each.name: each for each in await FLOATING_IPS.readable(self.context.store, balancer.tenant)}
        intents = self.controller.intents
        backends = backends_of(balancer, intents.instances(balancer.tenant))
        return LoadBalancerView(
            **{name: getattr(balancer, name) for name in ("tenant", "created", *_SPECIFIED)},
            addresses=[address for address, _ in places_of(balancer, floating)],
            backends=[intents.checks.view(balancer, each) for each in backends],
        )

    # -- changes ---------------------------------------------------------------------------------------------------

    async def create(self, tenant: str, spec: LoadBalancerSpec) -> LoadBalancerView:
        """Create a load balancer, and wait until it is installed. Invalid, NotFound, Conflict, QuotaExceeded; Failed
        changes nothing."""
        spec = check_spec(spec)
        assert spec.port is not None and spec.health is not None
        owner = await self.tenants.find(tenant)
        store, allocators = self.context.store, self.context.allocators

        async def propose() -> Proposal[LoadBalancer]:
            usage = await guard(store, tenant)
            rest = add(owner.value, usage.value, Usage(load_balancers=1))
            if await LOAD_BALANCERS.get(store, tenant, spec.name):
                raise Conflict(f"tenant {tenant} has a load balancer {spec.name} already", "choose another name")
            async with AsyncExitStack() as undo:
                index = await allocators.of(_INDEX).lowest(1, _MAX_INDEX, "load balancers")
                undo.callback(allocators.of(_INDEX).release, str(index))
                made = LoadBalancer(
                    tenant=tenant,
                    index=index,
                    reached=[await self._placed(tenant, place, undo) for place in spec.on],
                    created=time.time(),
                    **{name: getattr(spec, name) for name in _SPECIFIED},
                )
                claims = await self.external.plan(_claim(made), await self._claimed(made))
                undo.pop_all()
            compares = [
                TENANTS.unchanged(owner, tenant),
                USAGE.unchanged(usage, tenant),
                LOAD_BALANCERS.absent(tenant, spec.name),
            ]
            writes = [LOAD_BALANCERS.put(made, tenant, spec.name), USAGE.put(rest, tenant)]
            return Proposal(made, reservations(made), [*compares, *claims.compares], [*writes, *claims.writes])

        def refuse(key: str, _: LoadBalancer) -> None:
            if key == TENANTS.key(tenant):
                raise Conflict(f"tenant {tenant} was changed at the same time", "try again")

        async with turn(store, tenant):
            await allocate(store, allocators, propose, refuse)
        try:
            await self._installed(tenant)
        except BaseException:
            await self._delete(tenant, spec.name)
            raise
        return await self.get(tenant, spec.name)

    async def _placed(self, tenant: str, place: BalancerAddress, undo: AsyncExitStack) -> BalancerAddress:
        """The place with its addresses; those of a network are taken until `undo`. NotFound, Invalid, Conflict."""
        store = self.context.store
        if place.floating_ip is not None:
            if await FLOATING_IPS.get(store, tenant, place.floating_ip) is None:
                ls = cli_command(tenant, "floating-ip ls")
                raise NotFound(f"tenant {tenant} has no floating address {place.floating_ip}", f"{ls} lists them")
            return place
        if place.network is None:
            return place
        found = await NETWORKS.get(store, tenant, place.network)
        if found is None:
            ls = cli_command(tenant, "network ls")
            raise NotFound(f"tenant {tenant} has no network {place.network}", f"{ls} lists them")
        address = await self._address(found.value, found.value.subnet, place.address, undo)
        if found.value.subnet6 is None:
            if place.address6 is not None:
                raise Invalid(f"network {place.network} has no IPv6", "leave the IPv6 address out")
            return msgspec.structs.replace(place, address=address)
        address6 = await self._address(found.value, found.value.subnet6, place.address6, undo)
        return msgspec.structs.replace(place, address=address, address6=address6)

    async def _address(self, network: Network, subnet: str, wanted: str | None, undo: AsyncExitStack) -> str:
        allocator = self.context.allocators.of(f"address/{network.tenant}/{network.name}")
        found = await allocator.choose(lambda taken: addresses.allocate(ip_network(subnet), taken, wanted))
        undo.callback(allocator.release, found)
        return found

    async def _claimed(self, balancer: LoadBalancer) -> Sequence[ClaimedRange]:
        """The ports of external addresses that it listens on."""
        floating = {each.name: each for each in await FLOATING_IPS.list(self.context.store, balancer.tenant)}
        places = [address for address, network in places_of(balancer, floating) if network is None]
        return [ClaimedRange(each.protocol, each.port, each.port, to) for to in places for each in balancer.listen]

    async def update(self, tenant: str, name: str, patch: LoadBalancerPatch) -> LoadBalancerView:
        """Change a load balancer. Open connections stay with their backends, unless their listener is gone. Invalid,
        NotFound, Conflict; Failed changes nothing."""
        changes = {key: value for key, value in msgspec.structs.asdict(patch).items() if value is not msgspec.UNSET}
        if not changes:
            raise Invalid("there is nothing to change", "give a backend, a port or a check")
        return await self._change(tenant, name, lambda balancer: msgspec.structs.replace(balancer, **changes))

    async def replace(self, tenant: str, spec: LoadBalancerSpec) -> LoadBalancerView:
        """Replace all that can be changed. Invalid, NotFound, Conflict; Failed changes nothing."""
        spec = check_spec(spec)
        new = {name: getattr(spec, name) for name in _SPECIFIED if name != "on"}
        return await self._change(tenant, spec.name, lambda balancer: msgspec.structs.replace(balancer, **new))

    async def _change(self, tenant: str, name: str, changed: BalancerChange) -> LoadBalancerView:
        before = await self._commit(tenant, name, changed)
        try:
            await self._installed(tenant)
        except BaseException:
            if before:
                was = before
                with contextlib.suppress(InsulaError):  # it was removed
                    await self._commit(tenant, name, lambda _: was)
                    await self.controller.converged(tenant)
            raise
        return await self.get(tenant, name)

    async def _commit(self, tenant: str, name: str, changed: BalancerChange) -> LoadBalancer | None:
        """Commit a change; returns what it was before."""

        async def attempt(usage: Found[Usage]) -> LoadBalancer:
            found = await self.find(tenant, name)
            after = changed(found.value)
            check_balancer(after)
            plan = await self.external.plan(_claim(after), await self._claimed(after), await self._claimed(found.value))
            await self.context.store.transact(
                [USAGE.unchanged(usage, tenant), LOAD_BALANCERS.unchanged(found, tenant, name), *plan.compares],
                [LOAD_BALANCERS.put(after, tenant, name), USAGE.put(usage.value, tenant), *plan.writes],
            )
            return found.value

        return await self._with_guard(tenant, attempt)

    async def remove(self, tenant: str, name: str) -> None:
        """Remove a load balancer. Connections through it are cut."""
        await self.find(tenant, name)
        await self._delete(tenant, name)

    async def _delete(self, tenant: str, name: str) -> None:
        async def attempt(usage: Found[Usage]) -> LoadBalancer | None:
            found = await LOAD_BALANCERS.get(self.context.store, tenant, name)
            if found is None:
                return None
            claims = await self._claimed(found.value)
            await self.context.store.transact(
                [USAGE.unchanged(usage, tenant), LOAD_BALANCERS.unchanged(found, tenant, name)],
                [
                    LOAD_BALANCERS.delete(tenant, name),
                    HEALTHY.delete(tenant, name),
                    USAGE.put(subtract(usage.value, Usage(load_balancers=1)), tenant),
                    *(each.delete() for each in reservations(found.value)),
                    *(EXTERNAL.delete(*each.parts) for each in claims),
                ],
            )
            return found.value

        if (gone := await self._with_guard(tenant, attempt)) is None:
            return
        with contextlib.suppress(InsulaError):  # the tenant was removed, or everything is being taken down
            await self.controller.converged(tenant)
        self.context.allocators.release(reservations(gone))

    async def _with_guard(
        self, tenant: str, attempt: Callable[[Found[Usage]], Awaitable[LoadBalancer | None]]
    ) -> LoadBalancer | None:
        """Call `attempt` with the tenant's guard until its transaction succeeds."""

        async def guarded() -> LoadBalancer | None:
            return await attempt(await guard(self.context.store, tenant))

        async with turn(self.context.store, tenant):
            return await retried(guarded)

    async def _installed(self, tenant: str) -> None:
        errors = await self.controller.converged(tenant)
        if error := errors.get("all") or errors.get("outside"):
            raise error


def reservations(balancer: LoadBalancer) -> list[Reservation]:
    """The reservations of a balancer's number, and of its addresses in networks."""
    owner = f"{balancer.tenant}/lb:{balancer.name}"
    return [
        Reservation(_INDEX, str(balancer.index), owner),
        *(
            Reservation(f"address/{balancer.tenant}/{place.network}", each, owner)
            for place in balancer.reached
            if place.network is not None
            for each in (place.address, place.address6)
            if each
        ),
    ]


def _claim(balancer: LoadBalancer) -> ExternalClaim:
    return ExternalClaim(tenant=balancer.tenant, kind="load-balancer", name=balancer.name, id=balancer.name)


# -- checks of specs -----------------------------------------------------------------------------------------------


def check_spec(spec: LoadBalancerSpec) -> LoadBalancerSpec:
    """Return the spec in canonical form, with its defaults. Invalid."""
    check_label("load balancer", spec.name)
    check_labels(spec.labels)
    if not spec.listen or not spec.on:
        raise Invalid("a load balancer needs a port and an address", "as in --listen tcp/80 --on network:default")
    udp = all(each.protocol == "udp" for each in spec.listen)
    full = msgspec.structs.replace(
        spec,
        on=[_check_place(each) for each in spec.on],
        port=spec.listen[0].port if spec.port is None else spec.port,
        health=spec.health or BackendCheck(kind="none" if udp else "tcp"),
    )
    check_balancer(full)
    return full


def check_balancer(balancer: LoadBalancer | LoadBalancerSpec) -> None:
    """Check what can be changed. Invalid."""
    assert balancer.port is not None and balancer.health is not None
    _check_ports([balancer.port, *(each.port for each in balancer.listen)])
    _check_count(balancer.listen, "ports", rules.MAX_LISTENERS)
    _check_count(balancer.on, "addresses", rules.MAX_LISTENERS)
    _check_count(balancer.instances, "named backends", rules.MAX_BACKENDS)
    for name in balancer.instances:
        check_label("instance", name)
    if balancer.select is not None:
        check_selector(balancer.select)
    if len({(each.protocol, each.port) for each in balancer.listen}) < len(balancer.listen):
        raise Invalid("a port is given twice", "give each once")
    _check_check(balancer.health)


def _check_count(items: Sequence[object], what: str, most: int) -> None:
    if len(items) > most:
        raise Invalid(f"{len(items)} {what} of a load balancer are too many", f"it may have {most}")


def _check_ports(ports: Iterable[int]) -> None:
    for port in ports:
        if not 1 <= port <= rules.MAX_PORT:
            raise Invalid(f"{shorten(port)} is no port", f"use 1 to {rules.MAX_PORT}")


def _check_place(place: BalancerAddress) -> BalancerAddress:
    if place.floating_ip is not None:
        check_label("floating address", place.floating_ip)
        if place.network is not None or place.address is not None or place.address6 is not None:
            raise Invalid("a floating address has no network and no other address", "give one of them")
    elif place.network is not None:
        check_label("network", place.network)
    elif place.address6 is not None:
        raise Invalid("an address of the host is `address`, of either version", "leave address6 out")
    else:
        return msgspec.structs.replace(place, address=publishing.check_address(place.address))
    return place


def _check_check(check: BackendCheck) -> None:
    if check.port is not None:
        _check_ports([check.port])
    if not re.fullmatch(rules.CHECK_PATH, check.path) or len(check.path) > rules.MAX_CHECK_PATH:
        raise Invalid(f"{shorten(check.path)} is no path of a check", "as in /health, without spaces")
    for what, seconds in (("interval", check.interval), ("timeout", check.timeout)):
        if not rules.MIN_CHECK <= seconds <= rules.MAX_CHECK:
            raise Invalid(f"the check's {what} of {seconds:g} s is out of bounds", f"use {rules.MIN_CHECK:g} s or more")
    if not 1 <= check.threshold <= rules.MAX_THRESHOLD:
        raise Invalid(f"the check's threshold {shorten(check.threshold)} is out of bounds", "use 1 to 10")
