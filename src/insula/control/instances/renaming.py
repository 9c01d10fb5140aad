"""`rename`: gives an instance another name, while it runs or not.

The name is part of keys in the store (the instance, its status, its last event), and of the values of its reservations.
All of these change in one transaction, so a crash leaves the instance under one of the two names. The container and
its files are named by the instance's id and stay as they are.
"""

from __future__ import annotations

import contextlib

import msgspec

from insula.control.context import Context
from insula.control.instances.checks import Known, as_it_is
from insula.control.instances.controller import InstanceController
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.specs import cli_command
from insula.control.instances.statuses import SETTLED
from insula.control.keys import EVENTS, INSTANCES, STATUS
from insula.control.networks.ports import port_reservations
from insula.model.errors import Conflict
from insula.model.objects import Instance
from insula.model.units import check_label
from insula.store.protocol import Compare, TransactionConflict, Write
from insula.store.typed import Found


async def rename(controller: InstanceController, known: Known, *, name: str) -> Found[Instance]:
    """Commit the new name of an instance. Invalid, Conflict; after an error nothing has changed."""
    context, tenant, old = controller.context, known.instance.tenant, known.instance.name
    await _check(context, known.instance, name)
    if (managed := controller.managed.find(tenant, old)) is None:
        return await _commit(context, known, name)
    async with managed.lock:  # the controller does nothing under its old name meanwhile
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
        hint = f"{cli_command(tenant, f'rm -f {joined[0]}')} removes it"
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
    """Update everything else that has the name: status, problems, events, and names in the network."""
    context, tenant = controller.context, managed.instance.tenant
    await controller.statuses.saved(managed)
    with contextlib.suppress(TransactionConflict):  # a status may have been written under the old name meanwhile
        await context.store.transact([INSTANCES.absent(tenant, old)], [STATUS.delete(tenant, old)])
    context.problems.solved(f"instance {tenant}/{old}")  # it is reported again under the new name
    controller.recorder.record(managed, "renamed", before=old)
    if managed.instance.ports and managed.active:
        await controller.lifecycle.ports.networks.converged(tenant)
