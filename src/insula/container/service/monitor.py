"""The monitor: the one process that containers need while nobody asks for anything.

It holds what must outlive the daemon: the streams of every container, relayed to their logs and to whoever is
attached; and the right to learn how a container ended. Exit statuses go to a process's parent. That is the zygote,
and if the zygote dies the kernel gives its children to the nearest ancestor that asked for them with
PR_SET_CHILD_SUBREAPER (prctl(2)): the monitor, which then records their ends. It forks the zygote, and a new one
whenever that dies. If the monitor dies, the zygote still holds every stream and goes on reaping; the daemon
starts another monitor, which takes over the streams.

One socket, one request: {"op": "attach", "id", "exec", "stdin"}; the answer is {"tty"} or {"error"},
and from then on frames go both ways. {"op": "watch"} asks to be told of ends: {"event": "exit", "id", "exec"}.
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
from collections import deque
from functools import partial
from typing import NoReturn

from insula.container import wire
from insula.container.create.steps import close_others
from insula.container.log import LogWriter
from insula.container.service import zygote
from insula.container.service.eventloop import EventLoop
from insula.container.service.protocol import MONITOR_LOCK, MONITOR_PID, MONITOR_SOCKET, ZYGOTE_SOCKET
from insula.container.service.relay import Client, Session
from insula.container.service.run_directory import PidIndex
from insula.kernel import linux, process
from insula.log import write as report
from insula.model.stream import Kind

Key = tuple[str, str | None]

_NAME = "insula-monitor"
_STEADY = 10.0  # seconds after which a zygote counts as one that works
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 2.0  # seconds between two attempts to start a zygote, doubled for each
_GRACE = 10.0  # seconds after its end in which one may still attach to a process that joined
_PAUSE = 0.05  # seconds in which a process that prints too much is not read from


class Monitor:
    """The state of the process: its zygote, the sessions it relays, who watches."""

    def __init__(self, run: str, spares: int) -> None:
        self.run = run
        self.spares = spares
        self.loop = EventLoop(_NAME)
        self.sessions: dict[Key, Session] = {}
        self.watchers: list[socket.socket] = []
        self.pids = PidIndex(run)
        self.zygote_pid = 0
        self.channel: socket.socket | None = None
        self.started = -_STEADY  # when the zygote was
        self.pause = 0.0  # before the next attempt to start one
        self.unsent: deque[wire.Message] = deque()
        self.listener = wire.listen(f"{run}/{MONITOR_SOCKET}")

    def serve(self) -> NoReturn:
        wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.loop.watch(wakeup, lambda _: self._reap_children(wakeup))
        self.loop.watch(self.listener.fileno(), lambda _: self._accept())
        self._ensure_zygote()
        self.loop.run()

    # -- the zygote -----------------------------------------------------------------------------------

    def _ensure_zygote(self) -> None:
        """Find the zygote that lives or fork one, unless there is one. What fails is tried again, for ever."""
        if self.channel is not None:
            return
        try:
            self._connect_zygote()
        except Exception as error:  # no process, no descriptor, no room below /run; or it died already
            report(_NAME, "the zygote does not start", error)
            self._restart_zygote()

    def _restart_zygote(self) -> None:
        """There is none: have another one, at once if the last one had worked, else after a pause."""
        if self.channel is not None:
            self.loop.unwatch(self.channel.fileno())
            self.channel.close()
            self.channel = None
        if time.monotonic() - self.started >= _STEADY:
            self.pause = 0.0
        self.loop.later(self.pause, self._ensure_zygote)
        self.pause = min(_LONGEST_PAUSE, 2 * self.pause or _FIRST_PAUSE)

    def _connect_zygote(self) -> None:
        """Become the monitor of the zygote that lives, or of a new one. OSError."""
        path = f"{self.run}/{ZYGOTE_SOCKET}"
        self.started = time.monotonic()
        try:
            self.channel = wire.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            self._fork_zygote(path)
            self.channel = wire.connect(path)
        channel = self.channel
        # a new zygote holds a copy of every stream too: either may die
        for key, session in self.sessions.items():
            message = {"op": "hold", "id": key[0], "exec": key[1], **session.origin}
            wire.send(channel, {**message, "streams": list(session.names.values())}, list(session.names))
        wire.send(channel, {"op": "keep"})
        self.unsent.clear()  # a new one knows nothing of what the last was to be told
        self.loop.watch(channel.fileno(), partial(self._channel, channel))

    def _channel(self, channel: socket.socket, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush_channel()
        if events & ~select.EPOLLOUT:
            self._on_zygote_message(channel)

    def _fork_zygote(self, path: str) -> None:
        with wire.listen(path) as listener:
            pid = os.fork()
            if pid == 0:
                try:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    close_others([listener.fileno()])
                    zygote.main(self.run, listener, self.spares)
                except BaseException as error:
                    report("insula-zygote", "it ends", error)
                finally:
                    os._exit(1)
        self.zygote_pid = pid

    def _on_zygote_message(self, channel: socket.socket) -> None:
        received = wire.receive(channel)
        if received is None:
            self._restart_zygote()
            for key in [k for k, session in self.sessions.items() if not session.names]:
                self._end(key)  # it was still being born, and died with the zygote
            return
        message, descriptors = received
        key = (message["id"], message["exec"])
        if message["op"] == "ended":
            self._end(key)
            if key[1] is None and (session := self.sessions.get(key)):
                session.reset_quota()
                self._update(key, session)
            self.loop.later(_GRACE, lambda: self._discard_output(key))
            return
        if key not in self.sessions:
            log = None
            if message["log"]:
                try:
                    log = LogWriter(message["log"], message["log_size"], message["log_files"])
                except OSError as error:
                    report(_NAME, f"no log for {message['id']}", error)
            discard = bool(message["log"]) and log is None
            origin = {name: message[name] for name in ("tty", "stdin", "log", "log_size", "log_files")}
            self.sessions[key] = Session(log, origin, discard=discard)
        session = self.sessions[key]
        for name, fd in zip(message["streams"], descriptors, strict=False):
            session.add(name, fd)
        self._update(key, session)

    def _reap_children(self, wakeup: int) -> None:
        """SIGCHLD: the zygote, or a child that it left behind."""
        with contextlib.suppress(BlockingIOError):
            os.read(wakeup, 4096)
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid == self.zygote_pid:
                self.zygote_pid = 0  # the end of its channel is what starts another
            else:
                try:
                    self._record_end(ended.si_pid)
                except Exception as error:
                    report(_NAME, f"the end of process {ended.si_pid} is not recorded", error)
            os.waitpid(ended.si_pid, 0)  # only now: who is killed before has lost nothing

    def _record_end(self, pid: int) -> None:
        if found := self.pids.find(pid):
            directory, exec_id = found
            directory.record_exit(process.status_of_dead(pid), exec_id)
            self.loop.later(_GRACE, lambda: self._discard_output((directory.id, exec_id)))
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
            message, _ = received
            if message["op"] == "watch":
                self.watchers.append(sock)
                self.loop.watch(sock.fileno(), lambda _: self._drop_watcher(sock))
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
        while key not in self.sessions and self.channel and _readable(self.channel):
            self._on_zygote_message(self.channel)
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
        client = Client(sock, stdin=bool(message.get("stdin")))
        wire.send(sock, {"tty": session.terminal is not None})
        session.clients.append(client)
        self.loop.watch(sock.fileno(), partial(self._client, key, client))
        self._update(key, session)

    def _client(self, key: Key, client: Client, events: int) -> None:
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

    def _detach(self, key: Key, client: Client) -> None:
        session = self.sessions[key]
        session.clients.remove(client)
        # nobody comes back to a process that joined: what it still prints is nobody's
        session.discard = session.discard or (session.log is None and not session.clients)
        self.loop.unwatch(client.sock.fileno())
        client.sock.close()
        self._update(key, session)

    def _drop_watcher(self, sock: socket.socket) -> None:
        self.loop.unwatch(sock.fileno())
        self.watchers.remove(sock)
        sock.close()

    def _notify_watchers(self, message: wire.Message) -> None:
        for sock in list(self.watchers):
            try:
                wire.send(sock, message)
            except OSError:
                continue

    # -- sessions --------------------------------------------------------------------------------------

    def _update(self, key: Key, session: Session) -> None:
        """Bring what is polled in line with what the session wants, after anything happened to it."""
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

    def _end(self, key: Key) -> None:
        """Drop a session that never had a stream."""
        session = self.sessions.get(key)
        if session and not session.names:
            session.finished = True
            self._update(key, session)

    def _discard_output(self, key: Key) -> None:
        """Drop the output of a process that ended and that nobody attached to in time."""
        if (session := self.sessions.get(key)) and not session.clients:
            session.discard = True
            self._update(key, session)

    def _resume(self, key: Key, session: Session) -> None:
        """Read again from a process that had printed too much."""
        session.paused = False
        session.refill()
        if self.sessions.get(key) is session:
            self._update(key, session)

    def _close_if_finished(self, key: Key, session: Session) -> bool:
        """Whether every output came to its end, rather than not having begun: then the session is closed."""
        if not session.finished:
            return False
        for fd in list(session.names):
            self._close(key, session, fd)
        if session.log:
            session.log.close()
        self._send_zygote({"op": "close", "id": key[0], "exec": key[1]})
        return True

    def _stream(self, key: Key, session: Session, fd: int, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            if fd in session.outputs:
                if session.wants(fd) and not session.read(fd):
                    self._close(key, session, fd)
                    session.finished = not session.outputs
            elif events & (select.EPOLLERR | select.EPOLLHUP):  # nobody reads the input any more
                self._close(key, session, fd)
        self._update(key, session)

    def _close(self, key: Key, session: Session, fd: int | None) -> None:
        if fd is None:
            return
        self.loop.unwatch(fd)
        if session.close(fd) == "stdin":  # its end shows inside only when the zygote's copy is closed too
            self._send_zygote({"op": "close", "id": key[0], "exec": key[1], "stream": "stdin"})

    def _send_zygote(self, message: wire.Message) -> None:
        self.unsent.append(message)
        self._flush_channel()

    def _flush_channel(self) -> None:
        """Send what the channel takes. Never wait: the zygote may itself be waiting for us to read."""
        channel = self.channel
        while channel and self.unsent:
            try:
                wire.send(channel, self.unsent[0], flags=socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                return  # it died, and the end of the channel will tell
            self.unsent.popleft()
        if channel and self.loop.is_watched(channel.fileno()):
            mask = select.EPOLLIN | (select.EPOLLOUT if self.unsent else 0)
            self.loop.watch(channel.fileno(), partial(self._channel, channel), mask)


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def main() -> NoReturn:
    """Run the monitor; exit if another one holds the lock.

    INSULA_MONITOR in the environment has the number of warm containers and the run directory.
    """
    spares, run = os.environ.pop("INSULA_MONITOR").split(" ", 1)
    lock = os.open(f"{run}/{MONITOR_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + 5
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit("insula-monitor: another one runs")
            time.sleep(0.01)
    linux.set_name("insula-monitor")
    os.umask(0o077)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    os.chdir("/")
    with open(f"{run}/{MONITOR_PID}", "w") as file:
        file.write(f"{os.getpid()} {process.start_time(os.getpid())}\n")
    gc.freeze()
    Monitor(run, int(spares)).serve()
