"""`Intents`: builds tenants' intents, the desired state that a fabric applies, from the store and from instances."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from insula.control.context import Context
from insula.control.keys import (
    ADDRESS_GROUPS,
    ENDPOINTS,
    FLOATING_IPS,
    GUARANTEES,
    LOAD_BALANCERS,
    NETWORKS,
    OPERATOR_POLICIES,
    PEERINGS,
    POLICIES,
    ROUTERS,
    TENANTS,
)
from insula.control.networks.backends import backends_of, listeners_of
from insula.control.networks.balancer_checks import BalancerChecks
from insula.control.networks.floating_views import view_of
from insula.control.networks.shaping import floors_of, has_floors, shaping_of
from insula.model.errors import NotFound
from insula.model.guarantees import Floors, Guarantee
from insula.model.objects import Instance, Port, Tenant
from insula.model.peerings import Peering, PeeringSide
from insula.model.policies import Policy, Selector
from insula.model.service_endpoints import ServiceEndpoint
from insula.network.intent import (
    BalancerIntent,
    ConsumedService,
    FloatingIntent,
    Forward,
    OutsideIntent,
    PeeringIntent,
    PolicyIntent,
    ProvidedService,
    TenantIntent,
)
from insula.network.link import HINT, measured_link
from insula.network.reference.policy_model import matches
from insula.store.protocol import Entry
from insula.store.typed import DecodedObjects


class Intents:
    """Builder of intents. `instances` returns a tenant's instances on this host, each with whether it runs; the name of
    a running instance resolves. `seen` maps tenants to the revision of the store that their last intent was built from.
    `floors` are the CPUs and the memory that they were promised then. `balanced` are the tenants that had load
    balancers.
    """

    def __init__(
        self,
        context: Context,
        instances: Callable[[str], Iterable[tuple[Instance, bool]]],
        checks: BalancerChecks,
    ) -> None:
        self.context = context
        self.checks = checks
        self.seen: dict[str, int] = {}
        self.floors: dict[str, Floors] = {}
        self.balanced: set[str] = set()
        self._instances = instances
        self._policies = DecodedObjects(POLICIES)
        self._link: int | None = None  # the bandwidth of this host; measured again while it isn't known

    def instances(self, name: str) -> Iterable[tuple[Instance, bool]]:
        """The tenant's instances on this host, each with whether it runs."""
        return self._instances(name)

    async def build(self, name: str) -> TenantIntent | None:
        """The tenant's intent, or None if there is no such tenant. The caller holds the tenant's lock, so that of two
        intents the later one is applied last."""
        store = self.context.store
        snapshot = await store.list(NETWORKS.prefix(name))
        routers = (await store.list(ROUTERS.prefix(name))).entries
        if (found := await TENANTS.get(store, name)) is None:
            self.seen.pop(name, None)
            self.floors.pop(name, None)
            self.balanced.discard(name)
            self.checks.forget(name)
            return None
        listed = GUARANTEES.sort_out((await store.list(GUARANTEES.prefix_all())).entries)[0]
        guarantees, link = [each.value for each in listed], await self.link()
        self._report(guarantees, link)
        self.seen[name] = snapshot.revision  # instances are read after that, and may be newer
        instances = list(self._instances(name))
        here = [instance for instance, _ in instances]
        self.floors[name] = floors_of(found.value, guarantees, here)
        outside = await self._outside(found.value, instances)
        (self.balanced.add if outside.balancers else self.balanced.discard)(name)
        return TenantIntent(
            tenant=found.value,
            networks=[each.value for each in NETWORKS.sort_out(snapshot.entries)[0]],
            routers=[each.value for each in ROUTERS.sort_out(routers)[0]],
            ports=[port for instance, _ in instances for port in instance.ports],
            names={i.name: [a for port in i.plugged for a in addresses(port)] for i, runs in instances if runs},
            policy=await self._policy(found.value),
            peerings=await self._peerings(name),
            outside=outside,
            shaping=shaping_of(found.value, guarantees, here, link),
            complete=not self.context.unreadable,
        )

    async def _outside(self, tenant: Tenant, instances: Sequence[tuple[Instance, bool]]) -> OutsideIntent:
        """What the tenant offers to the outside, by its instances on this host."""
        store, here = self.context.store, [instance for instance, _ in instances]
        addresses = {each.name: each for each in await FLOATING_IPS.readable(store, tenant.name)}
        floating = [view_of(each, here) for each in addresses.values()]
        balancers = await LOAD_BALANCERS.readable(store, tenant.name)
        backends = {each.name: backends_of(each, instances) for each in balancers}
        self.checks.watch(tenant, [(each, backends[each.name]) for each in balancers])
        return OutsideIntent(
            forwards=[each for instance in here for each in _forwards(instance)],
            floating=[FloatingIntent(address=each.floating_ip.address, target=each.target) for each in floating],
            balancers=[
                BalancerIntent(
                    index=each.index,
                    listeners=list(listeners_of(each, addresses)),
                    backends=[b.end for b in backends[each.name] if b.end and self.checks.passes(each, b)],
                    affinity=each.affinity == "source",
                )
                for each in balancers
            ],
        )

    async def policy(self, name: str) -> tuple[Tenant, PolicyIntent]:
        """The tenant, and its policies with what they refer to. NotFound."""
        if (found := await TENANTS.get(self.context.store, name)) is None:
            raise NotFound(f"there is no tenant {name}", "`insula tenant ls` lists them")
        return found.value, await self._policy(found.value)

    async def _policy(self, tenant: Tenant) -> PolicyIntent:
        store, name = self.context.store, tenant.name
        prefix = POLICIES.prefix(name)
        policies, damaged = self._policies.sort_out(prefix, (await store.list(prefix)).entries)
        tiers = sorted(await OPERATOR_POLICIES.list(store), key=lambda policy: (policy.priority, policy.name))
        return PolicyIntent(
            policies=[*(each.value for each in policies), *(_in_place_of(name, entry) for entry in damaged)],
            groups=await ADDRESS_GROUPS.readable(store, name),
            labels=self.labels(name),
            operator=[policy for policy in tiers if matches(policy.tenants, tenant.labels)],
        )

    async def judging(self, name: str) -> TenantIntent:
        """The parts of the tenant's intent by which policies judge. NotFound."""
        tenant, policy = await self.policy(name)
        networks = await NETWORKS.readable(self.context.store, name)
        ports = [port for instance, _ in self._instances(name) for port in instance.ports]
        return TenantIntent(tenant=tenant, networks=networks, ports=ports, policy=policy)

    def with_several_ports(self, name: str) -> Sequence[Instance]:
        """The tenant's instances that run on this host and have several ports."""
        return [instance for instance, runs in self._instances(name) if runs and len(instance.plugged) > 1]

    def labels(self, name: str) -> Mapping[str, Mapping[str, str]]:
        """The labels of the tenant's instances on this host, by their names."""
        return {instance.name: instance.spec.labels for instance, _ in self._instances(name)}

    async def _peerings(self, name: str) -> list[PeeringIntent]:
        """The tenant's peerings that both sides agree on, with the other sides' networks and names."""
        store, found = self.context.store, list[PeeringIntent]()
        endpoints = await ENDPOINTS.readable(store, name)
        for peering in await PEERINGS.readable(store, name):
            own, side = peering.side(name), peering.side(peering.other(name))
            if own is None or side is None or (peer := await TENANTS.get(store, side.tenant)) is None:
                continue
            networks = await NETWORKS.readable(store, side.tenant)
            running = [instance for instance, runs in self._instances(side.tenant) if runs]
            reached = side.networks if peering.is_routed else []
            joined = {i.name: [port for port in i.plugged if port.network in reached] for i in running}
            consumed = [each for each in endpoints if _is_of(each, peering)]
            found.append(
                PeeringIntent(
                    index=peering.index,
                    name=f"{side.tenant}/{peering.name}",
                    peer=peer.value,
                    networks=own.networks,
                    allow=own.allow,
                    others=[network for network in networks if network.name in side.networks],
                    opened=side.allow,
                    routed=peering.is_routed,
                    consumes=[_consumed(each) for each in consumed],
                    provides=await self._provided(name, peering, own),
                    names={
                        **{each.name: _addresses_of(each) for each in consumed},
                        **{
                            name: [a for port in some for a in addresses(port)] for name, some in joined.items() if some
                        },
                    },
                )
            )
        return found

    async def _provided(self, name: str, peering: Peering, own: PeeringSide) -> list[ProvidedService]:
        """What the endpoints of the other side lead to: instances of this tenant on this host."""
        ports = {i.name: [each for each in i.plugged if each.network in own.networks] for i, _ in self._instances(name)}
        return [
            ProvidedService(
                number=each.number,
                addresses=addresses(ports[each.instance][0]),
                protocol=each.protocol,
                port=each.port,
            )
            for each in await ENDPOINTS.readable(self.context.store, peering.other(name))
            if _is_of(each, peering) and ports.get(each.instance)
        ]

    async def link(self) -> int | None:
        """The bandwidth of this host in bits a second, configured or measured; None if it isn't known."""
        if self._link is None:
            configured = self.context.settings.network.link_bits
            self._link = configured or await asyncio.to_thread(measured_link)
        return self._link

    def _report(self, guarantees: Sequence[Guarantee], link: int | None) -> None:
        """Record as a problem that floors are not in force, because the bandwidth of this host isn't known any more."""
        if link is None and has_floors(guarantees):
            what = "this host's link has no known speed, so floors of bandwidth are not in force"
            self.context.problems["guarantees"] = f"{what}: {HINT}"
        else:
            self.context.problems.solved("guarantees")


