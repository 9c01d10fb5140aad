"""What the control plane needs of whatever runs instances: the `Driver` protocol, implemented once for each kind.

A driver acts on this host only, and on one instance at a time, which it knows by the instance's id. It keeps nothing
of what is wanted: every method looks at what is there, so that it may be called again after a crash at any point.
Methods that are not `async` return at once, except those that say "Blocks": these are called in a worker thread.

`features` names what a driver has beyond running and ending instances. Ask with `require` before a method of one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, NamedTuple, Protocol

from insula.control.instances.drivers.directory import LaunchRecord
from insula.model.errors import InsulaError, Unavailable
from insula.model.objects import ConsoleSize, Exit, Instance, InstanceStatus, Network, Resources, Tenant
from insula.model.stream import Kind
from insula.model.views import ExecSpec, Explanation, ProcessView
from insula.network.fabric import Nic

Feature = Literal["exec", "attach", "pause", "files", "stats", "processes", "explain", "memory-events"]
State = Literal["none", "created", "running", "paused", "ended"]
"""Nothing is there; made and never told to start; the program runs; it is frozen; it has ended."""


class Running(NamedTuple):
    """The first process of an instance on this host, named for ever by PID and start time (proc_pid_stat(5))."""

    pid: int
    start_time: int
    started: float | None = None  # seconds since the epoch; None before it was told to start


class Observed(NamedTuple):
    """What is on this host of one instance. `record` is the start that was begun last; `damaged` names records that
    are there and can't be read."""

    state: State
    running: Running | None = None
    record: LaunchRecord | None = None
    damaged: Sequence[str] = ()


class CreateOptions(NamedTuple):
    """What an instance is made with beside its spec. `joined` is the process whose PID namespace it shares. `connect`
    plugs a nic in, and closes it; there is none without a network."""

    network: Network | None = None
    console: ConsoleSize | None = None
    joined: Running | None = None
    connect: Callable[[Nic], Awaitable[None]] | None = None


class LogRecord(Protocol):
    """A piece of output with the time at which it was read, in nanoseconds since the epoch."""

    @property
    def time_ns(self) -> int: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def data(self) -> bytes: ...


class Log(Protocol):
    """What an instance printed; `poll` returns what was not yet returned."""

    def poll(self) -> list[Any]: ...
    def __enter__(self) -> Log: ...
    def __exit__(self, *_: object) -> None: ...


class Streams(Protocol):
    """The streams of a process: iterate for its output, `send` for its input. `complete` once all was read."""

    complete: bool

    def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]: ...
    async def send(self, kind: Kind, payload: bytes = b"") -> None: ...
    async def finish(self) -> None: ...
    def close(self) -> None: ...


