"""`ManagedInstance`: one instance in the memory of the daemon of its host, as it is wanted and as it was measured."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from insula.model.objects import Exit, Instance, InstanceStatus, Tenant

if TYPE_CHECKING:
    from insula.control.instances.attachment import Attachment
    from insula.control.instances.health import Monitor
    from insula.control.instances.memory import Watch


class ManagedInstance:
    """One instance. `revision` is that of its entry in the store; `ended` tells the end of the current start."""

    def __init__(self, tenant: Tenant, instance: Instance, status: InstanceStatus, revision: int) -> None:
        self.tenant = tenant
        self.instance = instance
        self.status = status
        self.revision = revision
        self.lock = asyncio.Lock()
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.waiting: set[Attachment] = set()  # attached before it was launched
        self.watching: asyncio.Task[None] | None = None
        self.restarting: asyncio.Task[None] | None = None
        self.saving: asyncio.Task[None] | None = None
        self.unsaved = False
        self.tidy = False  # whether nothing is left of its last start
        self.vanished = asyncio.Event()  # of one that is removed when it ends
        self.execs: dict[str, asyncio.Task[Exit]] = {}  # the ends of other processes in it
        self.gone = False
        self.reconciled = asyncio.Event()  # whether it was looked at since the daemon started
        self.reconciled.set()
        self.monitor: Monitor | None = None  # of its health, while it runs
        self.memory: Watch | None = None  # for want of it, while it runs

    @property
    def key(self) -> tuple[str, str]:
        return self.instance.tenant, self.instance.name

    @property
    def active(self) -> bool:
        """Whether a process of it runs, or is about to."""
        return self.status.state in ("starting", "running", "paused", "stopping")

    @property
    def watched(self) -> bool:
        """Whether its end is waited for already."""
        return self.watching is not None and not self.watching.done()

    async def settled(self) -> None:
        """Returns when no process of it runs and its remains are tidied up."""
        if self.watching:
            await asyncio.wait([self.watching])

    def cancel_restart(self) -> None:
        if self.restarting:
            self.restarting.cancel()
            self.restarting = None
