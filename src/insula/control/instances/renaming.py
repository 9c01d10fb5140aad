"""Another name for an instance, which may run meanwhile.

The name is part of keys in the store (the instance, its status, its last event) and of what its addresses are claimed
for. All of that changes in one transaction, so a crash leaves the instance under one of the two names. The container
and its files go by the instance's id and stay as they are.
"""

from __future__ import annotations

import contextlib

import msgspec

from insula.control import claims
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.specs import typed
from insula.control.instances.supervisor import SETTLED, Supervisor
from insula.control.keys import EVENTS, INSTANCES, STATUS
from insula.control.networks.ports import port_claims
from insula.model.errors import Conflict
from insula.model.units import check_label
from insula.store.protocol import Compare, TransactionConflict, Write


async def rename(supervisor: Supervisor, member: ManagedInstance, name: str) -> None:
    """Gives the instance the name `name`. The lock is held. Invalid, Conflict: then nothing was changed."""
    tenant, old = member.key
    check_label("instance", name)
    if supervisor.find(tenant, name):
        raise Conflict(f"tenant {tenant} has an instance {name} already", "choose another name")
    if joined := [m.instance.name for m in supervisor.of(tenant) if m.instance.spec.options.pid_of == old]:
        hint = f"{typed(tenant, f'rm -f {joined[0]}')} removes it"
        raise Conflict(f"instance {joined[0]} shares the processes of {old}, by that name", hint)
    await supervisor.saved(member)
    before = member.instance
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
        *(write for port in after.ports for write in claims.take(port_claims(port))[1]),
    ]
    if member.status.state in SETTLED:
        writes.append(STATUS.put(member.status, tenant, name))
    store = supervisor.context.store
    compares = [Compare(INSTANCES.key(tenant, old), member.revision), INSTANCES.absent(tenant, name)]
    try:
        revision = await store.transact(compares, writes)
    except TransactionConflict as conflict:
        if conflict.key == INSTANCES.key(tenant, name):
            raise Conflict(f"tenant {tenant} has an instance {name} already", "choose another name") from None
        raise Conflict(f"instance {old} was changed at the same time", "try again") from None
    supervisor.members.pop((tenant, old), None)
    member.instance, member.revision = after, revision
    supervisor.add(member)
    await supervisor.saved(member)
    with contextlib.suppress(TransactionConflict):  # a status that was being written under the old name meanwhile
        await store.transact([INSTANCES.absent(tenant, old)], [STATUS.delete(tenant, old)])
    supervisor.context.problems.solved(f"limits of instance {tenant}/{old}")  # told again under the new name
    supervisor.recorder.record(member, "renamed", before=old)
    if after.port and member.active:
        await supervisor.update_names(member.tenant)
