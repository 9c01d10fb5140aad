"""Two tenants with a peering, on the fabric alone: acme with web and db, globex with app and spy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from insula.model.objects import Network
from insula.model.policies import PortMatch
from insula.network.intent import PeeringIntent, TenantIntent
from insula.network.linux.state import addresses
from tests.support.lab import Instance, Lab

INDEX = 7
TCP80 = PortMatch(protocol="tcp", port=80)
ICMP = PortMatch(protocol="icmp")
SHORT = 0.3
LAYOUT = [
    (tenant, network, f"10.{number}.{at}.0/24", f"fd00:{number}:{at}::/64", name)
    for number, (tenant, names) in enumerate((("acme", ("web", "db")), ("globex", ("app", "spy"))), 1)
    for at, (network, name) in enumerate(zip(("net", "back"), names, strict=True))
]
"""Tenants' networks, each with an instance: acme has web on net and db on back; globex has app on net and spy on back.
Nobody's addresses overlap."""


class PeeredLab(Lab):
    """A lab with peerings: `sides` has by tenant its networks in the peering, and the ports that the other may use."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self.sides: dict[str, tuple[list[str], list[PortMatch]]] = {}

    def intent(self, tenant: str, **others: Any) -> TenantIntent:
        whole = super().intent(tenant, **others)
        if tenant not in self.sides or "peerings" in others:
            return whole
        peerings = [self._peering(tenant, other) for other in self.sides if other != tenant]
        return msgspec.structs.replace(whole, peerings=peerings)

    def _peering(self, tenant: str, other: str) -> PeeringIntent:
        networks, allow = self.sides[tenant]
        beyond, opened = self.sides[other]
        names = {
            name: addresses(each.port)
            for (owner, name), each in self.instances.items()
            if owner == other and each.port.network in beyond
        }
        return PeeringIntent(
            index=INDEX,
            name=f"with {other}",
            peer=self.tenants[other],
            networks=networks,
            allow=allow,
            others=[self.networks[other, name] for name in beyond],
            opened=opened,
            names=names,
        )

    def peer(self, **sides: tuple[list[str], list[PortMatch]]) -> None:
        """Set the sides by tenant, and apply both; without sides end the peering."""
        tenants = {*self.sides, *sides}
        self.sides = sides
        for tenant in sorted(tenants):
            self.apply(tenant)

    def drift(self) -> list[str]:
        return [text for tenant in self.tenants.values() for text in self.fabric.installed(tenant).drift]


def two_tenants() -> PeeredLab:
    """The tenants, networks and instances of the layout."""
    cloud = PeeredLab()
    for tenant in ("acme", "globex"):
        cloud.tenant(tenant)
    for tenant, network, subnet, subnet6, name in LAYOUT:
        cloud.network(tenant, subnet, subnet6, name=network)
        cloud.instance(tenant, name, network, 9)
    return cloud


def address(instance: Instance, version: int) -> str:
    return str(instance.port.address6 if version == 6 else instance.port.address)


def only_its_ports_are_reached(
    instances: Sequence[Instance], peer: Callable[[], object], *, timeout: float = SHORT
) -> None:
    """Whether a peering of the networks net, in which acme opens ICMP and TCP port 80, and globex nothing, lets just
    these packets through. `peer` begins it; the instances are web, db, app and spy."""
    web, db, app, spy = instances
    for instance in instances:
        for port in (80, 81):
            instance.serves(f"{instance.port.instance} {port}", port)
    for version in (4, 6):
        assert not app.pings(address(web, version), timeout), "before there is a peering"
    peer()
    for version in (4, 6):
        assert app.pings(address(web, version))
        assert app.connects(address(web, version), 80) == "web 80"
        assert app.connects(address(web, version), 81, timeout) == ""
        assert web.connects(address(app, version), 80, timeout) == "", "globex allows nothing"
        assert not web.pings(address(app, version), timeout)
        for outsider in (spy, db):
            assert not outsider.pings(address(web if outsider is spy else app, version), timeout)
        assert not app.pings(address(db, version), timeout), "another network of acme"
        assert not web.pings(address(spy, version), timeout), "another network of globex"


def prefixes(network: Network) -> list[str]:
    return [network.subnet, *([network.subnet6] if network.subnet6 else [])]
