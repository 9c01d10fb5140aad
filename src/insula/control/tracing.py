"""`insula trace`: follows a packet of a tenant through the installed state of this host, and explains its fate."""

from __future__ import annotations

import asyncio

import msgspec

from insula.control.context import Context
from insula.control.instances.managed import ManagedInstances
from insula.control.networks.intents import Intents
from insula.model.errors import NotFound
from insula.model.tracing import TraceView
from insula.network.tracing.trace import live, parse, trace

_PLUGGED = ("running", "paused", "stopping")


class Tracer:
    def __init__(self, context: Context, intents: Intents, managed: ManagedInstances) -> None:
        self.context = context
        self.intents = intents
        self.managed = managed

    async def trace(
        self, tenant: str, source: str, target: str, service: str, *, rules: bool = False, send: bool = False
    ) -> TraceView:
        """Tell whether and why `source` reaches `target`. With `send` the packet is sent, too. NotFound, Invalid."""
        context = self.context
        await context.prepared(tenant)
        async with context.locks[tenant]:
            if (intent := await self.intents.build(tenant)) is None:
                raise NotFound(f"there is no tenant {tenant}", "`insula tenant ls` lists them")
            instances = [m for m in self.managed.of(tenant) if m.status.state in _PLUGGED]
            ports = [port for m in instances for port in m.instance.plugged]
            asked = parse(intent, source, target, service)
            running = {port.index for port in ports}
            found = await asyncio.to_thread(trace, context.fabric, intent, asked, running, rules=rules)
            if send:
                seen = await asyncio.to_thread(live, context.fabric, intent, asked, ports)
                found = msgspec.structs.replace(found, seen=seen)
            return found
