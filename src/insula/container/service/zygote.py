"""The zygote: a small process of a single thread that forks containers.

Forking a small Python takes half a millisecond, starting one fourteen: so a launch never starts an interpreter. The
zygote imports little, and keeps no state that is not also in the run directory. On one socket it serves the daemon,
which requests containers, and the monitor, which gets the streams of every container. Each child has a channel of its
own. If the zygote is killed, running containers go on and become the monitor's children. Containers that were not told
to start exit, because their channel is closed.

It has a mount namespace of its own (mount_namespaces(7)) for idmapped layers, which ends with it. Requests:

    {"op": "create", "id"}                  → {"pid", "start_time"}: PID 1 waits, its namespaces exist
    {"op": "start", "id"}                   → {"pid", "started"} once the program runs, or the error of execve
    {"op": "exec", "id", "exec", "process", "stdin"} → {"pid", "started"} once the program runs, or its error
    {"op": "hello", …}                      → see `insula.container.service.protocol`
    {"op": "replace"}                       → {}: it has ended, and the monitor starts another one
    {"op": "forget-layer", "path"}          → {}
    {"op": "flushed", "id", "exec"}         → {} once all that it printed is in its log
    {"op": "spares"}                        this client is told of warm containers
    {"op": "keep"}                          this client is the monitor: it is sent every session and its descriptors
    {"op": "hold", "id", "exec", …}         from the monitor: hold copies of these streams
    {"op": "close", "id", "exec", "stream"} from the monitor: a stream, or without a name the session, is over

Clients are told of exits, {"event": "exit", "id", "exec"}. Those that asked for it are told of warm containers
(`insula.container.service.warm_pool`): {"event": "spare", "id", "parent", "pid", "start_time"}, or "no-spare" when it
is gone. A client takes one by creating a container with its id. It may connect the network namespace of a warm
container before that: so when such a client is gone, all warm containers are dropped.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import select
import socket
import time
from typing import Any, NoReturn

from insula.container import wire
from insula.container.create import join, spawn
from insula.container.create.exec_process import Filter
from insula.container.create.steps import StepError, Steps, close_others
from insula.container.service import launch
from insula.container.service.children import Child
from insula.container.service.protocol import WARM_RECORDS, ZYGOTE_BUILD, ZYGOTE_PID, hello
from insula.container.service.run_directory import Launch, ProcessState, RunDirectory
from insula.container.service.sessions import Sessions
from insula.container.service.warm_pool import Template, WarmContainer, WarmPool, assign
from insula.container.service.working_set import WorkingSet
from insula.kernel import cgroups, process, records, syscalls
from insula.kernel.event_loop import EventLoop
from insula.kernel.rollback import Rollback
from insula.log import write as report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.container.service.children import Reply

_NAME = "insula-zygote"
_TRACED_PAUSE = 1.0  # seconds between two looks at children that a tracer keeps from us
_PAUSE = 0.005  # seconds of quiet before work that can wait
_RESERVED_DESCRIPTORS = 48  # descriptors that are left for what runs already
_MAX_ENDED = 64  # mount namespaces that may wait to be closed


class Zygote:
    """The state of the process: clients, children, sessions and warm containers."""

    def __init__(self, run: str, build: str, listener: socket.socket, spares: int) -> None:
        self.run = run
        self.build = build
        self.listener = listener
        self.loop = EventLoop(_NAME)
        self.clients: dict[int, socket.socket] = {}
        self.warm_subscribers: list[socket.socket] = []  # clients that are told of warm containers
        self.children: dict[tuple[str, str | None], Child] = {}
        self.sessions = Sessions()
        self.programs: dict[str, bytes] = {}
        self.layers = launch.Layers()
        self.most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.traced: list[int] = []  # have ended, and wait for who traces them
        self.pool = WarmPool(f"{run}/{WARM_RECORDS}", spares)
        self.working_set = WorkingSet()
        self.last_launch: Launch | None = None  # the last launch, which the pool is told of when idle
        self.ended: list[tuple[str, int]] = []  # containers that ended and their mount namespaces: closed when idle

    def serve(self) -> NoReturn:
        self.pool.open()
        self.loop.watch(self.listener.fileno(), lambda _: self._accept())
        self.loop.run(self._idle_timeout, self._run_idle_work)

    # -- clients ---------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:  # no descriptor is left: it waits in the queue until one is
            time.sleep(0.01)
            return
        self.clients[client.fileno()] = client
        self.loop.watch(client.fileno(), lambda _: self._request(client))

    def _request(self, client: socket.socket) -> None:
        received = wire.receive(client)
        if received is None:
            self.loop.unwatch(client.fileno())
            del self.clients[client.fileno()]
            if self.sessions.monitor is client:
                self.sessions.monitor = None
            client.close()
            if client in self.warm_subscribers:  # it may have connected some of them to a network
                self.warm_subscribers.remove(client)
                for warm in list(self.pool.containers.values()):
                    self._drop_warm(warm)
            return
        message, descriptors = received
        if message["op"] == "hold":
            self.sessions.hold(message, descriptors)
            return
        number = message.get("n")

        def reply(answer: wire.Message) -> None:
            _send(client, {"n": number, **answer})

        try:
            self._serve_request(client, message, descriptors, reply)
        except StepError as error:
            reply({"error": error.message})
        except OSError as error:
            reply({"error": StepError(Steps.PREPARE, error).message})
        except (KeyError, TypeError, ValueError) as error:
            reply({"error": StepError(Steps.READ_REQUEST, OSError(errno.EINVAL, repr(error))).message})
        finally:
            for fd in descriptors:
                os.close(fd)

    def _serve_request(self, client: socket.socket, message: wire.Message, given: list[int], reply: Reply) -> None:
        match message["op"]:
            case "hello":
                reply(hello(self.build))
            case "replace":
                self._end(reply)
            case "create":
                reply(self._create(message["id"], given))
            case "start":
                self._start(message["id"], reply)
            case "exec":
                self._exec(message["id"], message["exec"], message["process"], message["stdin"], reply)
            case "forget-layer":
                self.layers.forget(message["path"])
                reply({})
            case "flushed":
                self.sessions.when_closed((message["id"], message.get("exec")), lambda: reply({}))
            case "spares":
                self.warm_subscribers.append(client)
                for warm in self.pool.containers.values():
                    if warm.ready:
                        _send(client, warm.offer())
            case "keep":
                self.sessions.serve(client)
            case "close":
                self.sessions.close((message["id"], message.get("exec")), message.get("stream"))
            case other:
                raise ValueError(f"no such request: {other}")

    def _end(self, reply: Reply) -> NoReturn:
        """Exit, so that the monitor starts a zygote of another build.

        The containers become the monitor's children, which has all of their streams. Those that were not told to start
        end, as when the zygote is killed.
        """
        for warm in list(self.pool.containers.values()):
            self._drop_warm(warm)
        if self.ended:
            self._release_mount_namespaces()
        reply({})
        os._exit(0)

    # -- containers ------------------------------------------------------------------------------------

    def _create(self, container: str, inherit: list[int]) -> wire.Message:
        directory = RunDirectory(self.run, container)
        request = directory.launch()
        if request is None:
            raise FileNotFoundError(2, "the container has no launch.json", directory.path)
        self._require_descriptors()
        # an earlier root of this container must be unmounted before it is mounted again
        if len(self.ended) > _MAX_ENDED or any(name == container for name, _ in self.ended):
            self._release_mount_namespaces()
        made = None if inherit else self._from_warm(directory, request)
        if fresh := made is None:
            made = launch.start(request, self.layers, self._program(request), inherit)
        child = Child(container, None, made.sync, made.pid, made.pidfd)
        child.cgroup, child.state = request.cgroup, ProcessState(container, made.pid, made.start_time)
        self._add(child)
        self.sessions.open(container, None, request, made.streams, terminal=request.tty)
        # the record comes before the word to go on: no process may live that the run directory doesn't name
        directory.write_state(child.state)
        self.pool.release(container)
        if fresh:
            self.working_set.forked()
            wire.send(made.sync, {"event": "mapped"})
        self.last_launch = request
        return {"pid": made.pid, "start_time": made.start_time}

    def _from_warm(self, directory: RunDirectory, request: Launch) -> spawn.SpawnedProcess | None:
        """Make the container of the warm container with its id; None if there is none that fits."""
        warm = self.pool.containers.get(request.id)
        if warm is None:
            return None
        if not self.pool.fits(warm, request):
            self._drop_warm(warm)
            return None
        for fd in (warm.child.sync.fileno(), warm.child.pidfd):
            self.loop.unwatch(fd)
        try:
            return assign(warm, request, self.layers, f"{directory.path}/launch.json", request.seccomp)
        except (OSError, StepError, ValueError):  # the usual way fails again and says why, or succeeds
            self.pool.drop(warm)
            return None

    def _start(self, container: str, reply: Reply) -> None:
        child = self.children.get((container, None))
        directory = RunDirectory(self.run, container)
        if child is None or child.start_requested or child.sync is None:
            record = directory.exit()
            why = (child and child.error) or (record and record.failure)
            error = record.error if record and record.error else "the container is not waiting to start"
            reply({"error": why or StepError(Steps.START, OSError(0, error)).message})
            return
        if child.state:
            child.state = child.state._replace(started=time.time())
            directory.write_state(child.state)
        child.start_requested, child.reply = True, reply
        with contextlib.suppress(OSError):
            child.mounts = os.open(f"/proc/{child.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # it died while preparing: its error is on its way
            wire.send(child.sync, {"event": "start"})

    def _exec(self, container: str, exec_id: str, what: dict[str, Any], stdin: bool, reply: Reply) -> None:
        directory = RunDirectory(self.run, container)
        request, state = directory.launch(), directory.state()
        if request is None or state is None:
            raise FileNotFoundError(2, "the container does not run", container)
        tty = bool(what.get("terminal"))
        user = what.get("user") or {}
        self._require_descriptors()
        with Rollback() as undo, Rollback() as child_fds:
            target = child_fds.hold(process.open_to_join(state.pid, state.start_time))
            groups = [child_fds.hold(fd) for fd in cgroups.Cgroup(request.cgroup).group_to_join(state.pid).open()]
            ours, theirs = wire.pair()
            child_fds.callback(theirs.close)
            undo.callback(ours.close)
            stdio: list[int] = []
            streams: dict[str, int] = {}
            if not tty:
                owner = (request.id_base + user.get("uid", 0), request.id_base + user.get("gid", 0))
                stdio, streams = launch.make_pipes(child_fds, undo, stdin, owner)
            program = self._program(request)
            pid, pidfd = syscalls.clone3(0)
            if pid == 0:
                join.main(join.ExecArgs(what, target, theirs, groups, stdio, program))
            undo.keep()
        self.working_set.forked()
        # the first of the two forks ends at once, unless the container is frozen: so nothing waits for it here
        self.loop.watch(pidfd, lambda _: self._reap_intermediate(pid, pidfd))
        child = Child(container, exec_id, ours, 0, -1)
        child.reply, child.start_requested = reply, True
        self.children[(container, exec_id)] = child
        self.loop.watch(ours.fileno(), lambda _: self._on_message(child))
        self.sessions.open(container, exec_id, request._replace(log=None, stdin=stdin), streams, terminal=tty)

    def _require_descriptors(self) -> None:
        """StepError if few descriptors are left: here or in the monitor a process could have some of its streams
        only."""
        lowest = os.dup(self.listener.fileno())
        os.close(lowest)
        if lowest + _RESERVED_DESCRIPTORS > self.most:
            raise StepError(Steps.HOLD_DESCRIPTORS, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))

    def _program(self, request: Launch) -> Filter | None:
        if request.seccomp is None:
            return None
        if request.seccomp not in self.programs:
            with open(request.seccomp, "rb") as file:
                self.programs[request.seccomp] = file.read()
        return Filter(self.programs[request.seccomp], request.seccomp_flags)

    # -- children --------------------------------------------------------------------------------------

    def _add(self, child: Child) -> None:
        self.children[(child.container, child.exec_id)] = child
        if child.sync:
            self.loop.watch(child.sync.fileno(), lambda _: self._on_message(child))
        self.loop.watch(child.pidfd, lambda _: self._reap(child))

    def _on_message(self, child: Child) -> None:
        """Handle a message of a child, or the end of its channel, which execve(2) and exit close."""
        assert child.sync is not None
        received = wire.receive(child.sync)
        if received is None:
            self.loop.unwatch(child.sync.fileno())
            child.sync.close()
            child.sync = None
            self._on_exec_or_death(child)
            return
        message, descriptors = received
        match message["event"]:
            case "terminal" if descriptors:
                os.set_blocking(descriptors[0], False)
                self.sessions.add((child.container, child.exec_id), {"tty": descriptors.pop(0)})
            case "error":
                child.error = message
            case "forked":
                child.pid = message["pid"]
                child.pidfd = os.pidfd_open(child.pid)
                self.loop.watch(child.pidfd, lambda _: self._reap(child))
                started = process.start_time(child.pid) or 0
                child.state = ProcessState(child.container, child.pid, started, time.time())
                self._record(child)
        for fd in descriptors:
            os.close(fd)

    def _on_exec_or_death(self, child: Child) -> None:
        """Handle the end of the channel: the program runs, or the child has ended or is about to."""
        if child.reply:
            started = child.state.started if child.state else None
            child.reply({"error": child.error} if child.error else {"pid": child.pid, "started": started})
            child.reply = None
        if child.start_requested and child.error is None and child.pid and not _ended(child.pidfd) and child.state:
            child.state = child.state._replace(executed=True)
            self._record(child)
        if child.pid == 0:  # it failed before its second fork: nothing will be reaped
            self.sessions.end((child.container, child.exec_id))
            self._remove(child)

    def _record(self, child: Child) -> None:
        """Write the record of a process. If that fails, it runs on, and is known to this zygote only."""
        try:
            if child.state:
                RunDirectory(self.run, child.container).write_state(child.state, child.exec_id)
        except OSError as error:
            report(_NAME, f"process {child.pid} of container {child.container} is not recorded", error)

    def _reap(self, child: Child) -> None:
        """Record the end of a process, reap it, and tell clients, in this order."""
        self.loop.unwatch(child.pidfd)
        if child.sync is not None:  # what it still had to say comes first
            while child.sync is not None:
                self._on_message(child)
        directory = RunDirectory(self.run, child.container)
        try:  # before it is reaped: if we are killed here the monitor gets it, and loses nothing
            status = process.status_of_dead(child.pid)
            directory.record_exit(status, child.exec_id, child.error, state=child.state, cgroup=child.cgroup)
        except OSError as failure:
            report(_NAME, f"the end of process {child.pid} of container {child.container} is not recorded", failure)
        # a process in the container may trace it, and we don't get it before that one lets go (ptrace(2))
        if not os.waitpid(child.pid, os.WNOHANG)[0]:
            if not self.traced:
                self.loop.later(_TRACED_PAUSE, self._reap_traced)
            self.traced.append(child.pid)
        os.close(child.pidfd)
        if child.mounts >= 0:
            self.ended.append((child.container, child.mounts))
        self.sessions.end((child.container, child.exec_id))
        self._remove(child)

    def _reap_traced(self) -> None:
        self.traced = [pid for pid in self.traced if not os.waitpid(pid, os.WNOHANG)[0]]
        if self.traced:
            self.loop.later(_TRACED_PAUSE, self._reap_traced)

    def _reap_intermediate(self, pid: int, pidfd: int) -> None:
        self.loop.unwatch(pidfd)
        os.waitpid(pid, 0)
        os.close(pidfd)

    def _remove(self, child: Child) -> None:
        self.children.pop((child.container, child.exec_id), None)
        for client in list(self.clients.values()):
            if client is not self.sessions.monitor:
                _send(client, {"event": "exit", "id": child.container, "exec": child.exec_id})

    # -- idle work ------------------------------------------------------

    def _idle_timeout(self) -> float | None:
        """Seconds without an event after which `_run_idle_work` has its turn; None if there is no such work."""
        if self.last_launch or self.ended or self.pool.missing() or self.working_set.is_shared:
            return _PAUSE
        return self.pool.idle_timeout()

    def _run_idle_work(self) -> None:
        """Do one piece of idle work: a request may have come meanwhile."""
        if self.last_launch:
            self.pool.launched(self.last_launch)
            self.working_set.launched()
            self.last_launch = None
        elif self.ended:
            self._release_mount_namespaces()
        elif template := self.pool.missing():
            self._make_warm(template)
        elif self.working_set.is_shared:
            self.working_set.copy()
        else:
            for warm in self.pool.expired():
                self._drop_warm(warm)

    def _release_mount_namespaces(self) -> None:
        """Close the mount namespaces of ended containers in a child: unmounting an overlay syncs the file system below
        it (ovl_sync_fs()), which takes long while others write there."""
        dead = [fd for _, fd in self.ended]
        wait, done = os.pipe2(os.O_CLOEXEC)
        pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            try:
                syscalls.set_name("insula-umount")
                close_others([*dead, wait])
                os.read(wait, 1)  # until the parent has closed its own end: the last process to close it waits
            finally:
                os._exit(0)
        for fd in (*dead, done, wait):
            os.close(fd)
        self.ended.clear()
        self.working_set.forked()
        self.loop.watch(pidfd, lambda _: self._reap_intermediate(pid, pidfd))

    def _make_warm(self, template: Template) -> None:
        try:
            warm = self.pool.make(template)
        except (OSError, StepError) as error:
            report(_NAME, f"no warm container for {template.parent}", error)
            self.pool.forget(template)
            return
        self.working_set.forked()
        self.loop.watch(warm.child.sync.fileno(), lambda _: self._on_warm_message(warm))
        self.loop.watch(warm.child.pidfd, lambda _: self._drop_warm(warm))

    def _on_warm_message(self, warm: WarmContainer) -> None:
        received = wire.receive(warm.child.sync)
        if received is None or received[0]["event"] != "parked":
            self.pool.forget(warm.template)
            self._drop_warm(warm)
            return
        warm.ready = True
        for subscriber in self.warm_subscribers:
            _send(subscriber, warm.offer())

    def _drop_warm(self, warm: WarmContainer) -> None:
        for fd in (warm.child.sync.fileno(), warm.child.pidfd):
            self.loop.unwatch(fd)
        self.pool.drop(warm)
        for subscriber in self.warm_subscribers:
            _send(subscriber, {"event": "no-spare", "id": warm.id, "parent": warm.template.parent})


def _send(client: socket.socket, message: wire.Message) -> None:
    """Send a message to a client; if it is gone, the run directory has what it would be told."""
    with contextlib.suppress(OSError):
        wire.send(client, message)


def _ended(pidfd: int) -> bool:
    """Whether the process behind a pidfd has ended (it polls as readable then)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def main(run: str, build: str, listener: socket.socket, spares: int) -> NoReturn:
    """Be the zygote: make its mount namespace, then serve requests. It never returns."""
    syscalls.set_name("insula-zygote")
    os.umask(0o077)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    # a clone with another effective user (see launch.py) is still made by root, which has the right
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, syscalls.SECBIT_NO_SETUID_FIXUP)
    # slave: what the host mounts later is seen here, what is mounted here is not seen there
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    layers = f"{run}/layers"
    os.makedirs(layers, 0o700, exist_ok=True)
    syscalls.mount("tmpfs", layers, "tmpfs", 0, "mode=700")
    os.chdir(layers)
    # a user namespace may mount /proc and /sys only where they are seen whole, and the host may have covered
    # parts of its own (mount_too_revealing() in fs/namespace.c): so here are some that nothing covers
    for name, fstype in (("proc", "proc"), ("sys", "sysfs")):
        os.mkdir(name)
        syscalls.mount(fstype, name, fstype, syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC)
    records.replace(f"{run}/{ZYGOTE_PID}", f"{os.getpid()} {process.start_time(os.getpid())}\n".encode())
    records.replace(f"{run}/{ZYGOTE_BUILD}", f"{build}\n".encode())
    os.umask(0)  # only now: what is made in containers has exactly the modes that are asked for
    cgroups.Cgroup.implementation(cgroups.hierarchy().version)  # else each child imports it
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at
    Zygote(run, build, listener, spares).serve()
