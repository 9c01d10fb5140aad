"""The queues of guarantees that a packet passes, in the tenant's words, as they are installed."""

from __future__ import annotations

from collections.abc import Iterator

from insula.model.objects import Tenant
from insula.model.policies import Direction
from insula.model.units import format_rate
from insula.network.endpoints import port_name
from insula.network.fabric import Fabric, Queue
from insula.network.tracing.ends import TraceEnd


def queues_of(
    fabric: Fabric, tenant: Tenant, source: TraceEnd, target: TraceEnd, *, outside: bool
) -> Iterator[tuple[str, str]]:
    """Yield a sentence for each queue with a floor or a ceiling, and the queue's name, in the order of the packet's
    way. `outside`: it leaves the tenant, or comes from there."""
    ends: tuple[tuple[TraceEnd, Direction], ...] = ((source, "out"), (target, "in"))
    for end, direction in ends:
        if end.port is not None:
            for queue in fabric.queues(tenant, end.port, direction, outside=outside):
                if queue.floor is not None or queue.ceiling is not None:
                    yield _sentence(queue, port_name(end.port), tenant.name, direction), queue.name


def _sentence(queue: Queue, instance: str, tenant: str, direction: Direction) -> str:
    rates = (("a floor", queue.floor), ("a ceiling", queue.ceiling))
    has = " and ".join(f"{what} of {format_rate(rate)}" for what, rate in rates if rate is not None)
    if queue.of == "port":
        return f"it waits with all that {instance} {'sends' if direction == 'out' else 'receives'}, which has {has}"
    way = "to the outside" if direction == "out" else "from the outside"
    if queue.of == "instance":
        return f"it waits with the packets of {instance} {way}, which have {has}"
    return f"it waits with the packets of tenant {tenant} {way}, which have {has}"
