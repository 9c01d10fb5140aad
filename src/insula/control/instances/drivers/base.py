"""`Driver`: the protocol between the control plane and a kind of instances, such as containers.

A driver acts on this host only. It knows an instance by its id. It keeps no desired state: every method looks at the
state of the host, so that it may be called again after a crash at any point. Methods that are not `async` return at
once, except those that say "Blocks", which are called in a worker thread.

`features` names the optional parts that a driver has. Call `require` before a method of such a part.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

from insula.control.instances.drivers.directory import LaunchRecord
from insula.control.instances.drivers.migration import Migrations
from insula.control.instances.drivers.snapshots import SnapshotFiles
from insula.model.disks import FurtherDisk
from insula.model.errors import Conflict, InsulaError
from insula.model.guests import GuestReport
from insula.model.objects import ConsoleSize, Exit, Instance, InstanceStatus, Network, Port, Resources, Tenant
from insula.model.stream import Kind
from insula.model.views import ExecSpec, Explanation, ProcessView
from insula.network.fabric import Nic, Places

DriverFeature = Literal[
    "exec",
    "attach",
    "pause",
    "files",
    "stats",
    "processes",
    "explain",
    "memory-events",
    "snapshots",
    "forks",
    "migrate",
    "screenshot",
    "vnc",
    "guest-report",
    "hotplug",
    "answers",
]
DISK_MACHINES: Final = "disk-machine"
"""The driver of instances of disk images. All other drivers have the name of a kind of instances."""
ObservedState = Literal["none", "created", "starting", "running", "paused", "ended"]
"""The state of an instance on this host. "none": nothing of it is there. "created": it was never started. "starting":
its first process runs, and is not ready yet. "paused": its processes are frozen. "ended": its first process has ended,
and its remains were not discarded yet."""


class Running(NamedTuple):
    """The first process of an instance on this host. PID and start time (proc_pid_stat(5)) identify it for ever."""

    pid: int
    start_time: int
    started: float | None = None  # seconds since the epoch; None before `Driver.start`


class Observed(NamedTuple):
    """The observed state of an instance on this host. `record` is its last start. `damaged` names records that exist
    and can't be read."""

    state: ObservedState
    running: Running | None = None
    record: LaunchRecord | None = None
    damaged: Sequence[str] = ()


class GroupCounters(NamedTuple):
    """Counters of a control group: processor time in nanoseconds since it was made, and memory in use in bytes. Another
    group of the same name, or after another boot, has another `incarnation`."""

    incarnation: str
    cpu: int
    memory: int


class Connect(Protocol):
    def __call__(self, nic: Nic, port: int | None = None) -> Awaitable[None]: ...


class CreateOptions(NamedTuple):
    """Options of `Driver.create` beside the instance. `networks` are those of its ports. `joined` is the process whose
    PID namespace it shares. `connect` plugs in a nic and closes it; it is None without a network. It plugs
    in all ports, or only that with an index, for nics that have one port each."""

    networks: Sequence[Network] = ()
    console: ConsoleSize | None = None
    joined: Running | None = None
    connect: Connect | None = None


class LogRecord(Protocol):
    """A piece of output with the time at which it was read, in nanoseconds since the epoch."""

    @property
    def time_ns(self) -> int: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def data(self) -> bytes: ...


class Log(Protocol):
    """A reader of an instance's log. `poll` returns records that were not returned yet."""

    def poll(self) -> list[Any]: ...
    def __enter__(self) -> Log: ...
    def __exit__(self, *_: object) -> None: ...


class Streams(Protocol):
    """The streams of a process. Iterate to read its output; `send` writes its input. `complete`: all was read."""

    complete: bool

    def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]: ...
    async def send(self, kind: Kind, payload: bytes = b"") -> None: ...
    async def finish(self) -> None: ...
    def close(self) -> None: ...


