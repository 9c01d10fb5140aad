"""Instances of other hosts. Verbs here commit their desired state; the daemon of their host acts on it."""

from __future__ import annotations

from insula.control.instances.managed import restarting
from insula.control.instances.statuses import error_of
from insula.control.keys import INSTANCES, STATUS
from insula.model.errors import NotFound, Unavailable
from insula.model.objects import Instance, InstanceStatus
from insula.model.views import InstanceView
from insula.store.protocol import Store


async def converged(store: Store, instance: Instance, revision: int) -> InstanceStatus | None:
    """Wait until the desired state that was committed at `revision` is observed, and return the status; None if the
    instance was removed. Raises why it failed; Unavailable."""
    wanted, measured = (kind.key(instance.tenant, instance.name) for kind in (INSTANCES, STATUS))
    async for event in store.watch("/", revision):
        if event.entry.key == wanted and event.kind == "delete":
            return None
        if event.entry.key != measured or event.kind == "delete":
            continue
        status = STATUS.decode(event.entry)
        if status.observed_generation >= instance.generation:
            if status.error and (status.state != "failed" or instance.wanted == "running"):
                raise error_of(status)
            return status
    raise Unavailable(f"the state of instance {instance.name} is unknown", "try again")


async def ended(store: Store, instance: Instance) -> InstanceStatus:
    """Wait until it has ended, and return its status. NotFound if it is removed before."""
    wanted, measured = (kind.key(instance.tenant, instance.name) for kind in (INSTANCES, STATUS))
    snapshot = await store.list(measured)
    for entry in snapshot.entries:
        if entry.key == measured and (status := STATUS.decode(entry)).state in ("exited", "failed"):
            return status
    async for event in store.watch("/", snapshot.revision):
        if event.kind == "delete" and event.entry.key == wanted:
            break
        if event.kind == "put" and event.entry.key == measured:
            status = STATUS.decode(event.entry)
            if status.state in ("exited", "failed"):
                return status
    raise NotFound(f"instance {instance.name} was removed", None)


def view(instance: Instance, status: InstanceStatus) -> InstanceView:
    return InstanceView(instance=instance, status=status, restarting=restarting(instance, status))


def elsewhere(instance: Instance) -> Unavailable:
    """The error of a request that only the daemon of the instance's host can serve."""
    return Unavailable(f"instance {instance.name} is on host {instance.host}", "ask insulad there")
