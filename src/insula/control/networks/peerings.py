"""Peerings: offer, accept, end.

A peering is stored twice, below each of its tenants, in one transaction: so each finds its own, and is told of changes.
Every change rewrites the guard of the tenants whose networks it is about (allocation/quotas.py). So a network can't be
removed, and none with overlapping addresses can be made, while a peering is being accepted.

An offer tells its tenant nothing about the other one, not even whether it exists.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import msgspec

from insula.control.allocation.transaction import guard, retried, turn
from insula.control.context import Context
from insula.control.instances.specs import cli_command
from insula.control.keys import NETWORKS, PEERINGS, TENANTS, USAGE
from insula.control.networks.controller import NetworkController
from insula.control.networks.peering_records import (
    INDEX,
    deletes,
    endpoint_deletes,
    endpoint_reservations,
    endpoints_of,
    first_overlap,
    keys,
    puts,
    reservation,
)
from insula.control.tenants import Tenants
from insula.model.errors import Conflict, InsulaError, Invalid, NotFound, QuotaExceeded
from insula.model.objects import Network
from insula.model.peerings import (
    EVERYTHING,
    MAX_NETWORKS,
    MAX_PEERINGS,
    MAX_PORTS,
    PeeredNetwork,
    Peering,
    PeeringAcceptance,
    PeeringOffer,
    PeeringSide,
    PeeringView,
)
from insula.model.policies import PortMatch
from insula.model.service_endpoints import ServiceEndpoint
from insula.model.units import check_label
from insula.network.routes import subnets
from insula.store.typed import Found

_MAX_INDEX = 1 << 20


class Peerings:
    def __init__(self, context: Context, tenants: Tenants, controller: NetworkController) -> None:
        self.context = context
        self.tenants = tenants
        self.controller = controller

    async def find(self, tenant: str, other: str, name: str) -> Found[Peering]:
        """The tenant's peering of that name with another tenant, and its revision, or NotFound."""
        for what, label in (("tenant", tenant), ("tenant", other), ("peering", name)):
            check_label(what, label)
        if found := await PEERINGS.get(self.context.store, tenant, other, name):
            return found
        await self.tenants.find(tenant)
        ls = cli_command(tenant, "peer ls")
        raise NotFound(f"tenant {tenant} has no peering {name} with {other}", f"{ls} lists them")

    async def get(self, tenant: str, other: str, name: str) -> PeeringView:
        return await self._view(tenant, (await self.find(tenant, other, name)).value)

    async def list(self, tenant: str) -> list[PeeringView]:
        await self.tenants.find(tenant)
        return [await self._view(tenant, each) for each in await PEERINGS.readable(self.context.store, tenant)]

    async def _view(self, tenant: str, peering: Peering) -> PeeringView:
        own, side = peering.side(tenant), peering.side(peering.other(tenant))
        networks = await NETWORKS.readable(self.context.store, side.tenant) if side else []
        return PeeringView(
            tenant=tenant,
            peer=peering.other(tenant),
            name=peering.name,
            state="active" if peering.accepted else "offered",
            offered_by=peering.offered.tenant,
            networks=own.networks if own else [],
            allow=own.allow if own else [],
            peer_networks=[
                PeeredNetwork(name=each.name, subnet=each.subnet, subnet6=each.subnet6)
                for each in networks
                if side and each.name in side.networks
            ],
            peer_allow=side.allow if side else [],
            created=peering.created,
        )

    # -- offer ---------------------------------------------------------------------------------------------------

    async def offer(self, tenant: str, offer: PeeringOffer) -> PeeringView:
        """Offer another tenant a peering with some networks. It has no effect until that accepts. Invalid, Conflict,
        NotFound (of a network)."""
        check_label("tenant", offer.to)
        check_label("peering", offer.name)
        if offer.to == tenant:
            raise Invalid(
                "a tenant can't have a peering with itself", f"{cli_command(tenant, 'router')} joins networks"
            )
        side = _side(tenant, offer.networks, EVERYTHING if offer.allow is None else offer.allow)
        store, allocators = self.context.store, self.context.allocators

        async def attempt() -> Peering:
            owner, usage = await self.tenants.find(tenant), await guard(store, tenant)
            await self._networks(side)
            await self._check_count(tenant)
            if await PEERINGS.get(store, tenant, offer.to, offer.name):
                what = f"tenant {tenant} has a peering {offer.name} with {offer.to} already"
                raise Conflict(what, "choose another --name")
            index = await allocators.of(INDEX).random(_MAX_INDEX, "places for peerings")
            peering = Peering(name=offer.name, index=index, offered=side, to=offer.to, created=time.time())
            own = reservation(peering)
            try:
                await store.transact(
                    [
                        TENANTS.unchanged(owner, tenant),
                        USAGE.unchanged(usage, tenant),
                        *(PEERINGS.absent(*key) for key in keys(peering)),
                        own.absent(),
                    ],
                    [USAGE.put(usage.value, tenant), own.put(), *puts(peering)],
                )
            except BaseException:
                allocators.release([own])
                raise
            return peering

        async with turn(store, tenant):
            return await self._view(tenant, await retried(attempt))

    # -- accept --------------------------------------------------------------------------------------------------

    async def accept(self, tenant: str, other: str, name: str, acceptance: PeeringAcceptance) -> PeeringView:
        """Accept an offer with some of the tenant's own networks, and wait until it works. Invalid, Conflict (overlap),
        NotFound; Failed changes nothing."""
        side = _side(tenant, acceptance.networks, acceptance.allow, for_services=True)
        store = self.context.store

        async def attempt() -> Peering:
            found = await self.find(tenant, other, name)
            if found.value.accepted or found.value.to != tenant:
                state = (
                    "is active already" if found.value.accepted else f"was offered by this tenant; {other} accepts it"
                )
                raise Conflict(f"peering {name} with {other} {state}", f"see {cli_command(tenant, 'peer ls')}")
            usages = {each: await guard(store, each) for each in (tenant, other)}
            await self._check_count(tenant)
            await self._check_overlaps(found.value, side)
            peering = msgspec.structs.replace(found.value, accepted=side)
            await store.transact(
                [PEERINGS.unchanged(found, tenant, other, name)]
                + [USAGE.unchanged(usage, each) for each, usage in usages.items()],
                [*puts(peering), *(USAGE.put(usage.value, each) for each, usage in usages.items())],
            )
            return peering

        async with self._turns(tenant, other):
            peering = await retried(attempt)
        try:
            await self._installed(peering)
        except BaseException:
            await self._withdraw(peering)
            raise
        return await self._view(tenant, peering)

    async def _installed(self, peering: Peering) -> None:
        """Return when both tenants' controllers have installed a peering on this host. Raises what prevents it."""
        for tenant in (peering.to, peering.offered.tenant):
            errors = await self.controller.converged(tenant)
            label = f"peering {peering.other(tenant)}/{peering.name}"
            if error := errors.get("all") or errors.get(label) or errors.get("tenant"):
                raise error

    async def _withdraw(self, peering: Peering) -> None:
        """Make a peering an offer again after it could not be installed, unless it was ended meanwhile."""
        offer = msgspec.structs.replace(peering, accepted=None)
        with contextlib.suppress(InsulaError):
            found = await self.find(peering.to, peering.offered.tenant, peering.name)
            if found.value == peering:
                compare = PEERINGS.unchanged(found, peering.to, peering.offered.tenant, peering.name)
                await self.context.store.transact([compare], puts(offer))
        await self._converged(peering)

    async def _check_overlaps(self, peering: Peering, accepted: PeeringSide) -> None:
        """Conflict if, with this peering, a tenant would have two networks with the same addresses: its own, and those
        of its peers."""
        accepting = await self._networks(accepted)
        if not accepting:
            return
        offered = await self._networks(peering.offered)
        for tenant, beyond in ((accepted.tenant, offered), (peering.offered.tenant, accepting)):
            own = tenant == accepted.tenant
            for network in beyond:
                other = await first_overlap(self.context.store, tenant, subnets(network))
                if other is not None:
                    where = f"network {network.name} of {network.tenant}"
                    what = other if own else f"a network of tenant {tenant}, or of one of its peers"
                    raise Conflict(f"{where} overlaps {what}", "accept with --endpoints: see insula endpoint create")

    # -- end -----------------------------------------------------------------------------------------------------

    async def end(self, tenant: str, other: str, name: str) -> None:
        """End a peering with its service endpoints, or take back or refuse an offer. Open connections are cut when it
        returns. NotFound."""
        endpoints: list[ServiceEndpoint] = []

        async def attempt() -> Peering:
            found = await self.find(tenant, other, name)
            endpoints[:] = await endpoints_of(self.context.store, found.value)
            writes = [*deletes(found.value), *(write for each in endpoints for write in endpoint_deletes(each))]
            await self.context.store.transact([PEERINGS.unchanged(found, tenant, other, name)], writes)
            return found.value

        ended = await retried(attempt)
        await self._converged(ended)
        self.context.allocators.release([own for each in endpoints for own in endpoint_reservations(each)])
        self.context.allocators.release([reservation(ended)])

    async def _converged(self, peering: Peering) -> None:
        for tenant in (peering.offered.tenant, peering.to):
            with contextlib.suppress(InsulaError):  # there is no such tenant, or everything is being taken down
                await self.controller.converged(tenant)

    # -- checks --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _turns(self, *tenants: str) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for tenant in sorted(tenants):
                await stack.enter_async_context(turn(self.context.store, tenant))
            yield

    async def _networks(self, side: PeeringSide) -> Sequence[Network]:
        """The networks of a side. NotFound."""
        networks = {each.name: each for each in await NETWORKS.list(self.context.store, side.tenant)}
        for name in side.networks:
            if name not in networks:
                ls = cli_command(side.tenant, "network ls")
                raise NotFound(
                    f"tenant {side.tenant} has no network {check_label('network', name)}", f"{ls} lists them"
                )
        return [networks[name] for name in side.networks]

    async def _check_count(self, tenant: str) -> None:
        """QuotaExceeded if the tenant has offered and accepted as many as it may. Offers of others don't count."""
        mine = await PEERINGS.list(self.context.store, tenant)
        if sum(each.side(tenant) is not None for each in mine) >= MAX_PEERINGS:
            raise QuotaExceeded(f"tenant {tenant} has {MAX_PEERINGS} peerings, the most it may have", "end some first")