class Archive(Protocol):
    """A tar stream into or out of an instance. `read` or `write` pieces, then `finish`, which raises the failure."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def finish(self) -> None: ...


class MemoryEvents(Protocol):
    """A descriptor that is readable (poll(2)) after an out-of-memory kill. `take` returns the number of kills since the
    start of the instance."""

    def fileno(self) -> int: ...
    def take(self) -> int: ...
    def close(self) -> None: ...


class Driver(Protocol):
    kind: str
    features: frozenset[DriverFeature]

    @property
    def snapshots(self) -> SnapshotFiles | None:
        """Snapshots of instances, and copies of those that run; None without these features."""

    @property
    def migrations(self) -> Migrations | None:
        """Moves of instances to other hosts; None without this feature."""

    # -- this host ------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why nothing can be launched at the moment; None if it can."""

    async def open(self) -> None:
        """Prepare this host. It returns at once; slow work goes on in the background."""

    async def close(self) -> None:
        """Close the driver. Instances go on running."""

    async def take_down(self) -> None:
        """Remove everything of this driver from the host, running or not. OSError, InsulaError."""

    def make_room(self, instances: int) -> None:
        """Adjust shared resources of this host to this number of instances."""

    def ids(self) -> set[str]:
        """The ids of all instances that have something on this host beside a directory. Blocks."""

    async def release_layer(self, path: str) -> None:
        """Release an image's layer that is about to be removed."""

    # -- the life of an instance ----------------------------------------------------------------------------------

    def reserve(self, tenant: str) -> str:
        """Choose the id of a new instance."""

    async def validate(self, tenant: Tenant, draft: Instance) -> None:
        """Check an instance before it is committed. Invalid; Unavailable if this host can't run it."""

    async def prepare(self, tenant: Tenant, instance: Instance) -> None:
        """Do before a start what may take minutes, such as copying a disk. Failed; what is done is not done again."""

    async def create(self, tenant: Tenant, instance: Instance, options: CreateOptions) -> None:
        """Create the instance, with a first process that waits for `start`, and connect it. Failed says which step
        failed; then only its directory is left, and maybe its port.

        A driver that knows the nic before calls `options.connect` early, to save time, and again if the nic changes.
        """

    def nic(self, instance_id: str) -> Nic:
        """The nic of a created instance, for its ports. The caller closes it. NotFound if it has ended."""

    async def plug(self, instance: Instance, beside: Places, missing: Places, connect: Connect) -> None:
        """Plug ports into an instance that runs, beside those that it has; what is there already is repaired. Conflict,
        Unavailable, Failed, NotFound."""

    async def unplug(self, instance: Instance, port: Port, beside: Places) -> None:
        """Have an instance that runs let go of a port, before that is disconnected; `beside` are those that it keeps.
        Failed, NotFound."""

    async def start(self, instance_id: str) -> Running:
        """Start its program. Failed says why that is not possible."""

    def is_ready(self, instance_id: str) -> bool:
        """Whether the program of an instance that was started runs; until then the instance is "starting"."""

    async def ready(self, instance_id: str) -> bool:
        """Wait, as long as it takes, until `is_ready`; False if the instance ends before. Failed if it will never be
        ready."""

    def answers(self, instance_id: str) -> AsyncIterator[bool]:
        """Whether an instance that is ready answers Insula, each time that this changes, until it ends. NotFound."""

    async def failure(self, instance_id: str) -> InsulaError | None:
        """Why its first process ended before it executed the program; None if it lives, or if the cause is unknown."""

    def signal(self, instance_id: str, number: int, exec_id: str | None = None, *, group: bool = False) -> None:
        """Send a signal to its first process, or to one that `exec` started; with `group` to its process group too.
        NotFound if it has ended."""

    async def sync(self, instance_id: str) -> None:
        """Have what its programs have written be kept when it is killed next; their end is near. Returns after a few
        seconds in any case."""

    def frozen_elsewhere(self, instance_id: str) -> str | None:
        """The foreign control group in which its first process is frozen, so that SIGKILL has no effect; else None."""

    async def pause(self, instance_id: str) -> None:
        """Freeze all processes of the instance. NotFound."""

    async def resume(self, instance_id: str) -> None:
        """Thaw all processes of the instance; nothing happens if they are not frozen, or have ended. Then it may have
        to become ready again."""

    def check_resize(self, instance: Instance, resources: Resources, state: str) -> None:
        """Check other limits of an instance, which is in this state. Invalid, Conflict."""

    async def resize(self, instance: Instance) -> Sequence[str]:
        """Apply the limits of an instance that runs, and return what is not as they say yet, as text. Failed if
        that is not possible, NotFound."""

    def check_disks(self, instance: Instance, disks: Sequence[FurtherDisk], *, active: bool) -> None:
        """Check other further disks of an instance, which is `active` or not. Invalid, Conflict."""

    async def attach_disks(self, instance: Instance) -> None:
        """Attach the further disks of its spec to an instance that runs, make those that are new, and detach and remove
        others; and have its CDs in its drives. Failed if it does not let go of a disk, NotFound."""

    async def wait(self, instance_id: str, exec_id: str | None = None) -> Exit:
        """Wait for the end of its first process, or of one that `exec` started, and return its exit. NotFound if there
        is no such process."""

    async def flushed(self, instance_id: str, exec_id: str | None = None) -> None:
        """Return when all output of a process that has ended is in the log."""

    def observe(self, instance: Instance, status: InstanceStatus) -> Observed:
        """The state of the instance on this host now. `status` is the last one; it helps if records are damaged.
        Blocks."""

    async def discard(self, instance: Instance) -> None:
        """Kill its processes and remove everything but its directory; nothing happens if nothing is there."""

    async def discard_stray(self, instance_id: str) -> None:
        """Discard an instance of which only the id is known. InsulaError, OSError."""

    def writable(self, instance_id: str) -> Path | None:
        """The directory of what the instance writes; None if there is none."""

    async def remove_directory(self, instance_id: str) -> None:
        """Remove the directory of the instance with all of its files. Failed."""

    def end_of_boot(self, instance_id: str) -> None:
        """Mark its last start as one before the last boot of the host."""

    # -- a running instance ---------------------------------------------------------------------------------------

    async def prepare_exec(self, tenant: Tenant, instance: Instance, spec: ExecSpec) -> object:
        """Prepare one more process in the instance, and return the argument for `exec`. Invalid."""

    async def exec(
        self,
        instance_id: str,
        prepared: object,
        exec_id: str | None = None,
        *,
        stdin: bool = False,
        detach: bool = False,
    ) -> str:
        """Start a prepared process, and return its id when its program has started. Failed, NotFound."""

    def execs(self, instance_id: str) -> list[str]:
        """The ids of processes that `exec` started and that were not forgotten."""

    def forget_exec(self, instance_id: str, exec_id: str) -> None:
        """Drop the record of an exec process that has ended."""

    async def attach(self, instance_id: str, exec_id: str | None = None, *, stdin: bool = False) -> Streams:
        """Connect to the streams of a process. NotFound if they are closed already."""

    def has_exited(self, instance_id: str) -> bool:
        """Whether the end of its first process was recorded."""

    def log(self, instance_id: str, *, since: float = 0.0, tail: int | None = None) -> Log:
        """A reader of its log from `since` on (seconds since the epoch), or of the last `tail` lines of that."""

    def holder(
        self, tenant: Tenant, instance: Instance, networks: Sequence[Network]
    ) -> AbstractAsyncContextManager[Running]:
        """A process that sleeps in the root file system of an instance that doesn't run."""

    def archive(
        self, verb: Literal["write", "read", "export"], process: Running, path: str, copy: str | None = None
    ) -> AbstractAsyncContextManager[Archive]:
        """An archive of the tree at `path` as the process sees it; "write" and "export" make one, "read" unpacks it."""

    async def screenshot(self, instance_id: str) -> bytes:
        """A picture of its screen, a PNG. Failed, NotFound."""

    async def vnc(self, instance_id: str) -> socket.socket:
        """A connection to its screen, keyboard and pointer, by the Remote Framebuffer protocol (RFC 6143), without a
        password. It does not block. Failed, NotFound."""

    async def guest_report(self, instance_id: str) -> GuestReport:
        """What the system in it says of itself, within some seconds. NotFound."""

    def memory_events(self, instance: Instance) -> MemoryEvents:
        """Watch for out-of-memory kills. OSError, Unavailable."""

    # -- observation ----------------------------------------------------------------------------------------------

    def stats(self, instances: Sequence[Instance]) -> dict[str, dict[str, Any]]:
        """Counters of the instances that run, by id: `cpu`, `memory`, `pids`, `io` (None if not counted), `pressure`.
        Blocks."""

    def counters(self, tenant: str, instance_id: str) -> GroupCounters | None:
        """The counters of the instance's control group; None if it has none. Takes some 20 µs."""

    def ended(self, instance: Instance) -> GroupCounters | None:
        """What `end` would return, if the instance has no process left; else None. Takes some 20 µs."""

    def end(self, instance: Instance) -> GroupCounters | None:
        """Kill all processes of the instance, and return its counters, which are complete then and stay until
        `discard`. Blocks."""

    def processes(self, tenant: Tenant, instance_id: str) -> Sequence[ProcessView]:
        """The processes of the instance, sorted by their PID inside. Blocks."""

    def explain(
        self, tenant: Tenant, instance: Instance, status: InstanceStatus, near: Mapping[str, Running]
    ) -> Explanation:
        """The isolation of the instance. `near` are instances that may share a namespace with it, by name. Blocks."""


