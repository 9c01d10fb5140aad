"""The monitor: a process that relays the streams of all containers, and restarts the zygote.

It is for all containers of a host what conmon is for one. The zygote is the parent of the containers, and records their
exit status. If the zygote dies, the kernel makes its children those of the nearest ancestor with PR_SET_CHILD_SUBREAPER
(prctl(2)). That is the monitor, which then records how they end. If the monitor dies, the zygote still holds every
stream and records exits; the daemon starts another monitor, which gets the streams from the zygote.

Requests on its socket, one for each connection unless it says otherwise:

    {"op": "hello", …}                       → see `insula.container.service.protocol`; another request may follow
    {"op": "attach", "id", "exec", "stdin"}  → {"tty"} or {"error"}; from then on frames go both ways
    {"op": "discard", "id", "exec"}          drop the output of this process
    {"op": "watch"}                          → {"event": "exit", "id", "exec"} for each end that it records
    {"op": "replace", "arguments", "environment"} and a descriptor
                                             execute that program, of another build, with all that this one holds;
                                             {"error"} if that fails

After "replace" the new program has the PID, the children, the streams and the clients of the old one: nothing that a
container prints or a client sends is lost, and attached clients notice nothing (`insula.container.service.reexec`).
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from insula.container import wire
from insula.container.log import LogWriter
from insula.container.service import reexec
from insula.container.service.protocol import (
    MONITOR_BUILD,
    MONITOR_LOCK,
    MONITOR_PID,
    MONITOR_SOCKET,
    hello,
)
from insula.container.service.relay import AttachedClient, Session
from insula.container.service.run_directory import PidIndex, ProcessKey
from insula.container.service.zygote_supervisor import ZygoteSupervisor
from insula.kernel import process, records, syscalls
from insula.kernel.event_loop import EventLoop
from insula.log import write as report
from insula.model.stream import Kind

_NAME = "insula-monitor"
_GRACE = 10.0  # seconds after its end in which one may still attach to a process that joined
_PAUSE = 0.05  # seconds in which a process that prints too much is not read from


class Monitor:
    """The state of the process: the zygote, sessions, and clients that watch for exits."""

    def __init__(self, run: str, build: str, spares: int, lock: int, state: dict[str, Any] | None) -> None:
        """`lock` is the open lock file. `state` is that of the program that this one replaces."""
        self.run = run
        self.build = build
        self.lock = lock
        self.loop = EventLoop(_NAME)
        self.sessions: dict[ProcessKey, Session] = {}
        self.watchers: list[socket.socket] = []
        self.pids = PidIndex(run)
        self.zygote = ZygoteSupervisor(self.loop, run, build, spares)
        self.zygote.on_message, self.zygote.on_death = self._on_zygote_message, self._on_zygote_death
        self.zygote.streams = self._streams
        if state is None:
            self.listener = wire.listen(f"{run}/{MONITOR_SOCKET}")
        else:
            self._restore(state)

    def serve(self) -> NoReturn:
        wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.loop.watch(wakeup, lambda _: self._reap_children(wakeup))
        self.loop.watch(self.listener.fileno(), lambda _: self._accept())
        self._resume_all()
        self._reap_children(wakeup)  # those that ended before this monitor listened
        self.zygote.ensure()
        self.loop.run()

    # -- the zygote -----------------------------------------------------------------------------------

    def _streams(self) -> Iterator[tuple[wire.Message, dict[int, str]]]:
        """For each session the message for a zygote, and its descriptors with their names."""
        for key, session in self.sessions.items():
            yield {"id": key[0], "exec": key[1], **session.origin}, session.names

    def _on_zygote_death(self) -> None:
        """Drop the sessions of processes that were not started yet: they died with the zygote."""
        for key in [k for k, session in self.sessions.items() if not session.names]:
            self._end(key)

    def _on_zygote_message(self, message: wire.Message, descriptors: list[int]) -> None:
        key = (message["id"], message["exec"])
        if message["op"] == "ended":
            self._end(key)
            if session := self.sessions.get(key):
                session.end_input()
                if key[1] is None:
                    session.reset_quota()
                self._update(key, session)
            self._discard_later(key)
            return
        if key not in self.sessions:
            origin = {name: message[name] for name in ("tty", "stdin", "log", "log_size", "log_files")}
            log = self._open_log(origin, message["id"])
            self.sessions[key] = Session(log, origin, discard=bool(message["log"]) and log is None)
        session = self.sessions[key]
        for name, fd in zip(message["streams"], descriptors, strict=False):
            session.add(name, fd)
        self._update(key, session)

    def _open_log(self, origin: dict[str, Any], container: str) -> LogWriter | None:
        """The log of a session; None if it has none, or if it can't be written."""
        if not origin["log"]:
            return None
        try:
            return LogWriter(origin["log"], origin["log_size"], origin["log_files"])
        except OSError as error:
            report(_NAME, f"no log for {container}", error)
            return None

    def _reap_children(self, wakeup: int) -> None:
        """Handle SIGCHLD: reap the zygote, or children that became ours when it died."""
        with contextlib.suppress(BlockingIOError):
            os.read(wakeup, 4096)
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid == self.zygote.pid:
                self.zygote.pid = 0  # the end of its channel is what starts another
            else:
                try:
                    self._record_end(ended.si_pid)
                except Exception as error:
                    report(_NAME, f"the end of process {ended.si_pid} is not recorded", error)
            os.waitpid(ended.si_pid, 0)  # only now, so that a monitor that is killed before has lost nothing

    def _record_end(self, pid: int) -> None:
        if found := self.pids.find(pid):
            directory, exec_id = found
            directory.record_exit(process.status_of_dead(pid), exec_id)
            self._discard_later((directory.id, exec_id))
            self._notify_watchers({"event": "exit", "id": directory.id, "exec": exec_id})

    # -- clients ---------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:  # no descriptor is left: it waits in the queue until one is
            listener = self.listener.fileno()
            self.loop.unwatch(listener)
            self.loop.later(_PAUSE, lambda: self.loop.watch(listener, lambda _: self._accept()))
            return
        self.loop.watch(sock.fileno(), lambda _: self._request(sock))

    def _request(self, sock: socket.socket) -> None:
        self.loop.unwatch(sock.fileno())
        try:
            received = wire.receive(sock)
            if received is None:
                sock.close()
                return
            message, descriptors = received
            if message["op"] == "hello":
                wire.send(sock, hello(self.build))
                self.loop.watch(sock.fileno(), lambda _: self._request(sock))
                return
            if message["op"] == "replace":
                self._replace(sock, message, descriptors)
                sock.close()
                return
            if message["op"] == "watch":
                self.watchers.append(sock)
                self.loop.watch(sock.fileno(), partial(self._drop_watcher, sock))
                wire.send(sock, {"event": "watching", "sessions": [list(key) for key in self.sessions]})
                return
            self._attach(sock, message)
        except Exception as error:
            report(_NAME, "a request is refused", error)
            self.loop.unwatch(sock.fileno())
            sock.close()

    def _attach(self, sock: socket.socket, message: wire.Message) -> None:
        key = (message["id"], message.get("exec"))
        # the zygote told of the session before it told the client: the news may wait on the channel
        while key not in self.sessions and self.zygote.receive_waiting():
            pass
        session = self.sessions.get(key)
        if message["op"] == "discard":
            if session:
                session.discard = True
                self._update(key, session)
            sock.close()
            return
        if session is None:
            wire.send(sock, {"error": "it has no open streams"})
            sock.close()
            return
        client = AttachedClient(sock, stdin=bool(message.get("stdin")))
        wire.send(sock, {"tty": session.terminal is not None})
        session.clients.append(client)
        self.loop.watch(sock.fileno(), partial(self._client, key, client))
        self._update(key, session)

    def _client(self, key: ProcessKey, client: AttachedClient, events: int) -> None:
        session = self.sessions[key]
        if events & select.EPOLLOUT and not client.flush():
            self._detach(key, client)
            return
        if events & (select.EPOLLIN | select.EPOLLHUP):
            try:
                data = client.sock.recv(wire.MAX_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._detach(key, client)
                return
            kind = Kind(data[0])
            if kind is Kind.EXIT:  # the process has ended, says the one who asked: send what is left
                session.drain()
                client.push(Kind.EXIT)
                client.closing = True
            elif client.stdin or kind is Kind.RESIZE:
                session.receive(kind, data[1:])
        self._update(key, session)

    def _detach(self, key: ProcessKey, client: AttachedClient) -> None:
        session = self.sessions[key]
        session.clients.remove(client)
        # no client can attach to an exec process again: its further output is dropped
        session.discard = session.discard or (session.log is None and not session.clients)
        self.loop.unwatch(client.sock.fileno())
        client.sock.close()
        self._update(key, session)

    def _drop_watcher(self, sock: socket.socket, _events: int) -> None:
        self.loop.unwatch(sock.fileno())
        self.watchers.remove(sock)
        sock.close()

    def _notify_watchers(self, message: wire.Message) -> None:
        for sock in list(self.watchers):
            try:
                wire.send(sock, message)
            except OSError:
                continue

    # -- another build -------------------------------------------------------------------------------

    def _replace(self, sock: socket.socket, message: wire.Message, descriptors: list[int]) -> None:
        """Execute another program in this process. The client's connection is closed when that runs."""
        try:
            [program] = descriptors
            kept = [self.lock, self.listener.fileno(), *(watcher.fileno() for watcher in self.watchers)]
            kept += self.zygote.descriptors()
            for session in self.sessions.values():
                kept += [*session.names, *(client.sock.fileno() for client in session.clients)]
            reexec.execute(program, message["arguments"], message["environment"], self._state(), kept)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(_NAME, "it can't be replaced by another build", error)
            wire.send(sock, {"error": str(error)})
        for fd in descriptors:
            os.close(fd)

    def _state(self) -> dict[str, Any]:
        """The state for the next program, as JSON."""
        return {
            "lock": self.lock,
            "listener": self.listener.fileno(),
            "watchers": [watcher.fileno() for watcher in self.watchers],
            "zygote": self.zygote.state(),
            "sessions": [{"id": key[0], "exec": key[1], **session.state()} for key, session in self.sessions.items()],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.listener = socket.socket(fileno=state["listener"])
        self.watchers = [socket.socket(fileno=fd) for fd in state["watchers"]]
        self.zygote.restore(state["zygote"])
        for entry in state["sessions"]:
            session = Session.restored(entry, self._open_log(entry["origin"], entry["id"]))
            self.sessions[(entry["id"], entry["exec"])] = session

    def _resume_all(self) -> None:
        """Watch again all that the program before this one watched."""
        for watcher in self.watchers:
            self.loop.watch(watcher.fileno(), partial(self._drop_watcher, watcher))
        self.zygote.resume()
        for key, session in list(self.sessions.items()):
            if session.discard_at is not None:
                self.loop.later(max(0.0, session.discard_at - time.monotonic()), partial(self._discard_output, key))
            self._update(key, session)

    # -- sessions --------------------------------------------------------------------------------------

    def _update(self, key: ProcessKey, session: Session) -> None:
        """Watch the descriptors that the session can use now, after a change of it."""
        if not session.write():
            self._close(key, session, session.input)
        if session.throttled and not session.paused:
            session.paused = True
            self.loop.later(_PAUSE, lambda: self._resume(key, session))
        for fd in session.names:
            mask = select.EPOLLIN if session.wants(fd) else 0
            if session.stdin_buffer and fd == session.input:
                mask |= select.EPOLLOUT
            self.loop.watch(fd, partial(self._stream, key, session, fd), mask)
        for client in list(session.clients):
            if not client.flush():
                self._detach(key, client)
                return
            readable = 0 if len(session.stdin_buffer) > wire.MAX_MESSAGE else select.EPOLLIN
            mask = readable | (select.EPOLLOUT if client.backlog else 0)
            self.loop.watch(client.sock.fileno(), partial(self._client, key, client), mask)
        if not session.outputs and not session.clients and self._close_if_finished(key, session):
            self.sessions.pop(key, None)

    def _end(self, key: ProcessKey) -> None:
        """Drop a session that never had a stream."""
        session = self.sessions.get(key)
        if session and not session.names:
            session.finished = True
            self._update(key, session)

    def _discard_later(self, key: ProcessKey) -> None:
        """After the end of the process, keep its output for a while for clients that attach."""
        if session := self.sessions.get(key):
            session.discard_at = time.monotonic() + _GRACE
        self.loop.later(_GRACE, partial(self._discard_output, key))

    def _discard_output(self, key: ProcessKey) -> None:
        """Drop the output of a process that ended, and to which no client attached in time."""
        if (session := self.sessions.get(key)) and not session.clients:
            session.discard = True
            self._update(key, session)

    def _resume(self, key: ProcessKey, session: Session) -> None:
        """Read again from a process whose rate was used up."""
        session.paused = False
        session.refill()
        if self.sessions.get(key) is session:
            self._update(key, session)

    def _close_if_finished(self, key: ProcessKey, session: Session) -> bool:
        """Close the session if it had outputs and all have ended; whether that is so."""
        if not session.finished:
            return False
        for fd in list(session.names):
            self._close(key, session, fd)
        if session.log:
            session.log.close()
        self.zygote.send({"op": "close", "id": key[0], "exec": key[1]})
        return True

    def _stream(self, key: ProcessKey, session: Session, fd: int, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            if fd in session.outputs:
                if session.wants(fd) and not session.read(fd):
                    self._close(key, session, fd)
                    session.finished = not session.outputs
            elif events & (select.EPOLLERR | select.EPOLLHUP):  # the input has no reader any more
                self._close(key, session, fd)
        self._update(key, session)

    def _close(self, key: ProcessKey, session: Session, fd: int | None) -> None:
        if fd is None:
            return
        self.loop.unwatch(fd)
        if session.close(fd) == "stdin":  # its end shows inside only when the zygote's copy is closed too
            self.zygote.send({"op": "close", "id": key[0], "exec": key[1], "stream": "stdin"})


def main() -> NoReturn:
    """Run the monitor; exit if another one holds the lock.

    INSULA_MONITOR in the environment has the number of warm containers, the build and the run directory.
    """
    spares, build, run = os.environ.pop("INSULA_MONITOR").split(" ", 2)
    state = reexec.inherited()
    if state is None:
        lock = _take_lock(run)
    else:
        lock = state["lock"]
        if state["version"] > reexec.VERSION:  # of a later build: as after a kill, the zygote has all streams
            for fd in set(state["descriptors"]) - {lock}:
                os.close(fd)
            state = None
    syscalls.set_name("insula-monitor")
    os.umask(0o077)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    os.chdir("/")
    monitor = Monitor(run, build, int(spares), lock, state)
    records.replace(f"{run}/{MONITOR_PID}", f"{os.getpid()} {process.start_time(os.getpid())}\n".encode())
    records.replace(f"{run}/{MONITOR_BUILD}", f"{build}\n".encode())
    gc.freeze()
    monitor.serve()


def _take_lock(run: str) -> int:
    """The open lock file; exit if another process holds the lock for five seconds."""
    lock = os.open(f"{run}/{MONITOR_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + 5
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit("insula-monitor: another one runs")
            time.sleep(0.01)
