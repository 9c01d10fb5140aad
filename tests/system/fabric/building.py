"""Build a world on a fabric."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from insula.model.routers import Router
from insula.network.intent import PolicyIntent
from insula.network.proof import Proof, Prover
from tests.support.lab import Instance, Lab
from tests.system.fabric.packets import Place
from tests.system.fabric.worlds import GROUP, World, subnet, subnet6


class Built:
    """A world on a fabric. `change` makes another one of it, with the same networks and instances."""

    def __init__(self, lab: Lab, world: World) -> None:
        self.lab = lab
        self.instances: dict[Place, Instance] = {}
        for tenant, has in world.items():
            lab.tenant(tenant)
            for network in has.networks:
                lab.network(tenant, subnet(network), subnet6(network), name=network)
        self._declare(world)
        for tenant, has in world.items():
            for name, instance in has.instances.items():
                self.instances[Place(tenant, name)] = lab.instance(tenant, name, instance.network, host=instance.host)
            lab.apply(tenant)

    def change(self, world: World) -> None:
        """Apply routers, labels and policies of another world."""
        self._declare(world)
        for tenant in world:
            self.lab.apply(tenant)

    def prove(self) -> Proof:
        """Have Insula interpret what is installed, and compare it with the tenants' intents."""
        intents = [self.lab.intent(tenant) for tenant in self.lab.tenants]
        return Prover(self.lab.fabric).prove(intents, {each.port.index for each in self.instances.values()})

    def _declare(self, world: World) -> None:
        for tenant, has in world.items():
            self.lab.others[tenant] = {
                "routers": [
                    Router(tenant=tenant, name=f"r{number}", networks=sorted(joined), created=0.0)
                    for number, joined in enumerate(has.routers)
                ],
                "policy": PolicyIntent(
                    policies=has.policies,
                    groups=[msgspec.structs.replace(GROUP, tenant=tenant)],
                    labels={name: instance.labels for name, instance in has.instances.items()},
                ),
            }


@contextlib.contextmanager
def built(world: World) -> Iterator[Built]:
    """The world, on a fabric of its own, which is taken down at the end."""
    lab = Lab()
    try:
        cloud = Built(lab, world)
        yield cloud
    finally:
        for instance in lab.instances.values():
            instance.remove()
        lab.fabric.teardown()