_SCREENS: Final = frozenset({"screenshot", "vnc"})


def require(driver: Driver, feature: DriverFeature) -> Driver:
    """Return the driver. Conflict if it lacks the feature."""
    if feature in _SCREENS - driver.features:
        raise Conflict(f"instances of kind {driver.kind} have no screen", "machines of disk images have one")
    if feature not in driver.features:
        has = ", ".join(sorted(driver.features)) or "nothing of the kind"
        raise Conflict(f"instances of kind {driver.kind} have no {feature}", f"they have {has}")
    return driver


def snapshots_of(driver: Driver, feature: Literal["snapshots", "forks"] = "snapshots") -> SnapshotFiles:
    """Return the driver's snapshots. Conflict if it has none."""
    if feature not in driver.features:
        raise Conflict(f"instances of kind {driver.kind} have no {feature}", "machines that QEMU runs have")
    found = require(driver, feature).snapshots
    assert found is not None
    return found


def migrations_of(driver: Driver) -> Migrations:
    """Return the driver's moves. Conflict if it has none."""
    if "migrate" not in driver.features:
        what = f"instances of kind {driver.kind} can't move while they run"
        raise Conflict(what, "virtual machines of container images can (`insula run --vm`)")
    found = require(driver, "migrate").migrations
    assert found is not None
    return found