def _side(
    tenant: str, networks: Sequence[str], allow: Sequence[PortMatch], *, for_services: bool = False
) -> PeeringSide:
    """One tenant's part, checked; `for_services` it needs no network. Invalid."""
    if not networks and not (for_services and not allow):
        raise Invalid("a peering needs a network", "give one with --network")
    if len(networks) > MAX_NETWORKS:
        raise Invalid(f"a peering has at most {MAX_NETWORKS} networks of each side", "make several peerings")
    for name in networks:
        check_label("network", name)
    ports = 0
    for match in allow:
        last = match.end_port or match.port
        if match.icmp_type is not None:
            raise Invalid("a peering opens ICMP as a whole", "write icmp, and a policy for single types")
        if match.port is not None and (match.protocol not in ("tcp", "udp") or last is None or last < match.port):
            raise Invalid(f"{match.protocol} {match.port}-{last} is no range of ports", "write as in tcp/8000-8010")
        ports += 1 if match.port is None or last is None else last - match.port + 1
    if ports > MAX_PORTS:
        raise Invalid(f"a peering opens at most {MAX_PORTS} single ports, not {ports}", "open the whole protocol: tcp")
    return PeeringSide(tenant=tenant, networks=list(dict.fromkeys(networks)), allow=[*allow])
