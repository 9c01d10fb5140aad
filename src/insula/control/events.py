"""`insula events`: the store's history as events of tenants, networks, routers, images and instances.

An event is a dict: `time` (seconds since the epoch), `revision` (of the store; a client resumes after it), `kind`
("instance", …), `action` ("created", "running", "exited", "removed", …), `tenant`, `name`, and details that depend on
the action.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from insula.control.context import Context
from insula.control.keys import (
    ADDRESS_GROUPS,
    ENDPOINTS,
    EVENTS,
    FLOATING_IPS,
    IMAGES,
    INSTANCES,
    LOAD_BALANCERS,
    NETWORKS,
    PEERINGS,
    POLICIES,
    ROUTERS,
    SHARED,
    SNAPSHOTS,
    STATUS,
    TENANTS,
)
from insula.model.errors import Failed, Invalid
from insula.model.objects import InstanceStatus
from insula.store.protocol import Event
from insula.store.typed import Keyspace

log = logging.getLogger("insula.control")
_TURN = 1 << 18  # bytes of records that are decoded before other tasks may run
_EACH = 1 << 10  # bytes that an event counts in addition to its records
EventDict = dict[str, Any]


class Events:
    def __init__(self, context: Context) -> None:
        self.context = context

    async def watch(
        self, from_revision: int | None = None, sees: Callable[[EventDict], bool] = lambda _: True
    ) -> AsyncIterator[EventDict]:
        """Every event after that revision that `sees` allows, without end; None is from now on. Invalid; Conflict if
        the store no longer has that revision."""
        store = self.context.store
        if from_revision is None:
            from_revision = (await store.list("/nothing/")).revision
        elif from_revision < 0:
            raise Invalid(f"{from_revision} is not a revision", "use the revision of an event")
        decoded = 0
        async for event in store.watch("/", from_revision):
            decoded += _EACH + len(event.entry.value) + (len(event.previous.value) if event.previous else 0)
            if decoded > _TURN:
                await asyncio.sleep(0)
                decoded = 0
            try:
                found = render(event)
            except Failed as error:  # a damaged record; the next one may be whole
                log.error("an event can't be told: %s", error)
                continue
            if found and sees(found):
                yield found


def render(event: Event) -> EventDict | None:
    """The event as a dict; None for a change that is no event, as of a reservation or of usage."""
    root = "/" + event.entry.key.split("/", 2)[1]
    renderer = _RENDERERS.get(root)
    details = renderer(event) if renderer else None
    if details is None:
        return None
    moment = details.pop("time", None) or time.time()
    return {"time": moment, "revision": event.revision, **details}


def _named(keyspace: Keyspace[Any], kind: str, event: Event) -> EventDict:
    """The event of an object that was created, changed or removed."""
    parts = keyspace.parts(event.entry.key)
    tenant = parts[0] if parts[0] != SHARED else None
    action = "removed" if event.kind == "delete" else "changed" if event.previous else "created"
    return {"kind": kind, "action": action, "tenant": tenant, "name": parts[-1]}


def _tenant(event: Event) -> EventDict:
    return _named(TENANTS, "tenant", event)


def _network(event: Event) -> EventDict:
    return _named(NETWORKS, "network", event)


def _policy(event: Event) -> EventDict:
    return _named(POLICIES, "policy", event)


def _address_group(event: Event) -> EventDict:
    return _named(ADDRESS_GROUPS, "address-group", event)


def _router(event: Event) -> EventDict:
    return _named(ROUTERS, "router", event)


def _peering(event: Event) -> EventDict:
    _, other, _ = PEERINGS.parts(event.entry.key)
    return {**_named(PEERINGS, "peering", event), "peer": other}


def _endpoint(event: Event) -> EventDict:
    return _named(ENDPOINTS, "endpoint", event)


def _floating_ip(event: Event) -> EventDict:
    return _named(FLOATING_IPS, "floating-ip", event)


def _load_balancer(event: Event) -> EventDict:
    return _named(LOAD_BALANCERS, "load-balancer", event)


def _snapshot(event: Event) -> EventDict | None:
    """A snapshot is made when it is complete."""
    found = {**_named(SNAPSHOTS, "snapshot", event), "instance": SNAPSHOTS.parts(event.entry.key)[1]}
    if event.kind == "delete":
        made = event.previous and SNAPSHOTS.decode(event.previous).state == "ready"
        return found if made else None
    snapshot = SNAPSHOTS.decode(event.entry)
    if snapshot.state != "ready":
        return None
    return {**found, "action": "created", "memory": snapshot.memory, "size": snapshot.size}


def _image(event: Event) -> EventDict:
    return _named(IMAGES, "image", event)


def _instance(event: Event) -> EventDict | None:
    found = _named(INSTANCES, "instance", event)
    if event.kind == "delete":
        return found
    instance = INSTANCES.decode(event.entry)
    if event.previous is None:
        return {**found, "time": instance.created, "id": instance.id, "image": instance.spec.image}
    before = INSTANCES.decode(event.previous)
    if before.spec.resources != instance.spec.resources:
        return {**found, "action": "update", "id": instance.id, **msgspec.to_builtins(instance.spec.resources)}
    if before.starts != instance.starts:
        return {**found, "action": "start", "id": instance.id}
    if before.wanted == instance.wanted or instance.wanted not in ("stopped", "removed"):
        return None  # for pause and unpause the status makes the event
    return {**found, "action": {"stopped": "stop", "removed": "remove"}[instance.wanted], "id": instance.id}


def _status(event: Event) -> EventDict | None:
    if event.kind == "delete":
        return None
    status = STATUS.decode(event.entry)
    before = STATUS.decode(event.previous) if event.previous else None
    if before and _event_fields(before) == _event_fields(status):  # another field changed
        return None
    found = {**_named(STATUS, "instance", event), "action": status.state}
    if status.state == "paused":
        return found
    if before and before.state == "paused" and status.state == "running":
        return {**found, "action": "unpaused"}
    if status.state == "running":
        return {**found, "time": status.started, "pid": status.pid, "restarts": status.restarts}
    if status.exit:
        ended = status.exit
        how = {"exit_status": ended.exit_status, "signal": ended.signal, "oom": ended.oom}
        return {**found, "time": ended.finished, **how}
    return {**found, "error": status.error}


def _event_fields(status: InstanceStatus) -> tuple[object, ...]:
    """The fields of a status whose change is an event."""
    return status.state, status.starts, status.restarts, status.pid, status.exit, status.error


def _recorded(event: Event) -> EventDict | None:
    if event.kind == "delete":
        return None
    recorded = EVENTS.decode(event.entry)
    return {**recorded.details, **_named(EVENTS, "instance", event), "action": recorded.action, "time": recorded.time}


_RENDERERS = {
    TENANTS.root: _tenant,
    NETWORKS.root: _network,
    ROUTERS.root: _router,
    POLICIES.root: _policy,
    ADDRESS_GROUPS.root: _address_group,
    PEERINGS.root: _peering,
    ENDPOINTS.root: _endpoint,
    FLOATING_IPS.root: _floating_ip,
    LOAD_BALANCERS.root: _load_balancer,
    IMAGES.root: _image,
    INSTANCES.root: _instance,
    STATUS.root: _status,
    EVENTS.root: _recorded,
    SNAPSHOTS.root: _snapshot,
}
