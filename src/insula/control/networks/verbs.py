"""Networks: create, look at, change, remove."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack

import msgspec

from insula.control.allocation.quotas import add, subtract
from insula.control.allocation.reservations import Reservation
from insula.control.allocation.transaction import Proposal, allocate, guard, guarded, retried, turn
from insula.control.context import Context
from insula.control.instances.specs import check_labels, cli_command
from insula.control.keys import INSTANCES, LOAD_BALANCERS, NETWORKS, ROUTERS, TENANTS, USAGE
from insula.control.networks.controller import Errors, NetworkController
from insula.control.networks.peering_records import check_beyond, refuse_if_peered
from insula.control.networks.ports import Ports
from insula.control.tenants import DEFAULT, Tenants
from insula.model.errors import Conflict, Denied, InsulaError, Invalid, NotFound
from insula.model.objects import Network, NetworkStatus, Outbound, Tenant
from insula.model.rules import MAX_MTU, MIN_MTU, MIN_MTU6
from insula.model.units import check_label
from insula.model.views import NetworkPatch, NetworkView, Usage
from insula.network.addresses import Subnet, check_disjoint, gateway_of, parse_subnet
from insula.store.protocol import TransactionConflict
from insula.store.typed import Found

DEFAULT_SUBNET, DEFAULT_SUBNET6 = "10.77.0.0/16", "fd77::/64"
FIRST_VNI, MAX_VNI = 4096, 1 << 24  # VNIs below stay free for segments that mirror VLANs
_INDEX = "network-index"
_VNI = "vni"
_MAX_INDEX = 1 << 24


class Networks:
    def __init__(self, context: Context, tenants: Tenants, controller: NetworkController, ports: Ports) -> None:
        self.context = context
        self.tenants = tenants
        self.controller = controller
        self.ports = ports

    async def find(self, tenant: str, name: str) -> Found[Network]:
        """The network and its revision, or NotFound."""
        check_label("tenant", tenant)
        if found := await NETWORKS.get(self.context.store, tenant, check_label("network", name)):
            return found
        await self.tenants.find(tenant)
        ls = cli_command(tenant, "network ls")
        create = cli_command(tenant, f"network create {name} --subnet 10.0.0.0/24")
        raise NotFound(f"tenant {tenant} has no network {name}", f"{ls} lists them, {create} would make it")

    async def get(self, tenant: str, name: str) -> NetworkView:
        network = (await self.find(tenant, name)).value
        return NetworkView(network=network, status=await self._measure(network))

    async def list(self, tenant: str) -> list[NetworkView]:
        await self.tenants.find(tenant)
        networks = await NETWORKS.readable(self.context.store, tenant)
        statuses = await asyncio.gather(*(self._measure(network) for network in networks))
        return [NetworkView(network=n, status=s) for n, s in zip(networks, statuses, strict=True)]

    async def status(self, tenant: str, name: str) -> NetworkStatus:
        """The network's state on this host, measured now."""
        return (await self.get(tenant, name)).status

    async def _measure(self, network: Network) -> NetworkStatus:
        tenant = (await self.tenants.find(network.tenant)).value
        try:
            return await self.context.fabric_call(tenant.name, self.context.fabric.status, tenant, network)
        except InsulaError as error:
            return NetworkStatus(ready=False, reason=error.message)

    async def create(
        self,
        tenant: str,
        name: str,
        subnet: str,
        subnet6: str | None = None,
        mtu: int = 1500,
        outbound: Outbound = "nat",
        labels: dict[str, str] | None = None,
    ) -> NetworkView:
        """Create a network and wait until it is ready. Invalid, Conflict (name, overlap); Failed changes nothing."""
        check_label("network", name)
        labels = check_labels(labels or {})
        reserved = self.context.fabric.reserved
        parsed = parse_subnet(subnet, 4, reserved=reserved)
        parsed6 = parse_subnet(subnet6, 6, reserved=reserved) if subnet6 is not None else None
        check_mtu(mtu, has_ipv6=parsed6 is not None)
        owner = await self.tenants.find(tenant)
        network = await self._commit(owner, name, parsed, parsed6, mtu, outbound, labels)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._erase, network)
            errors = await self.controller.converged(tenant)
            if error := errors.get("all") or errors.get(f"network {name}"):
                raise error
            undo.pop_all()
        return NetworkView(network=network, status=await self._measure(network))

    async def _commit(
        self,
        owner: Found[Tenant],
        name: str,
        subnet: Subnet,
        subnet6: Subnet | None,
        mtu: int,
        outbound: Outbound,
        labels: dict[str, str],
    ) -> Network:
        store, allocators, tenant = self.context.store, self.context.allocators, owner.value.name

        async def propose() -> Proposal[Network]:
            usage = await guard(store, tenant)
            rest = add(owner.value, usage.value, Usage(networks=1))
            await self._check_free(tenant, name, subnet, subnet6)
            network = Network(
                tenant=tenant,
                name=name,
                index=await allocators.of(_INDEX).random(_MAX_INDEX, "places for networks"),
                vni=await allocators.of(_VNI).lowest(FIRST_VNI, MAX_VNI, "VNIs"),
                subnet=str(subnet),
                gateway=gateway_of(subnet),
                subnet6=str(subnet6) if subnet6 else None,
                gateway6=gateway_of(subnet6) if subnet6 else None,
                mtu=mtu,
                outbound=outbound,
                labels=labels,
                created=time.time(),
            )
            compares = [
                TENANTS.unchanged(owner, tenant),
                USAGE.unchanged(usage, tenant),
                NETWORKS.absent(tenant, name),
            ]
            writes = [NETWORKS.put(network, tenant, name), USAGE.put(rest, tenant)]
            return Proposal(network, _reservations(network), compares, writes)

        def refuse(key: str, _: Network) -> None:
            if key == TENANTS.key(tenant):
                raise Conflict(f"tenant {tenant} was changed at the same time", "try again")

        async with turn(store, tenant):
            return (await allocate(store, allocators, propose, refuse)).value

    async def _check_free(self, tenant: str, name: str, subnet: Subnet, subnet6: Subnet | None) -> None:
        """Conflict if the tenant has a network of this name, or one whose addresses overlap with these subnets."""
        for other in await NETWORKS.list(self.context.store, tenant):
            if other.name == name:
                raise Conflict(f"tenant {tenant} has a network {name} already", "choose another name")
            check_disjoint(subnet, [(other.name, other.subnet)])
            if subnet6:
                check_disjoint(subnet6, [(other.name, other.subnet6)])
        await check_beyond(self.context.store, tenant, [subnet, *([subnet6] if subnet6 else [])])

    async def relabel(self, tenant: str, name: str, labels: dict[str, str]) -> None:
        """Replace the labels of a network. Invalid, NotFound."""
        check_labels(labels)

        async def attempt() -> None:
            found = await self.find(tenant, name)
            put = NETWORKS.put(msgspec.structs.replace(found.value, labels=labels), tenant, name)
            await self.context.store.transact([NETWORKS.unchanged(found, tenant, name)], [put])

        await retried(attempt)

    async def update(self, tenant: str, name: str, patch: NetworkPatch) -> NetworkView:
        """Change a network's way out, also for open connections. Invalid, NotFound; Failed changes nothing."""
        if isinstance(outbound := patch.outbound, msgspec.UnsetType):
            raise Invalid("there is nothing to change", "give --outbound nat or --outbound none")
        before = await self._set_outbound(tenant, name, outbound)
        errors = await self.controller.converged(tenant)
        if error := errors.get("all") or errors.get("tenant") or errors.get(f"network {name}"):
            await self._set_outbound(tenant, name, before)
            await self.controller.converged(tenant)
            raise error
        return await self.get(tenant, name)

    async def _set_outbound(self, tenant: str, name: str, outbound: Outbound) -> Outbound:
        """Commit it; returns what it was before."""

        async def attempt() -> Outbound:
            found = await self.find(tenant, name)
            put = NETWORKS.put(msgspec.structs.replace(found.value, outbound=outbound), tenant, name)
            await self.context.store.transact([NETWORKS.unchanged(found, tenant, name)], [put])
            return found.value.outbound

        return await retried(attempt)

    async def remove(self, tenant: str, name: str) -> None:
        """Remove a network. Conflict while instances use it or a router joins it; Denied for the default tenant's
        default network."""
        found = await self.find(tenant, name)
        if (tenant, name) == (DEFAULT, DEFAULT):
            raise Denied("network default of tenant default can't be removed", "it always exists")

        async def attempt(guard: Found[Usage]) -> None:
            instances = await INSTANCES.list(self.context.store, tenant)
            users = [each.name for each in instances if any(port.network == name for port in each.ports)]
            if users:
                raise Conflict(f"network {name} is used by {', '.join(users[:3])}", "remove these instances first")
            for router in await ROUTERS.list(self.context.store, tenant):
                if name in router.networks:
                    leave = cli_command(tenant, f"router update {router.name} --leave {name}")
                    raise Conflict(f"network {name} is joined by router {router.name}", f"{leave} takes it out")
            for balancer in await LOAD_BALANCERS.list(self.context.store, tenant):
                if any(each.network == name for each in balancer.on):
                    lb = cli_command(tenant, f"lb rm {balancer.name}")
                    raise Conflict(f"network {name} has the load balancer {balancer.name}", f"{lb} removes it")
            await refuse_if_peered(self.context.store, tenant, name)
            await self.context.store.transact(
                [NETWORKS.unchanged(found, tenant, name), USAGE.unchanged(guard, tenant)],
                [
                    NETWORKS.delete(tenant, name),
                    USAGE.put(subtract(guard.value, Usage(networks=1)), tenant),
                    *(each.delete() for each in _reservations(found.value)),
                ],
            )

        try:
            await guarded(self.context.store, tenant, attempt)
        except TransactionConflict:
            raise Conflict(f"network {name} was changed at the same time", "try again") from None
        self.ports.forget(found.value)
        await self._removed(found.value)

    async def _erase(self, network: Network) -> None:
        """Remove a network from the store after its creation has failed."""
        tenant, name = network.tenant, network.name

        async def attempt(guard: Found[Usage]) -> None:
            if await NETWORKS.get(self.context.store, tenant, name) is None:
                return
            rest = subtract(guard.value, Usage(networks=1))
            own = (each.delete() for each in _reservations(network))
            await self.context.store.transact(
                [USAGE.unchanged(guard, tenant)], [NETWORKS.delete(tenant, name), USAGE.put(rest, tenant), *own]
            )

        await guarded(self.context.store, tenant, attempt)
        await self._removed(network)

    async def _removed(self, network: Network) -> None:
        """Return when the controller has removed it from the host. If that fails, it records a problem, and the
        network's numbers stay taken until the next start."""
        errors: Errors = {}
        with contextlib.suppress(InsulaError):  # the tenant was removed, or everything is being taken down
            errors = await self.controller.converged(network.tenant)
        if "leftovers" not in errors and "all" not in errors:
            self.context.allocators.release(_reservations(network))


def check_mtu(mtu: int, *, has_ipv6: bool) -> None:
    """Raise Invalid for an MTU that IPv4, or IPv6, can't use."""
    least = MIN_MTU6 if has_ipv6 else MIN_MTU
    if not least <= mtu <= MAX_MTU:
        raise Invalid(f"an MTU of {mtu} can't be used", f"use {least} to {MAX_MTU}")


def _reservations(network: Network) -> list[Reservation]:
    owner = f"{network.tenant}/{network.name}"
    return [Reservation(_INDEX, str(network.index), owner), Reservation(_VNI, str(network.vni), owner)]
