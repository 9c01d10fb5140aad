"""What may be changed of an instance while it runs: its limits, and whether it runs on or is paused.

Limits are wanted state: committed first, with the tenant's quota asked in the same transaction, then written into the
control group. If the kernel refuses them (memory below what is used, say), both are taken back. The status has what is
in force, so a daemon that was killed between the two finds the difference at its next start and writes them then.

Paused is not wanted state but measured: it is so while the control group is frozen, whoever froze it, also when the
daemon is started again. A paused instance ends by a signal that would end it as well as when it runs, and goes on for
that; what would have to run inside is refused.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from insula.control.instances.admission import resize
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.specs import typed
from insula.control.instances.supervisor import Supervisor
from insula.control.quotas import check_resources, merge
from insula.model.errors import Conflict, InsulaError, NotFound
from insula.model.views import ResourcesPatch
from insula.store.typed import Found

log = logging.getLogger("insula.control")


async def update(supervisor: Supervisor, member: ManagedInstance, patch: ResourcesPatch) -> None:
    """Other limits from now on. The lock is held. Invalid, QuotaExceeded, Failed: then nothing was changed."""
    before = member.instance.spec.resources
    resources = check_resources(merge(before, patch))
    found = await resize(supervisor.context, Found(member.instance, member.revision), resources)
    member.instance, member.revision = found
    try:
        await enforce(supervisor, member)
    except BaseException:
        found = await resize(supervisor.context, Found(member.instance, member.revision), before, undo=True)
        member.instance, member.revision = found
        await _enforce_or_tell(supervisor, member)
        raise


async def enforce(supervisor: Supervisor, member: ManagedInstance) -> None:
    """Writes the wanted limits into the control group of an instance that runs. Failed when the kernel refuses them."""
    resources = member.instance.spec.resources
    if not member.active or member.status.resources == resources:
        return
    supervisor.note(member, resources=None)  # some of them are in force, if this goes wrong
    try:
        await supervisor.driver(member).resize(member.instance.id, resources)
    except NotFound:  # it is just ending
        return
    if member.active:
        supervisor.note(member, resources=resources)


async def repair(supervisor: Supervisor, member: ManagedInstance) -> None:
    """Writes limits that were committed and not enforced."""
    async with member.lock:
        await _enforce_or_tell(supervisor, member)


async def _enforce_or_tell(supervisor: Supervisor, member: ManagedInstance) -> None:
    """What can't be written is a problem of this host."""
    name = f"limits of instance {'/'.join(member.key)}"
    try:
        await enforce(supervisor, member)
        supervisor.context.problems.solved(name)
    except InsulaError as error:
        supervisor.context.problems[name] = str(error)


async def pause(supervisor: Supervisor, member: ManagedInstance) -> None:
    """Freezes it. The lock is held. Conflict unless it runs."""
    tenant, name = member.key
    if member.status.state == "paused":
        raise Conflict(f"instance {name} is paused already", f"{typed(tenant, f'unpause {name}')} lets it go on")
    check_running(member)
    with suppress(NotFound):  # it is just ending
        await supervisor.driver(member).pause(member.instance.id)
    check_running(member)
    supervisor.note(member, state="paused")


async def unpause(supervisor: Supervisor, member: ManagedInstance) -> None:
    """Lets it go on. The lock is held. Conflict unless it is paused."""
    if member.status.state != "paused":
        raise Conflict(f"instance {member.instance.name} is not paused ({member.status.state})", "there is no need to")
    await supervisor.driver(member).resume(member.instance.id)
    if member.status.state == "paused":
        supervisor.note(member, state="running")


def check_running(member: ManagedInstance) -> None:
    """Conflict unless something can be done inside: it runs, and is not paused."""
    if member.status.state == "paused":
        tenant, name = member.key
        raise Conflict(f"instance {name} is paused", f"{typed(tenant, f'unpause {name}')} lets it go on")
    if member.status.state != "running":
        raise not_running(member)


def not_running(member: ManagedInstance) -> Conflict:
    tenant, name = member.key
    hint = f"{typed(tenant, f'start {name}')} starts it"
    return Conflict(f"instance {name} is not running ({member.status.state})", hint)
