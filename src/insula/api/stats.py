"""/v1/stats, and below tenants and instances: the usage of instances, as JSON lines, each a `StatsSample`."""

from __future__ import annotations

from litestar import get
from litestar.openapi.datastructures import ResponseSpec
from litestar.response import Stream

from insula.api.parameters import AnyRequest, Interval, Name, Names, Plane, Sender, TenantName
from insula.api.server_sent import lines_or_events
from insula.api.streams import NDJSON, primed
from insula.model.views import StatsSample

_ANSWER = {200: ResponseSpec(StatsSample, generate_examples=False, description="lines of JSON", media_type=NDJSON)}


@get(
    "/stats",
    tags=["host"],
    summary="The usage of the instances of all tenants that one may see",
    responses=_ANSWER,
    server_sent=True,
    permission="self.read",
    quota="streams",
)
async def all_stats(plane: Plane, sender: Sender, request: AnyRequest, interval: Interval = None) -> Stream:
    among = None if sender.sees_host else [*sender.tenants]
    samples = plane.stats.of(None, interval=interval, among=among, labels=sender.labels)
    return lines_or_events(request, await primed(samples), sender)


@get(
    "/tenants/{tenant:str}/stats",
    tags=["tenants"],
    summary="The usage of a tenant's instances",
    responses=_ANSWER,
    server_sent=True,
    permission="instance.read",
    quota="streams",
)
async def tenant_stats(
    plane: Plane,
    tenant: TenantName,
    sender: Sender,
    request: AnyRequest,
    names: Names = None,
    interval: Interval = None,
) -> Stream:
    samples = plane.stats.of(tenant, names or (), interval=interval, labels=sender.labels)
    return lines_or_events(request, await primed(samples), sender)


@get(
    "/tenants/{tenant:str}/instances/{name:str}/stats",
    tags=["instances"],
    summary="Its usage",
    responses=_ANSWER,
    server_sent=True,
    permission="instance.read",
    quota="streams",
)
async def instance_stats(
    plane: Plane, tenant: TenantName, name: Name, sender: Sender, request: AnyRequest, interval: Interval = None
) -> Stream:
    return lines_or_events(request, await primed(plane.stats.of(tenant, [name], interval=interval)), sender)


STATS = (all_stats, tenant_stats, instance_stats)
