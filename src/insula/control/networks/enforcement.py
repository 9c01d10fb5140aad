"""`Enforcement`: brings policies from the store into force on this host, for open connections too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from insula.control.context import Context
from insula.control.networks.controller import NetworkController
from insula.control.networks.intents import Intents
from insula.model.errors import InsulaError, NotFound


class Enforcement:
    def __init__(self, context: Context, controller: NetworkController, intents: Intents) -> None:
        self.context = context
        self.controller = controller
        self.intents = intents

    async def enforced(self, tenant: str, undo: Callable[[], Awaitable[object]] | None = None) -> None:
        """Return when the tenant's policies, groups and labels, as they are now, are in force on this host.

        If that fails, `undo` takes the change back in the store; then what was in force before is again.
        """
        self.controller.changed(tenant)
        try:
            await asyncio.shield(asyncio.ensure_future(self._enforce(tenant)))
        except BaseException:
            if undo:
                with contextlib.suppress(InsulaError):  # it was removed meanwhile
                    await undo()
                self.controller.nudge(tenant)
            raise

    async def _enforce(self, name: str) -> None:
        """Change the policies alone, which takes less than to compare everything; if they can't be, compare it."""
        self.context.refuse_if_going_down()
        async with self.context.turn(name):
            tenant, policy = await self.intents.policy(name)
            try:
                await asyncio.to_thread(self.context.fabric.enforce, tenant, policy)
                return
            except NotFound:  # the tenant's namespace is not there yet
                pass
        errors = await self.controller.converged(name)
        if error := errors.get("all") or errors.get("tenant"):
            raise error
