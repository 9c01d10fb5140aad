"""The reference of this suite and Insula's own model of policies were written apart. In every world they agree."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from insula.model.objects import AddressPair, Network, Port, Tenant
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.reference import policy_model
from tests.system.fabric.packets import Place, flows
from tests.system.fabric.reference import expected
from tests.system.fabric.worlds import GROUP, TenantIn, World, addresses, allowed, owned, subnet, subnet6, worlds


def intent(name: str, has: TenantIn) -> TenantIntent:
    """The intent of a tenant, with made-up numbers."""
    return TenantIntent(
        tenant=Tenant(name=name, index=1, id_base=65536, created=0.0),
        networks=[
            Network(
                tenant=name,
                name=each,
                index=number,
                vni=number,
                subnet=subnet(each),
                gateway=subnet(each).replace("0/24", "1"),
                subnet6=subnet6(each),
                gateway6=subnet6(each).replace("/64", "1"),
                created=0.0,
            )
            for number, each in enumerate(has.networks, 1)
        ],
        ports=[
            Port(
                tenant=name,
                network=instance.network,
                instance=each,
                index=number,
                mac=f"02:00:00:00:00:{number:02x}",
                address=addresses(instance)[0],
                address6=addresses(instance)[1],
                allowed_pairs=[AddressPair(address=address) for address in allowed(instance)],
            )
            for number, (each, instance) in enumerate(has.instances.items(), 1)
        ],
        policy=PolicyIntent(
            policies=has.policies,
            groups=[GROUP],
            labels={each: instance.labels for each, instance in has.instances.items()},
        ),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_both_allow_the_same(world: World) -> None:
    tried = list(flows(owned(world)))
    arriving = {arrival.flow for arrival in expected(world, tried)}
    for tenant, has in world.items():
        whole = intent(tenant, has)
        at = owned(world)
        where = {address: each for name, each in has.instances.items() for address in at[Place(tenant, name)]}
        for flow in tried:
            if flow.source.tenant != tenant or flow.to_address not in where:
                continue
            one, other = where[flow.from_address].network, where[flow.to_address].network
            joined = one == other or any({one, other} <= router for router in has.routers)
            permitted = policy_model.permits(whole, flow.from_address, flow.to_address, flow.protocol, flow.port)
            assert (joined and permitted) == (flow in arriving), flow
