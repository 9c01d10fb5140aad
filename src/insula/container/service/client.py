"""The asyncio client of the runtime: it asks the monitor and the zygote of this host.

The state of a container is in its run directory (`insula.container.service.run_directory`) and in the kernel. A
`Runtime` holds connections only: it can be made anew at any time, by another process too, and finds every container.
When a connection breaks, the result of a request is looked up there; the request is not repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from insula.container import wire
from insula.container.service import resources
from insula.container.service.dialer import TIMEOUT, Dialer
from insula.container.service.failures import Hint, ZygoteDied, explain, no_hint
from insula.container.service.process_streams import ProcessStreams
from insula.container.service.protocol import MONITOR_SOCKET
from insula.container.service.run_directory import ExitRecord, Launch, ProcessState, RunDirectory, all_run_directories
from insula.container.service.zygote_connection import ZygoteConnection
from insula.kernel import descriptors, process, sealed
from insula.kernel.cgroups import Cgroup
from insula.kernel.seccomp import cache as seccomp_cache
from insula.model.errors import Failed, NotFound

__all__ = ["Exec", "ExitRecord", "Launch", "ProcessState", "ProcessStreams", "Runtime"]

log = logging.getLogger("insula.container")
_DYING = 10.0  # seconds for a process that is ending to end
_PIDFD_SIGNAL_PROCESS_GROUP = 4


class Exec(NamedTuple):
    """A process to join a container; `process` as in the OCI runtime-spec."""

    process: dict[str, Any]
    stdin: bool = False
    detach: bool = False


class Runtime:
    """The containers below the run directory `run`."""

    def __init__(self, run: Path | str, spares: int = 2, hint: Hint = no_hint) -> None:
        """`spares`: the number of warm containers for each parent group (`insula.container.service.warm_pool`).

        `hint` has the hints of errors.
        """
        self.run = str(run)
        self.spares = spares
        self._hint = hint
        self._first: dict[str, ProcessState] = {}  # first processes that were made by this object
        self._warm_ids: dict[str, list[str]] = {}  # ids of warm containers, by the control group above theirs
        self._warm: dict[str, ProcessState] = {}  # their first processes, by id, also of those that were chosen
        self._waiters: dict[tuple[str, str | None], asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._dialer = Dialer(self.run, spares)
        self._zygote = ZygoteConnection(self._dialer, self._on_zygote_event, self._forget_warm)
        self._filters: dict[int, tuple[dict[str, Any], str, int]] = {}

    async def open(self, *, wait: bool = True) -> None:
        """Connect, starting the monitor if none runs; from then on it is started again whenever it dies.

        Without `wait` it returns before there is a monitor and a zygote; requests wait for them. `trouble` tells why
        they don't come.
        """
        os.makedirs(f"{self.run}/containers", 0o700, exist_ok=True)
        if self._is_the_hosts():
            with contextlib.suppress(OSError):  # then insula-oci takes longer, and that is all
                await asyncio.to_thread(sealed.mount_sealed)
        if wait:
            await self._zygote.connect()
        else:
            self._tasks.append(asyncio.create_task(self._try_zygote()))
        self._tasks.append(asyncio.create_task(self._watch_monitor()))

    async def _try_zygote(self) -> None:
        """Connect ahead of the first request, so as to be told of warm containers."""
        with contextlib.suppress(Failed):  # `_watch_monitor` tells
            await self._zygote.connect()

    async def close(self) -> None:
        """Close the connections; containers, monitor and zygote run on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._zygote.close()

    @property
    def trouble(self) -> str | None:
        """The reason for which there is no monitor; None if there is one."""
        return self._dialer.trouble

    async def withdraw(self) -> None:
        """Remove the sealed interpreter from the host, which `open` has mounted for `insula-oci`."""
        if self._is_the_hosts():
            await asyncio.to_thread(sealed.unmount_sealed)

    def _is_the_hosts(self) -> bool:
        return self.run == "/run/insula"

    # -- verbs -----------------------------------------------------------------------------------------

    def choose_id(self, parent: str) -> str:
        """An id for a container whose control group will be `parent`/id: that of a warm container if there is one."""
        offered = self._warm_ids.get(parent)
        return offered.pop(0) if offered else secrets.token_hex(16)

    def warm(self, container: str) -> ProcessState | None:
        """The first process that a container with an id of `choose_id` will have, unless its warm container is lost
        meanwhile; None if the id is none of a warm container."""
        return self._warm.get(container)

    async def create(self, launch: Launch, descriptors: Sequence[int] = ()) -> ProcessState:
        """Make the namespaces, with PID 1 in them waiting to start. `Failed` says which step the kernel refused.

        The program inherits copies of `descriptors`, as 3 and so on."""
        directory = RunDirectory(self.run, launch.id)
        profile = launch.config["linux"].get("seccomp")
        if profile and launch.seccomp is None:
            path, flags = await self._filter(profile)
            linux = {key: value for key, value in launch.config["linux"].items() if key != "seccomp"}  # it is large
            config = {**launch.config, "linux": linux}
            launch = launch._replace(config=config, seccomp=path, seccomp_flags=flags)
        try:
            answer = await self._create(directory, launch, descriptors)
        except ZygoteDied:  # nothing of it runs: the next zygote can do it from the beginning
            answer = await self._create(directory, launch, descriptors)
        state = self._first[launch.id] = ProcessState(launch.id, answer["pid"], answer["start_time"])
        self._warm.pop(launch.id, None)
        return state

    async def _create(self, directory: RunDirectory, launch: Launch, descriptors: Sequence[int]) -> wire.Message:
        directory.create(launch)
        try:
            return await self._request({"op": "create", "id": launch.id}, descriptors)
        except BaseException:
            await asyncio.shield(asyncio.create_task(self.delete(launch.id)))
            raise

    async def start(self, container: str) -> ProcessState:
        """Have PID 1 execute the user's program. `Failed` if it can't, `NotFound` if it vanishes."""
        answer = await self._request({"op": "start", "id": container})
        if known := self._first.get(container):
            return known._replace(started=answer["started"])
        if (state := self.state(container)) is None:
            raise NotFound("its container vanished while it started", "try again")
        return state

    async def failure(self, container: str) -> Failed | None:
        """The error with which PID 1 ended before it executed the user's program; None if it lives, or if it is not
        known.

        One that is just ending has no namespaces any more, and is not dead yet: it is waited for.
        """
        state = self._process(container)
        if state is None or process.has_namespaces(state.pid, state.start_time):
            return None
        with contextlib.suppress(NotFound, TimeoutError):
            async with asyncio.timeout(_DYING):
                record = await self.wait(container)
            return explain(record.failure, self._hint) if record.failure else None
        return None

    async def exec(self, container: str, what: Exec) -> str:
        """Run another process inside; its exec id, once execve succeeded."""
        state = self.state(container)
        if state is None or not process.is_alive(state.pid, state.start_time):
            raise NotFound("the container does not run")
        exec_id = os.urandom(6).hex()
        await self.exec_as(container, exec_id, what)
        return exec_id

    async def exec_as(self, container: str, exec_id: str, what: Exec) -> None:
        """`exec` with an id chosen by the caller, so that it may attach by it at once."""
        request = {"op": "exec", "id": container, "exec": exec_id, "process": what.process, "stdin": what.stdin}
        await self._request(request)
        if what.detach:
            with contextlib.suppress(OSError), wire.connect(f"{self.run}/{MONITOR_SOCKET}") as sock:
                wire.send(sock, {"op": "discard", "id": container, "exec": exec_id})

    async def wait(self, container: str, exec_id: str | None = None) -> ExitRecord:
        """Wait until the process has ended, and return how. `NotFound` if there is no such process."""
        directory = RunDirectory(self.run, container)
        if record := directory.exit(exec_id):
            return record
        state = self._process(container, exec_id)
        if state is None:
            raise NotFound("there is no such process in the container")
        with contextlib.ExitStack() as stack:
            pidfd = None
            with contextlib.suppress(ProcessLookupError):
                pidfd = descriptors.move_above_select_limit(process.open_process(state.pid, state.start_time))
                stack.callback(os.close, pidfd)
                await _readable(pidfd)
            return await self._ended(directory, exec_id, pidfd)

    async def flushed(self, container: str, exec_id: str | None = None) -> None:
        """Wait until all output of an ended process is in the log, for some seconds at most.

        Usually it returns at once, unless a monitor was killed and its successor is still starting.
        """
        with contextlib.suppress(Failed, TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                await self._request({"op": "flushed", "id": container, "exec": exec_id})

    async def attach(self, container: str, exec_id: str | None = None, *, stdin: bool = False) -> ProcessStreams:
        """The streams of a process that was created; `NotFound` if they are closed already."""
        deadline = time.monotonic() + 1.0
        while True:
            sock, answer = await self._ask_monitor({"op": "attach", "id": container, "exec": exec_id, "stdin": stdin})
            if "error" not in answer:
                return ProcessStreams(sock)
            sock.close()
            # a monitor that has just started may not have been told of it yet
            state = RunDirectory(self.run, container).state(exec_id)
            alive = state is not None and process.is_alive(state.pid, state.start_time)
            if not alive or time.monotonic() > deadline:
                raise NotFound(f"cannot attach: {answer['error']}")
            await asyncio.sleep(0.005)

    async def _ask_monitor(self, request: wire.Message) -> tuple[socket.socket, wire.Message]:
        loop = asyncio.get_running_loop()
        sock = await self._dialer.dial(MONITOR_SOCKET)
        try:
            await loop.sock_sendall(sock, json.dumps(request).encode())
            answer = json.loads(await loop.sock_recv(sock, wire.MAX_MESSAGE) or b'{"error": "the monitor died"}')
        except ConnectionError:
            return sock, {"error": "the monitor died"}
        except BaseException:
            sock.close()
            raise
        return sock, answer

    def signal(self, container: str, number: int, exec_id: str | None = None, *, group: bool = False) -> None:
        """Send a signal to PID 1, or to a process that joined; with `group` also to the other processes of its
        process group, from Linux 6.9 on. `NotFound` if it is gone."""
        import signal

        state = RunDirectory(self.run, container).state(exec_id)
        try:
            if state is None:
                raise ProcessLookupError
            pidfd = process.open_process(state.pid, state.start_time)
        except ProcessLookupError:
            raise NotFound("the process does not run any more") from None
        try:
            try:
                signal.pidfd_send_signal(pidfd, number, None, _PIDFD_SIGNAL_PROCESS_GROUP if group else 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:  # it was reaped in the meantime
            raise NotFound("the process does not run any more") from None
        finally:
            os.close(pidfd)

    async def update(self, container: str, limits: dict[str, Any]) -> None:
        """Change what it may use, as in `linux.resources` of the OCI runtime-spec; see `resources.update`."""
        await asyncio.to_thread(resources.update, RunDirectory(self.run, container), limits)

    async def pause(self, container: str) -> None:
        """Freeze all of its processes; see `resources.pause`."""
        await asyncio.to_thread(resources.pause, RunDirectory(self.run, container))

    async def resume(self, container: str) -> None:
        """Let them go on; nothing happens if they are not frozen, or gone."""
        await asyncio.to_thread(resources.resume, RunDirectory(self.run, container))

    async def delete(self, container: str, cgroup: str | None = None) -> None:
        """Kill what runs, and remove cgroup and run directory; nothing happens if it is gone.

        `cgroup` is where its control group should be: what runs there is killed also if its records are damaged.
        """
        directory = RunDirectory(self.run, container)
        if not os.path.isdir(directory.path):
            self._first.pop(container, None)
            if cgroup:
                await asyncio.to_thread(Cgroup(cgroup).remove)
            directory.remove()  # something else of that name
            return
        with contextlib.suppress(NotFound):
            self.signal(container, 9)
            await self.resume(container)  # a frozen process doesn't die
            await self.wait(container)
        self._first.pop(container, None)
        await asyncio.to_thread(_remove, directory, cgroup)

    async def forget_layer(self, path: Path | str) -> None:
        """Let the zygote drop its mounts of an image layer that is to be removed."""
        await self._request({"op": "forget-layer", "path": str(path)})

    # -- reading ---------------------------------------------------------------------------------------

    def damaged(self, container: str) -> list[str]:
        """The names of the container's records that exist and can't be read."""
        return RunDirectory(self.run, container).damaged()

    def restore(self, state: ProcessState) -> None:
        """Write the record of a container's PID 1 again."""
        RunDirectory(self.run, state.id).write_state(state)

    def states(self) -> list[ProcessState]:
        """PID 1 of every container, dead or alive, that was created and not deleted."""
        return [state for directory in all_run_directories(self.run) if (state := directory.state())]

    def ids(self) -> list[str]:
        """Every container that has a run directory, also one whose making was interrupted."""
        return [directory.id for directory in all_run_directories(self.run)]

    def state(self, container: str) -> ProcessState | None:
        return RunDirectory(self.run, container).state()

    def exit(self, container: str) -> ExitRecord | None:
        return RunDirectory(self.run, container).exit()

    def forget(self, container: str, exec_id: str) -> None:
        """Remove the records of a process that joined and has ended; `wait` doesn't find it any more."""
        RunDirectory(self.run, container).forget(exec_id)

    def execs(self, container: str) -> list[str]:
        """The processes that joined and were not forgotten."""
        return RunDirectory(self.run, container).execs()

    def _process(self, container: str, exec_id: str | None = None) -> ProcessState | None:
        """PID and start time of a process; the record is not read for one that this object made."""
        known = self._first.get(container) if exec_id is None else None
        return known or RunDirectory(self.run, container).state(exec_id)

    def netns(self, container: str, state: ProcessState | None = None) -> int:
        """A descriptor of the network namespace; the caller closes it. `NotFound` if the container is gone.

        `state` is the container's first process, if the caller knows it.
        """
        state = state or self._process(container)
        try:
            if state is None:
                raise ProcessLookupError
            return process.open_namespace(state.pid, state.start_time, "net")
        except (ProcessLookupError, FileNotFoundError):
            raise NotFound("the container does not run") from None

    def cgroup(self, container: str) -> Cgroup | None:
        """The control group of a container; None if it is gone."""
        launch = RunDirectory(self.run, container).launch()
        return Cgroup(launch.cgroup) if launch else None

    def processes(self, container: str) -> list[process.Process]:
        """Everything that runs in the container, by host PID."""
        launch = RunDirectory(self.run, container).launch()
        if launch is None:
            return []
        return [p for pid in Cgroup(launch.cgroup).processes() if (p := process.read(pid))]

    # -- the zygote -----------------------------------------------------------------------------------

    async def _request(self, message: wire.Message, descriptors: Sequence[int] = ()) -> wire.Message:
        received = await self._zygote.request(message, descriptors)
        if error := received.get("error"):
            raise explain(error, self._hint)
        return received

    def _on_zygote_event(self, message: wire.Message) -> None:
        if message["event"] == "exit":
            self._notify_waiters((message["id"], message["exec"]))
        else:
            self._update_warm_ids(message)

    def _update_warm_ids(self, message: wire.Message) -> None:
        offered, container = self._warm_ids.setdefault(message["parent"], []), message["id"]
        if message["event"] == "spare":
            offered.append(container)
            self._warm[container] = ProcessState(container, message["pid"], message["start_time"])
            return
        self._warm.pop(container, None)
        if container in offered:
            offered.remove(container)

    def _forget_warm(self) -> None:
        self._warm_ids.clear()
        self._warm.clear()

    async def _watch_monitor(self) -> None:
        """Receive exit events of the monitor, and start another monitor when it dies."""
        while True:
            try:
                sock = await self._dialer.dial(MONITOR_SOCKET)
            except Exception as error:
                log.error("there is no monitor: %s", error)
                await asyncio.sleep(1.0)
                continue
            try:
                with sock, contextlib.suppress(ConnectionError):
                    await self._read_monitor(sock)
            except Exception:
                log.exception("what the monitor says can't be understood")
                await asyncio.sleep(1.0)

    async def _read_monitor(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, b'{"op": "watch"}')
        while data := await loop.sock_recv(sock, wire.MAX_MESSAGE):
            message = json.loads(data)
            if message["event"] == "exit":
                self._notify_waiters((message["id"], message["exec"]))

    def _notify_waiters(self, key: tuple[str, str | None]) -> None:
        if event := self._waiters.pop(key, None):
            event.set()

    async def _ended(self, directory: RunDirectory, exec_id: str | None, pidfd: int | None) -> ExitRecord:
        """The record of a process that has ended. Its parent is about to write it; if that died before, ask the
        kernel."""
        event = self._waiters.setdefault((directory.id, exec_id), asyncio.Event())
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            if record := directory.exit(exec_id):
                return record
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):  # an event can be missed while a connection is down
                    await event.wait()
        if pidfd is not None and (status := process.exit_status(pidfd)) is not None:
            return directory.record_exit(status, exec_id)
        record = ExitRecord(None, None, False, time.time(), "its parent died before it, so its exit status is unknown")
        directory.write_exit(record, exec_id)
        return record

    async def _filter(self, profile: dict[str, Any]) -> tuple[str, int]:
        """The file of the compiled seccomp profile and its flags; each profile is compiled once."""
        known = self._filters.get(id(profile))
        if known is None or known[0] is not profile:  # the same object for all launches with the same profile
            directory = Path(self.run) / "seccomp"
            directory.mkdir(0o700, exist_ok=True)
            path, flags = await asyncio.to_thread(seccomp_cache.compiled_file, profile, directory)
            known = self._filters[id(profile)] = (profile, str(path), flags)
        return known[1:]


async def _readable(fd: int) -> None:
    """Wait until `fd` polls as readable: a pidfd does when its process has ended."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _remove(directory: RunDirectory, cgroup: str | None) -> None:
    launch = directory.launch()
    if path := launch.cgroup if launch else cgroup:
        Cgroup(path).remove()
    directory.remove()
