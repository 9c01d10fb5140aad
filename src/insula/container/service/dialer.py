"""Connections to the monitor and the zygote, for asyncio code; a monitor is started while there is none."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import insula
from insula.container import wire
from insula.kernel import sealed
from insula.model.errors import Failed

log = logging.getLogger("insula.container")
TIMEOUT = 30.0  # seconds for the monitor or the zygote to come back, on a busy host too
_STEADY = 10.0  # seconds after which a monitor counts as one that works
_LONGEST_PAUSE = 2.0  # seconds between attempts to start one


class Dialer:
    """Who connects to the sockets in the run directory. `spares` is for the monitor."""

    def __init__(self, run: str, spares: int) -> None:
        self.run = run
        self.spares = spares
        self.trouble: str | None = None  # why there is no monitor
        self._monitor: subprocess.Popen[bytes] | None = None  # the last one that was started here
        self._pause = 0.0  # between starts of a monitor that doesn't live
        self._not_before = -_STEADY

    async def dial(self, name: str) -> socket.socket:
        """Connect, starting a monitor (which starts the zygote) while there is nobody to answer."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                sock = wire.connect(f"{self.run}/{name}")
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > deadline:
                    what = f"the monitor does not start: {self.trouble or error.strerror}"
                    raise Failed(what, "see the daemon's log") from None
                self._ensure_monitor()
                await asyncio.sleep(0.005)
                continue
            self.trouble = None
            sock.setblocking(False)
            return sock

    def _ensure_monitor(self) -> None:
        """Start one unless one was started that lives; after a pause if the last one ended at once, as it may again."""
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
        library = str(Path(insula.__file__).parent.parent)
        code = (
            f"import sys; sys.path.insert(0, {library!r}); from insula.container.service.monitor import main; main()"
        )
        program = sealed.copy()
        try:
            return subprocess.Popen(
                [sys.executable, "-ISE", "-c", code],
                # not as arguments: those can be read in a container by whom a process joins, until it is the program
                env={**os.environ, "INSULA_MONITOR": f"{self.spares} {self.run}"},
                executable=f"/proc/{os.getpid()}/fd/{program}",
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(program)
