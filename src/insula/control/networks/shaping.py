"""The bandwidth, CPUs and memory of tenants on this host, computed from their guarantees and limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from insula.model.guarantees import Floors, Guarantee, InstanceFloors, PortRates, Rate, Shaping
from insula.model.objects import Instance, Tenant


def has_floors(guarantees: Iterable[Guarantee]) -> bool:
    """Whether any tenant has a floor of bandwidth: then the packets of all tenants have to be shaped."""
    return any(each.instance is None and (each.floor_out or each.floor_in) for each in guarantees)


def kinds_of_floors(guarantees: Iterable[Guarantee]) -> tuple[bool, bool]:
    """Whether any tenant has a floor of bandwidth, and whether one has a floor of CPUs. All tenants are concerned when
    that changes: such floors hold only if the others are shaped, or weigh less."""
    every = list(guarantees)
    return has_floors(every), any(each.instance is None and each.cpus is not None for each in every)


def shaping_of(
    tenant: Tenant, guarantees: Iterable[Guarantee], instances: Iterable[Instance], link: int | None
) -> Shaping | None:
    """The bandwidth of a tenant; None if nothing of it has to be shaped. `guarantees` are those of all tenants,
    `instances` those of this tenant on this host, `link` the bandwidth of the host, if it is known."""
    every = list(guarantees)
    shared = link if has_floors(every) else None
    own = [each for each in every if each.tenant == tenant.name]
    whole = next((each for each in own if each.instance is None), None)
    out = Rate(
        floor=whole.floor_out if whole and shared else None,
        ceiling=_least(whole.ceiling_out if whole else None, tenant.limits.bandwidth),
    )
    in_ = Rate(
        floor=whole.floor_in if whole and shared else None,
        ceiling=_least(whole.ceiling_in if whole else None, tenant.limits.bandwidth),
    )
    ports = _ports({each.instance: each for each in own if each.instance is not None}, instances)
    if shared is None and out == in_ == Rate() and not ports:
        return None
    return Shaping(link=shared, out=out, in_=in_, ports=ports)


def floors_of(tenant: Tenant, guarantees: Iterable[Guarantee], instances: Iterable[Instance]) -> Floors:
    """The CPUs and the memory that a tenant is promised."""
    every = list(guarantees)
    wholes = [each for each in every if each.instance is None]
    own = next((each for each in wholes if each.tenant == tenant.name), None)
    by_instance = {each.instance: each for each in every if each.tenant == tenant.name}
    nothing = Guarantee(tenant=tenant.name, created=0.0)
    found = {instance.id: by_instance.get(instance.id, nothing) for instance in instances}
    return Floors(
        cpus=own.cpus if own else None,
        memory=own.memory if own else None,
        shared=any(each.cpus is not None for each in wholes),
        all_memory=sum(each.memory or 0 for each in wholes),
        instances={id_: InstanceFloors(cpus=each.cpus, memory=each.memory) for id_, each in found.items()},
    )


def _ports(by_instance: Mapping[str | None, Guarantee], instances: Iterable[Instance]) -> dict[int, PortRates]:
    """The rates of instances, by the index of their ports."""
    found = dict[int, PortRates]()
    for instance in instances:
        guarantee = by_instance.get(instance.id)
        if guarantee is None or guarantee.number is None:
            continue
        rates = PortRates(
            number=guarantee.number,
            out=Rate(floor=guarantee.floor_out, ceiling=guarantee.ceiling_out, packets=guarantee.packets_out),
            in_=Rate(floor=guarantee.floor_in, ceiling=guarantee.ceiling_in, packets=guarantee.packets_in),
        )
        if (rates.out, rates.in_) != (Rate(), Rate()):
            found |= {port.index: rates for port in instance.ports}
    return found


def _least(*values: int | None) -> int | None:
    return min((each for each in values if each is not None), default=None)
