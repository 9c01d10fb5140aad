"""/v1/tenants/{tenant}/trace: whether a packet between two ends passes, and why or why not."""

from __future__ import annotations

from litestar import Controller, get

from insula.api.parameters import Flag, Plane, TenantName, TraceEndName, TraceService
from insula.model.tracing import TraceView


class TraceRoutes(Controller):
    path = "/tenants/{tenant:str}/trace"
    tags = ("networks",)

    @get(summary="Whether one end reaches another, by the installed rules, and why", permission="network.read")
    async def trace(
        self,
        plane: Plane,
        tenant: TenantName,
        source: TraceEndName,
        target: TraceEndName,
        service: TraceService = "icmp",
        rules: Flag = False,
        live: Flag = False,
    ) -> TraceView:
        """With `rules` the installed rules that decided are told, with `live` a packet is sent, too."""
        return await plane.tracer.trace(tenant, source, target, service, rules=rules, send=live)
