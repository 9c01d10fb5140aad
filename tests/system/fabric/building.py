"""Build a world on a fabric."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import msgspec

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.model.objects import AddressPair
from insula.model.routers import Router
from insula.network.intent import PolicyIntent
from insula.network.proof.prover import Proof, Prover
from tests.support.lab import Instance, Lab
from tests.support.taps import TapInstance
from tests.system.fabric.packets import Place
from tests.system.fabric.worlds import GROUP, World, allowed, subnet, subnet6, taken


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
                pairs = [AddressPair(address=address) for address in allowed(instance)]
                kind = TapInstance if instance.machine else Instance
                made = lab.instance(tenant, name, instance.network, host=instance.host, pairs=pairs, kind=kind)
                self.instances[Place(tenant, name)] = made
                made.do(functools.partial(_take, taken(has)[name]))
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


def _take(addresses: Sequence[str]) -> None:
    """Add addresses to the instance's device. Runs in its namespace."""
    with Rtnl() as inside:
        index = inside.index("eth0")
        assert index
        for each in addresses:
            inside.execute(netlink.add_address(index, f"{each}/{64 if ':' in each else 24}"))


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
