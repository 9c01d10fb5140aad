"""Another name for an instance, which may run meanwhile.

The name is part of keys in the store (the instance, its status, its last event) and of what its addresses are claimed
for. All of that changes in one transaction, so a crash leaves the instance under one of the two names. The container
and its files go by the instance's id and stay as they are.
"""

from __future__ import annotations

import contextlib

import msgspec

from insula.control.context import Context
from insula.control.instances.checks import Known, as_it_is
from insula.control.instances.controller import InstanceController
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.specs import typed
from insula.control.instances.statuses import SETTLED
from insula.control.keys import EVENTS, INSTANCES, STATUS
from insula.control.networks.ports import port_reservations
from insula.model.errors import Conflict
from insula.model.objects import Instance
from insula.model.units import check_label
from insula.store.protocol import Compare, TransactionConflict, Write
from insula.store.typed import Found


async def rename(controller: InstanceController, known: Known, *, name: str) -> Found[Instance]:
    """Commit that the instance has the name `name`. Invalid, Conflict: then nothing was changed."""
    context, tenant, old = controller.context, known.instance.tenant, known.instance.name
    await _check(context, known.instance, name)
    if (managed := controller.managed.find(tenant, old)) is None:
        return await _commit(context, known, name)
    async with managed.lock:  # nothing of it is done under its old name meanwhile
        await controller.statuses.saved(managed)
        found = await _commit(context, known._replace(status=managed.status), name)
        controller.committed(*found)
        await _follow(controller, managed, old)
    return found


async def _check(context: Context, instance: Instance, name: str) -> None:
    tenant, old = instance.tenant, instance.name
    check_label("instance", name)
    if await context.store.get(INSTANCES.key(tenant, name)):
        raise Conflict(f"tenant {tenant} has an instance {name} already", "choose another name")
    others = await INSTANCES.readable(context.store, tenant)
    if joined := [other.name for other in others if other.spec.options.pid_of == old]:
        hint = f"{typed(tenant, f'rm -f {joined[0]}')} removes it"
        raise Conflict(f"instance {joined[0]} shares the processes of {old}, by that name", hint)


async def _commit(context: Context, known: Known, name: str) -> Found[Instance]:
    before, tenant, old = as_it_is(known), known.instance.tenant, known.instance.name
    after = msgspec.structs.replace(
        before,
        name=name,
        spec=msgspec.structs.replace(before.spec, name=name),
        ports=[msgspec.structs.replace(port, instance=name) for port in before.ports],
        generation=before.generation + 1,
    )
    writes: list[Write] = [
        *(space.delete(tenant, old) for space in (INSTANCES, STATUS, EVENTS)),
        INSTANCES.put(after, tenant, name),
        *(reservation.put() for port in after.ports for reservation in port_reservations(port)),
    ]
    if known.status.state in SETTLED:
        writes.append(STATUS.put(known.status, tenant, name))
    compares = [Compare(INSTANCES.key(tenant, old), known.revision), INSTANCES.absent(tenant, name)]
    try:
        return Found(after, await context.store.transact(compares, writes))
    except TransactionConflict as conflict:
        if conflict.key == INSTANCES.key(tenant, name):
            raise Conflict(f"tenant {tenant} has an instance {name} already", "choose another name") from None
        raise


async def _follow(controller: InstanceController, managed: ManagedInstance, old: str) -> None:
    """What goes by the name elsewhere."""
    context, tenant = controller.context, managed.instance.tenant
    await controller.statuses.saved(managed)
    with contextlib.suppress(TransactionConflict):  # a status that was being written under the old name meanwhile
        await context.store.transact([INSTANCES.absent(tenant, old)], [STATUS.delete(tenant, old)])
    context.problems.solved(f"instance {tenant}/{old}")  # told again under the new name
    controller.recorder.record(managed, "renamed", before=old)
    if managed.instance.port and managed.active:
        await controller.lifecycle.ports.networks.converged(tenant)
