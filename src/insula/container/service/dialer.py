"""Connections to the monitor and the zygote, for asyncio code.

They are started while there are none, and replaced if they are of another build. A monitor is asked to execute this
build's program in its place (`insula.container.service.monitor`), a zygote to end, so that the monitor starts one of
this build. Version 0.1.0 knows neither request, and is killed: the streams are handed over as after any kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import insula
from insula.container import wire
from insula.container.service.build import build
from insula.container.service.protocol import MONITOR_PID, MONITOR_SOCKET, ZYGOTE_PID, ZYGOTE_SOCKET, hello
from insula.kernel import process, sealed
from insula.model.errors import Failed

log = logging.getLogger("insula.container")
TIMEOUT = 30.0  # seconds for the monitor or the zygote to come back, on a busy host too
_STEADY = 10.0  # seconds after which a monitor counts as one that works
_LONGEST_PAUSE = 2.0  # seconds between attempts to start one
_REPLACED = 10.0  # seconds for a process to be replaced by one of this build
_PID_FILES = {MONITOR_SOCKET: MONITOR_PID, ZYGOTE_SOCKET: ZYGOTE_PID}
_NAMES = {MONITOR_SOCKET: "monitor", ZYGOTE_SOCKET: "zygote"}


class Dialer:
    """Connects to the sockets in the run directory. `spares` is the number of warm containers, for the monitor."""

    def __init__(self, run: str, spares: int) -> None:
        self.run = run
        self.spares = spares
        self.trouble: str | None = None  # why there is no monitor
        self._monitor: subprocess.Popen[bytes] | None = None  # the last one that was started here
        self._pause = 0.0  # between starts of a monitor that doesn't live
        self._not_before = -_STEADY

    async def dial(self, name: str) -> socket.socket:
        """Connect to a socket, and start a monitor if there is none, which starts the zygote. `Failed` after `TIMEOUT`
        s."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                sock = wire.connect(f"{self.run}/{name}")
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > deadline:
                    what = f"the monitor does not start: {self.trouble or error.strerror}"
                    raise Failed(what, "see the daemon's log") from None
                if name == MONITOR_SOCKET or not self._has_monitor():
                    self._ensure_monitor()
                await asyncio.sleep(0.005)
                continue
            self.trouble = None
            sock.setblocking(False)
            return sock

    def _has_monitor(self) -> bool:
        """Whether a monitor listens: it is then about to start a zygote."""
        try:
            wire.connect(f"{self.run}/{MONITOR_SOCKET}").close()
        except OSError:
            return False
        return True

    # -- another build -----------------------------------------------------------------------------------------------

    async def replace_others(self) -> None:
        """Have the monitor and the zygote replaced if they are of another build. Logs what can't be."""
        await asyncio.to_thread(build)  # it reads files; from here on it is known
        for name in (MONITOR_SOCKET, ZYGOTE_SOCKET):  # in this order: the monitor forks the zygote
            try:
                await self._replace(name)
            except OSError as error:
                log.error("the %s is of another build, and can't be replaced: %s", _NAMES[name], error)

    async def _replace(self, name: str) -> None:
        deadline = time.monotonic() + _REPLACED
        asked = False
        while time.monotonic() < deadline:
            with await self.dial(name) as sock:
                answer = await self._ask(sock, {"op": "hello", **hello(build())})
                if answer.get("build") == build():
                    return
                if not asked:
                    log.info("replacing the %s of build %s", _NAMES[name], answer.get("build", "0.1.0"))
                    asked = True
                    if not answer.get("protocol") or not await self._ask_to_go(name, sock):
                        await asyncio.to_thread(self._kill, name)
            await asyncio.sleep(0.01)
        log.error("the %s is of another build, and was not replaced in time", _NAMES[name])

    async def _ask_to_go(self, name: str, sock: socket.socket) -> bool:
        """Ask the process behind `sock` to be replaced; False if it can't."""
        request: wire.Message = {"op": "replace"}
        descriptors: list[int] = []
        if name == MONITOR_SOCKET:
            arguments, environment = self._command()
            request |= {"arguments": arguments, "environment": environment}
            descriptors = [await asyncio.to_thread(sealed.copy)]
        try:
            answer = await self._ask(sock, request, descriptors)
        finally:
            for fd in descriptors:
                os.close(fd)
        if error := answer.get("error"):
            log.error("the %s can't be replaced: %s", _NAMES[name], error)
        return "error" not in answer

    async def _ask(self, sock: socket.socket, request: wire.Message, descriptors: list[int] | None = None) -> Any:
        """The answer; {} if the connection ended instead. TimeoutError."""
        try:
            wire.send(sock, request, descriptors)  # the first messages on a connection: there is room for them
            async with asyncio.timeout(_REPLACED):
                data = await asyncio.get_running_loop().sock_recv(sock, wire.MAX_MESSAGE)
        except ConnectionError:
            return {}
        return json.loads(data) if data else {}

    def _kill(self, name: str) -> None:
        """Kill the process whose PID the run directory has."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid, started = map(int, Path(self.run, _PID_FILES[name]).read_text().split())
            pidfd = process.open_process(pid, started)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    # -- starting ----------------------------------------------------------------------------------------------------

    def _ensure_monitor(self) -> None:
        """Start one unless one was started that lives; after a pause if the last one ended at once."""
        now = time.monotonic()
        if now < self._not_before or (self._monitor and self._monitor.poll() is None):
            return
        if self._monitor:
            self.trouble = f"it ended with status {self._monitor.returncode}, and is started again"
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause or 0.05) if now < self._not_before + _STEADY else 0.0
        self._not_before = now + self._pause
        try:
            self._monitor = self._start_monitor()
        except OSError as error:
            self.trouble = f"it can't be started: {error}"
            log.error("monitor: %s", self.trouble)

    def _start_monitor(self) -> subprocess.Popen[bytes]:
        """A sealed Python without site-packages, in its own session; the second of two ends at once at its lock."""
        arguments, environment = self._command()
        program = sealed.copy()
        try:
            return subprocess.Popen(
                arguments,
                env={**os.environ, **environment},
                executable=f"/proc/{os.getpid()}/fd/{program}",
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(program)

    def _command(self) -> tuple[list[str], dict[str, str]]:
        """The arguments of this build's monitor, and what it has in its environment besides ours."""
        library = os.path.realpath(Path(insula.__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {library!r}); from insula.container.service.monitor import main; main()"
        # not as arguments: those can be read in a container by whom a process joins, until it is the program
        return [sys.executable, "-ISE", "-c", code], {"INSULA_MONITOR": f"{self.spares} {build()} {self.run}"}
