"""Two tenants with a peering whose instances are on several hosts: a tenant has a namespace only where it has some."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec

from insula.model.policies import PortMatch
from insula.network.intent import ConsumedService, PeeringIntent, PeerPort, ProvidedService, TenantIntent
from insula.network.linux.state import addresses
from insula.network.proof.prover import Prover
from tests.support.hosts import Cloud, Host
from tests.system.network_peering.world import INDEX, LAYOUT

VNIS = {"acme": 9001, "globex": 9002}


class PeeredCloud(Cloud):
    """A cloud with a peering: `sides` has by tenant its networks in it, and the ports that the other may use."""

    def __init__(self, **others: Any) -> None:
        self.sides: dict[str, tuple[list[str], list[PortMatch]]] = {}
        super().__init__(**others)

    def intent(self, tenant: str, host: Host, **others: Any) -> TenantIntent:
        whole = super().intent(tenant, host, **others)
        if tenant not in self.sides or "peerings" in others:
            return whole
        peerings = [self.peering(tenant, other, host) for other in self.sides if other != tenant]
        return msgspec.structs.replace(whole, peerings=peerings)

    def peering(self, tenant: str, other: str, host: Host) -> PeeringIntent:
        """The peering as a tenant sees it on a host."""
        networks, allow = self.sides[tenant]
        beyond, opened = self.sides[other]
        return PeeringIntent(
            index=INDEX,
            name=f"with {other}",
            peer=self.tenants[other],
            networks=networks,
            allow=allow,
            others=[self.networks[other, name] for name in beyond],
            opened=opened,
            remotes=[
                PeerPort(addresses=addresses(each.port), host=self.places[key].address)
                for key, each in self.instances.items()
                if key[0] == other and each.port.network in beyond and self.places[key] is not host
            ],
            vni=VNIS[tenant],
            peer_vni=VNIS[other],
        )

    def has(self, tenant: str, host: Host) -> bool:
        """Whether a host has a namespace of a tenant."""
        return host.fabric.naming.namespace(tenant).exists()

    def apply(self, tenant: str, hosts: Sequence[Host] | None = None, **others: Any) -> None:
        """Apply the intents of a tenant on the hosts that need it or have it."""
        used = {self.places[key] for key in self.instances if key[0] == tenant}
        some = [host for host in self.hosts if host in used or self.has(tenant, host)]
        super().apply(tenant, some if hosts is None else hosts, **others)

    def instance(self, tenant: str, name: str, host: int, network: str = "net", number: int | None = None) -> Any:
        if not self.has(tenant, self.hosts[host - 1]):
            super().apply(tenant, [self.hosts[host - 1]])
        made = super().instance(tenant, name, host, network, number)
        for other in self.sides:
            self.apply(other)
        return made

    def peer(self, **sides: tuple[list[str], list[PortMatch]]) -> None:
        """Set the sides by tenant, and apply both; without sides end the peering."""
        tenants = {*self.sides, *sides}
        self.sides = sides
        for tenant in sorted(tenants):
            self.apply(tenant)

    def drift(self) -> list[str]:
        """All differences that the hosts report, and all that their proofs find."""
        found: list[object] = []
        for host in self.hosts:
            found += host.do(functools.partial(self._differences, host))
        return [f"{each}" for each in found]

    def drift_of(self, tenant: str, host: int) -> list[str]:
        """The differences that a host, the first of which is 1, reports of a tenant."""
        at = self.hosts[host - 1]
        return at.do(lambda: at.fabric.installed(self.tenants[tenant])).drift

    def _differences(self, host: Host) -> list[object]:
        tenants = [each for name, each in self.tenants.items() if self.has(name, host)]
        intents = [self.intent(each.name, host) for each in tenants]
        running = {port.index for intent in intents for port in intent.ports}
        drift = [text for tenant in tenants for text in host.fabric.installed(tenant).drift]
        return [*drift, *Prover(host.fabric).prove(intents, running).findings]


def spread(places: dict[str, int], **others: Any) -> PeeredCloud:
    """The tenants and networks of the layout, with those instances that have a host here."""
    cloud = PeeredCloud(**others)
    for tenant in ("acme", "globex"):
        cloud.tenant(tenant)
    for tenant, network, subnet, subnet6, name in LAYOUT:
        cloud.network(tenant, subnet, subnet6, name=network)
        if name in places:
            cloud.instance(tenant, name, places[name], network, 9)
    return cloud


def overlapping() -> PeeredCloud:
    """acme's db on host 1, globex's app on host 2 and other on host 3, all on 10.0.0.0/24 and fd00::/64."""
    cloud = PeeredCloud(count=3)
    for tenant, places in (("acme", {"db": 1}), ("globex", {"app": 2, "other": 3})):
        cloud.tenant(tenant)
        cloud.network(tenant)
        for name, host in places.items():
            cloud.instance(tenant, name, host, number=9 if name == "db" else None)
    return cloud


def serve(cloud: Cloud, at: Sequence[str], *, there: bool = True) -> None:
    """globex consumes port 80 of acme's db at these addresses; without `there` the endpoint is removed."""
    provider = cloud.places["acme", "db"]
    clients = {10 + host.number: host.address for host in cloud.hosts if host is not provider}
    target = addresses(cloud.instances["acme", "db"].port)
    common: dict[str, Any] = {"index": INDEX, "name": "services", "networks": ["net"], "routed": False}
    provided = PeeringIntent(
        **common,
        peer=cloud.tenants["globex"],
        allow=[PortMatch(protocol="tcp", port=80)],
        others=[cloud.networks["globex", "net"]],
        provides=[ProvidedService(number=3, addresses=target, protocol="tcp", port=80)] if there else [],
        clients=clients if there else {},
        vni=VNIS["acme"],
        peer_vni=VNIS["globex"],
    )
    cloud.apply("acme", peerings=[provided])
    for number, address in clients.items():
        consumed = ConsumedService(
            number=3, network="net", addresses=at, protocol="tcp", port=80, host=provider.address
        )
        consumes = PeeringIntent(
            **common,
            peer=cloud.tenants["acme"],
            others=[cloud.networks["acme", "net"]],
            consumes=[consumed] if there else [],
            client=number,
            vni=VNIS["globex"],
            peer_vni=VNIS["acme"],
        )
        cloud.apply("globex", [host for host in cloud.hosts if host.address == address], peerings=[consumes])