class Archive(Protocol):
    """A tar stream in or out of an instance: `read` or `write` pieces, then `finish`, which raises what went wrong."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def finish(self) -> None: ...


class MemoryEvents(Protocol):
    """Readable (poll(2)) when the kernel has killed for want of memory; `take` returns how often since the start."""

    def fileno(self) -> int: ...
    def take(self) -> int: ...
    def close(self) -> None: ...


class Driver(Protocol):
    kind: str
    features: frozenset[Feature]

    # -- this host ------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why nothing can be launched at the moment, if that is so."""

    async def open(self) -> None:
        """Prepare this host. It returns at once; what takes long goes on behind it."""

    async def close(self) -> None:
        """Let go of everything; instances live on."""

    async def take_down(self) -> None:
        """Remove everything of this driver from the host, running or not. OSError, InsulaError."""

    def make_room(self, instances: int) -> None:
        """Adjust what instances share on this host for so many of them."""

    def ids(self) -> set[str]:
        """Every instance that something of is there, apart from its directory. Blocks."""

    async def release_layer(self, path: str) -> None:
        """Drop what is held of an image's layer that is about to be removed."""

    # -- the life of an instance ----------------------------------------------------------------------------------

    def reserve(self, tenant: str) -> str:
        """The id of a new instance."""

    async def validate(self, tenant: Tenant, draft: Instance) -> None:
        """Invalid if its spec can't be carried out, Unavailable if not here. Nothing is made."""

    async def create(self, tenant: Tenant, instance: Instance, options: CreateOptions) -> None:
        """Make it, up to its first process, which waits for `start`, and connect it. Failed says which step failed;
        then nothing is left of it but its directory, and maybe its port.

        A driver that knows the nic before calls `options.connect` at once, to save the time; and again if another one
        takes its place.
        """

    def nic(self, instance_id: str) -> Nic:
        """Where its port is plugged in, of one that was created; the caller closes it. NotFound if it is gone."""

    async def start(self, instance_id: str) -> Running:
        """Let its program run. Failed says why it can't."""

    async def failure(self, instance_id: str) -> InsulaError | None:
        """Why its first process ended before it became the program; None if it lives, or if that is not known."""

    def signal(self, instance_id: str, number: int, exec_id: str | None = None, *, group: bool = False) -> None:
        """Send a signal to its first process, or to one that `exec` made, with `group` to its process group as well.
        NotFound if that has ended."""

    def frozen_elsewhere(self, instance_id: str) -> str | None:
        """The control group, not its own, in which its first process is frozen, so that SIGKILL waits; else None."""

    async def pause(self, instance_id: str) -> None:
        """Freeze all of its processes. NotFound."""

    async def resume(self, instance_id: str) -> None:
        """Let them go on; nothing happens if they are not frozen, or gone."""

    async def resize(self, instance_id: str, resources: Resources) -> None:
        """Put other limits in force. Failed if the kernel refuses them, NotFound."""

    async def wait(self, instance_id: str, exec_id: str | None = None) -> Exit:
        """How its first process ended, or one that `exec` made, once it has. NotFound if there is no such process."""

    async def flushed(self, instance_id: str, exec_id: str | None = None) -> None:
        """Return when all that the process printed is in the log; of one that has ended."""

    def observe(self, instance: Instance, status: InstanceStatus) -> Observed:
        """What is there now. `status` is the last that was stored: where records are damaged it helps. Blocks."""

    async def discard(self, instance: Instance) -> None:
        """Kill what runs and remove all but the directory; nothing happens if it is gone."""

    async def discard_stray(self, instance_id: str) -> None:
        """The same for what no record tells of but its id. InsulaError, OSError."""

    async def remove_directory(self, instance_id: str) -> None:
        """Remove what the instance has on disk, whatever it left there. Failed."""

    def end_of_boot(self, instance_id: str) -> None:
        """From now on its last start counts as one of an earlier life of the host."""

    # -- a running instance ---------------------------------------------------------------------------------------

    async def prepare_exec(self, tenant: Tenant, instance: Instance, spec: ExecSpec) -> object:
        """What `exec` takes for one more process in the instance. Invalid."""

    async def exec(
        self,
        instance_id: str,
        prepared: object,
        exec_id: str | None = None,
        *,
        stdin: bool = False,
        detach: bool = False,
    ) -> str:
        """Run it; its id, once its program has started. Failed, NotFound."""

    def execs(self, instance_id: str) -> list[str]:
        """The processes that `exec` made and that were not forgotten."""

    def forget_exec(self, instance_id: str, exec_id: str) -> None:
        """Drop what is known of one that has ended."""

    async def attach(self, instance_id: str, exec_id: str | None = None, *, stdin: bool = False) -> Streams:
        """Its streams; NotFound if they are closed already."""

    def has_exited(self, instance_id: str) -> bool:
        """Whether the end of its first process was recorded."""

    def log(self, instance_id: str, *, since: float = 0.0, tail: int | None = None) -> Log:
        """What it printed from `since` on (seconds since the epoch), or the last `tail` lines of that."""

    def holder(
        self, tenant: Tenant, instance: Instance, network: Network | None
    ) -> AbstractAsyncContextManager[Running]:
        """A process that does nothing and has the root file system of an instance that doesn't run."""

    def archive(
        self, verb: Literal["write", "read", "export"], process: Running, path: str, copy: str | None = None
    ) -> AbstractAsyncContextManager[Archive]:
        """The tree at `path` as the process sees it: to `write` or `export` it, or to `read` an archive into it."""

    def memory_events(self, instance: Instance) -> MemoryEvents:
        """Hear when the kernel kills for want of memory. OSError, Unavailable."""

    # -- looking --------------------------------------------------------------------------------------------------

    def stats(self, instances: Sequence[Instance]) -> dict[str, dict[str, Any]]:
        """Counters of those that run, by id: `cpu`, `memory`, `pids`, `io` (None where it isn't counted), `pressure`.
        Blocks."""

    def processes(self, tenant: Tenant, instance_id: str) -> Sequence[ProcessView]:
        """Everything that runs in it, by the number inside. Blocks."""

    def explain(
        self, tenant: Tenant, instance: Instance, status: InstanceStatus, near: Mapping[str, Running]
    ) -> Explanation:
        """What makes it isolated. `near` are instances that may share a namespace with it, by name. Blocks."""


def require(driver: Driver, feature: Feature) -> Driver:
    """The driver. Unavailable if it lacks the feature."""
    if feature not in driver.features:
        has = ", ".join(sorted(driver.features)) or "nothing of the kind"
        raise Unavailable(f"instances of kind {driver.kind} have no {feature}", f"they have {has}")
    return driver
