"""The monitor's side of the zygote: it starts the zygote, restarts it when it ends, and has a channel to it."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from insula.container import wire
from insula.container.create.steps import close_others
from insula.container.service import zygote
from insula.container.service.protocol import ZYGOTE_SOCKET
from insula.kernel.event_loop import EventLoop
from insula.log import write as report

_STEADY = 10.0  # seconds after which a zygote counts as one that works
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 2.0  # seconds between two attempts to start a zygote, doubled for each


class ZygoteSupervisor:
    """Keep a zygote running.

    `on_message` is called with each message of the zygote and its descriptors, `on_death` when it ended. `streams`
    yields the sessions that a new zygote gets copies of: the message, and the descriptors with their names.
    """

    def __init__(self, loop: EventLoop, run: str, build: str, spares: int) -> None:
        self.pid = 0
        self.on_message: Callable[[wire.Message, list[int]], None]
        self.on_death: Callable[[], None]
        self.streams: Callable[[], Iterator[tuple[wire.Message, dict[int, str]]]]
        self._loop, self._run, self._build, self._spares = loop, run, build, spares
        self._channel: socket.socket | None = None
        self._unsent: deque[wire.Message] = deque()
        self._started = -_STEADY  # when the zygote was, time.monotonic()
        self._pause = 0.0  # before the next attempt to start one

    # -- starting ----------------------------------------------------------------------------------------------------

    def ensure(self) -> None:
        """Connect to the running zygote or fork one, unless connected. What fails is tried again, for ever."""
        if self._channel is not None:
            return
        try:
            self._connect()
        except Exception as error:  # no process, no descriptor, no room below /run; or it died already
            report(self._loop.name, "the zygote does not start", error)
            self._restart()

    def _restart(self) -> None:
        """Start another zygote: at once if the last one had worked, else after a pause."""
        if self._channel is not None:
            self._loop.unwatch(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if time.monotonic() - self._started >= _STEADY:
            self._pause = 0.0
        self._loop.later(self._pause, self.ensure)
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause or _FIRST_PAUSE)

    def _connect(self) -> None:
        """Become the monitor of the running zygote, or of a new one. OSError."""
        path = f"{self._run}/{ZYGOTE_SOCKET}"
        self._started = time.monotonic()
        try:
            self._channel = wire.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            self._fork(path)
            self._channel = wire.connect(path)
        channel = self._channel
        # the zygote holds a copy of every stream too: either of the two may die
        for message, streams in self.streams():
            wire.send(channel, {"op": "hold", **message, "streams": list(streams.values())}, list(streams))
        wire.send(channel, {"op": "keep"})
        self._unsent.clear()  # a new one knows nothing of what these are about
        self.resume()

    def _fork(self, path: str) -> None:
        with wire.listen(path) as listener:
            pid = os.fork()
            if pid == 0:
                try:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    close_others([listener.fileno()])
                    zygote.main(self._run, self._build, listener, self._spares)
                except BaseException as error:
                    report("insula-zygote", "it ends", error)
                finally:
                    os._exit(1)
        self.pid = pid

    # -- the channel -------------------------------------------------------------------------------------------------

    def receive_waiting(self) -> bool:
        """Handle one message of the zygote if there is one now; whether there was."""
        if self._channel is None:
            return False
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not poll.poll(0):
            return False
        self._receive(self._channel)
        return True

    def send(self, message: wire.Message) -> None:
        """Send the zygote a message, or keep it until the channel takes it."""
        self._unsent.append(message)
        self._flush()

    def resume(self) -> None:
        """Watch the channel, if there is one."""
        if self._channel:
            self._loop.watch(self._channel.fileno(), partial(self._ready, self._channel))
            self._flush()

    def _ready(self, channel: socket.socket, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        # in the same turn of the loop somebody else may have read what there was, or the channel may have been replaced
        if events & ~select.EPOLLOUT and channel is self._channel:
            self.receive_waiting()

    def _receive(self, channel: socket.socket) -> None:
        received = wire.receive(channel)
        if received is None:
            self._restart()
            self.on_death()
            return
        self.on_message(*received)

    def _flush(self) -> None:
        """Send messages until the channel is full. It never blocks: the zygote may be waiting for the monitor to
        read."""
        channel = self._channel
        while channel and self._unsent:
            try:
                wire.send(channel, self._unsent[0], flags=socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                return  # it died, and the end of the channel will tell
            self._unsent.popleft()
        if channel and self._loop.is_watched(channel.fileno()):
            mask = select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0)
            self._loop.watch(channel.fileno(), partial(self._ready, channel), mask)

    # -- another build -----------------------------------------------------------------------------------------------

    def descriptors(self) -> list[int]:
        """The descriptors that `state` names."""
        return [self._channel.fileno()] if self._channel else []

    def state(self) -> dict[str, Any]:
        """The state for `restore` in the program that replaces this one."""
        channel = self._channel.fileno() if self._channel else None
        return {"pid": self.pid, "channel": channel, "unsent": list(self._unsent)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the zygote of the program before this one."""
        self.pid = state["pid"]
        self._unsent.extend(state["unsent"])
        if state["channel"] is not None:
            self._channel = socket.socket(fileno=state["channel"])
