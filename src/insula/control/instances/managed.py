"""`ManagedInstance`: an instance in the memory of its host's daemon, with its desired and observed state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from insula.control.instances.drivers.base import Observed
from insula.model.errors import InsulaError
from insula.model.objects import ConsoleSize, Exit, Instance, InstanceStatus, Tenant

if TYPE_CHECKING:
    from insula.control.instances.attach_session import AttachSession
    from insula.control.instances.decide import Hold
    from insula.model.views import Health

InstanceKey = tuple[str, str]
_REMEMBERED = 1000
READY = 20.0
"""Seconds that a verb waits for an instance to be ready. If it takes longer, the instance goes on starting."""


class Failure(NamedTuple):
    """Why the desired state of `generation` could not be reached."""

    generation: int
    error: InsulaError


class Waiter(NamedTuple):
    """A verb that waits until `generation` is observed or has failed."""

    generation: int
    answer: asyncio.Future[InstanceStatus]


class InstanceHealth(Protocol):
    """The health checks of one start of an instance; `over` once that start has ended."""

    health: Health
    over: bool


class MemoryWatch(Protocol):
    """A watch for out-of-memory kills."""

    def close(self) -> None: ...


class ManagedInstance:
    """One instance. `revision` is the revision of its record in the store. `ended` has the exit of the current start.

    `observed` is its state on this host, which actions keep up to date; None if the driver has to be asked.
    """

    def __init__(self, tenant: Tenant, instance: Instance, status: InstanceStatus, revision: int) -> None:
        self.tenant = tenant
        self.instance = instance
        self.status = status
        self.revision = revision
        self.lock = asyncio.Lock()  # held during an action
        self.observed: Observed | None = None
        self.hold: Hold = "unknown"
        # for the controller
        self.wake = asyncio.Event()  # something changed since the last decision
        self.worker: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.waiters: list[Waiter] = []
        self.failure: Failure | None = None
        self.gone = False
        self.reconciled = asyncio.Event()  # set after the first pass since the daemon started
        # for the current start
        self.console: ConsoleSize | None = None  # for the next start
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.exited = asyncio.Event()  # its first process has ended; `exit` is set
        self.exit: Exit | None = None
        self.stopping: float | None = None  # when the stop signal was sent (time.monotonic)
        self.watcher: asyncio.Task[None] | None = None
        self.becoming: asyncio.Task[None] | None = None  # ready, while it is not
        self.monitor: InstanceHealth | None = None  # its health checks, while it runs
        self.memory: MemoryWatch | None = None  # its out-of-memory events, while it runs
        self.answers = True  # it answers Insula, as far as is known
        self.following: asyncio.Task[None] | None = None  # whether it answers, while it runs
        self.execs: dict[str, asyncio.Task[Exit]] = {}  # exits of processes that exec started
        self.waiting: set[AttachSession] = set()  # attached before it was launched
        self.vanished = asyncio.Event()  # set when it was removed, or stopped by `insula down`
        # for its status in the store
        self.saving: asyncio.Task[None] | None = None
        self.unsaved = False

    @property
    def key(self) -> InstanceKey:
        return self.instance.tenant, self.instance.name

    @property
    def label(self) -> str:
        """Its name in problems of this host and in the log."""
        return f"instance {'/'.join(self.key)}"

    @property
    def records(self) -> str:
        """The name of the problem with its records. It is solved when the instance starts again or is removed."""
        return f"records of {self.label}"

    @property
    def active(self) -> bool:
        """Whether it runs, starts or stops."""
        return self.status.state in ("starting", "running", "paused", "stopping")

    async def until_ready(self, seconds: float) -> None:
        """Wait until it is no longer starting, some seconds at most."""
        if self.becoming and self.status.state == "starting":
            await asyncio.wait([self.becoming], timeout=seconds)

    @property
    def busy(self) -> bool:
        """Whether its worker runs."""
        return self.worker is not None and not self.worker.done()

    @property
    def restarting(self) -> bool:
        """Whether it has ended and its restart policy will start it again after a pause."""
        return restarting(self.instance, self.status)


def restarting(instance: Instance, status: InstanceStatus) -> bool:
    ended = status.state in ("exited", "failed") and status.starts == instance.starts
    return ended and status.next_start is not None and instance.wanted in ("running", "paused")


class ManagedInstances:
    """The instances of this host, by tenant and name, and the exits of instances that were removed when they ended.

    `complete`: the store has no others, since no other daemon commits to it.
    """

    def __init__(self, *, complete: bool = False) -> None:
        self.complete = complete
        self._by_key: dict[InstanceKey, ManagedInstance] = {}
        self._exits: dict[InstanceKey, Exit] = {}
        self._sharing: set[ManagedInstance] = set()

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, managed: ManagedInstance) -> None:
        self._by_key[managed.key] = managed
        if managed.instance.spec.options.pid_of is not None:
            self._sharing.add(managed)

    def rename(self, managed: ManagedInstance, instance: Instance, revision: int) -> None:
        """Enter the instance under its new name."""
        if self._by_key.get(managed.key) is managed:
            del self._by_key[managed.key]
        managed.instance, managed.revision = instance, revision
        self.add(managed)

    def remove(self, managed: ManagedInstance) -> None:
        """Remove the instance. Its exit is kept for a while, for `last_exit`."""
        self._sharing.discard(managed)
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
        """All instances, unsorted."""
        return list(self._by_key.values())

    def sharing(self) -> Sequence[ManagedInstance]:
        """Return the instances that share the processes of another one, unsorted."""
        return list(self._sharing)

    def of(self, tenant: str | None) -> Iterator[ManagedInstance]:
        """The instances of a tenant, or all for None, sorted by name."""
        return (each for _, each in sorted(self._by_key.items()) if tenant is None or each.instance.tenant == tenant)