def _is_of(endpoint: ServiceEndpoint, peering: Peering) -> bool:
    return (endpoint.peer, endpoint.peering) == (peering.other(endpoint.tenant), peering.name)


def _consumed(endpoint: ServiceEndpoint) -> ConsumedService:
    return ConsumedService(
        number=endpoint.number,
        network=endpoint.network,
        addresses=_addresses_of(endpoint),
        protocol=endpoint.protocol,
        port=endpoint.port,
    )


def _addresses_of(endpoint: ServiceEndpoint) -> list[str]:
    return [each for each in (endpoint.address, endpoint.address6) if each]


def _in_place_of(tenant: str, damaged: Entry) -> Policy:
    """The policy that is enforced in place of one that can't be read: whom it selects isn't known, so that everything
    is denied until it is removed."""
    (_, name) = POLICIES.parts(damaged.key)
    return Policy(tenant=tenant, name=name, select=Selector(), directions=["in", "out"], dns=False, created=0.0)


def _forwards(instance: Instance) -> Iterable[Forward]:
    """The published ports of an instance; they lead to its first port."""
    if instance.port:
        for published in instance.spec.published:
            yield Forward(published=published, addresses=addresses(instance.port))


def addresses(port: Port) -> list[str]:
    """The addresses that an instance's name resolves to."""
    return [port.address, *([port.address6] if port.address6 else [])]
