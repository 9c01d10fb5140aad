"""`ManagedInstance`: one instance in the memory of the daemon of its host, as it is wanted and as it was measured."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from insula.control.instances.drivers.base import Observed
from insula.model.errors import InsulaError
from insula.model.objects import ConsoleSize, Exit, Instance, InstanceStatus, Tenant

if TYPE_CHECKING:
    from insula.control.instances.attachment import Attachment
    from insula.control.instances.decide import Hold
    from insula.model.views import Health

Key = tuple[str, str]
_REMEMBERED = 1000


class Failure(NamedTuple):
    """Why what was wanted at `generation` could not be made so."""

    generation: int
    error: InsulaError


class Waiter(NamedTuple):
    """A verb that waits until `generation` was made true, or has failed."""

    generation: int
    answer: asyncio.Future[InstanceStatus]


class Monitor(Protocol):
    """The health of one start of an instance that has checks; `over` once that start is."""

    health: Health
    over: bool


class Watch(Protocol):
    """A watch for kills for want of memory."""

    def close(self) -> None: ...


class ManagedInstance:
    """One instance. `revision` is that of its entry in the store; `ended` tells the end of the current start.

    `observed` is what is on this host of it, which actions keep true; None: nobody knows, look.
    """

    def __init__(self, tenant: Tenant, instance: Instance, status: InstanceStatus, revision: int) -> None:
        self.tenant = tenant
        self.instance = instance
        self.status = status
        self.revision = revision
        self.lock = asyncio.Lock()  # held while something is done about it
        self.observed: Observed | None = None
        self.hold: Hold = "unknown"
        # of the controller
        self.wake = asyncio.Event()  # something changed since it was decided what to do
        self.worker: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.waiters: list[Waiter] = []
        self.failure: Failure | None = None
        self.gone = False
        self.reconciled = asyncio.Event()  # whether it was looked at since the daemon started
        # of its current start
        self.console: ConsoleSize | None = None  # of the next one
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.exited = asyncio.Event()  # its process has ended, as `exit` says
        self.exit: Exit | None = None
        self.stopping: float | None = None  # since when it was asked to end (time.monotonic)
        self.watcher: asyncio.Task[None] | None = None
        self.monitor: Monitor | None = None  # of its health, while it runs
        self.memory: Watch | None = None  # for want of it, while it runs
        self.execs: dict[str, asyncio.Task[Exit]] = {}  # the ends of other processes in it
        self.waiting: set[Attachment] = set()  # attached before it was launched
        self.vanished = asyncio.Event()  # of one that is removed when it ends
        # of its status in the store
        self.saving: asyncio.Task[None] | None = None
        self.unsaved = False

    @property
    def key(self) -> Key:
        return self.instance.tenant, self.instance.name

    @property
    def label(self) -> str:
        """What problems of this host call it."""
        return f"instance {'/'.join(self.key)}"

    @property
    def active(self) -> bool:
        """Whether a process of it runs, or is about to."""
        return self.status.state in ("starting", "running", "paused", "stopping")

    @property
    def busy(self) -> bool:
        """Whether something is being done about it."""
        return self.worker is not None and not self.worker.done()

    @property
    def restarting(self) -> bool:
        """Whether it has ended, and its restart policy will have it run again after a pause."""
        return restarting(self.instance, self.status)


def restarting(instance: Instance, status: InstanceStatus) -> bool:
    ended = status.state in ("exited", "failed") and status.starts == instance.starts
    return ended and status.next_start is not None and instance.wanted in ("running", "paused")


class ManagedInstances:
    """Those of this host, by tenant and name; and how those ended that were removed when they did.

    `complete`: there are no others in the store, for no other daemon commits to it.
    """

    def __init__(self, *, complete: bool = False) -> None:
        self.complete = complete
        self._by_key: dict[Key, ManagedInstance] = {}
        self._exits: dict[Key, Exit] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, managed: ManagedInstance) -> None:
        self._by_key[managed.key] = managed

    def rename(self, managed: ManagedInstance, instance: Instance, revision: int) -> None:
        """It has another name from now on."""
        if self._by_key.get(managed.key) is managed:
            del self._by_key[managed.key]
        managed.instance, managed.revision = instance, revision
        self.add(managed)

    def remove(self, managed: ManagedInstance) -> None:
        """Its end can still be asked for, for a while."""
        if self._by_key.get(managed.key) is managed:
            del self._by_key[managed.key]
        if managed.status.exit:
            self._exits[managed.key] = managed.status.exit
            while len(self._exits) > _REMEMBERED:
                self._exits.pop(next(iter(self._exits)))

    def find(self, tenant: str, name: str) -> ManagedInstance | None:
        return self._by_key.get((tenant, name))

    def with_id(self, instance_id: str) -> ManagedInstance | None:
        return next((each for each in self._by_key.values() if each.instance.id == instance_id), None)

    def last_exit(self, tenant: str, name: str) -> Exit | None:
        return self._exits.get((tenant, name))

    def all(self) -> Sequence[ManagedInstance]:
        """In no order."""
        return list(self._by_key.values())

    def of(self, tenant: str | None) -> Iterator[ManagedInstance]:
        """Those of a tenant, or all for None, by name."""
        return (each for _, each in sorted(self._by_key.items()) if tenant is None or each.instance.tenant == tenant)
