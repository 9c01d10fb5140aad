"""`TlsSupervisor`: listens for insulad, runs the gate, and starts it again when it has ended.

The listening sockets are insulad's: they are bound as root, and connections wait in them while no gate runs. Once a
day, and after a rotation, the certificates are looked at; new ones go to a new gate, and the old one ends when its last
connection does, so that no request fails because of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pwd
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from insula.api.peer import BACKLOG
from insula.control.instances.restart_policy import delay
from insula.control.problems import Problems
from insula.model.errors import Failed
from insula.settings import ApiSettings, Settings, split_address

if TYPE_CHECKING:
    from insula.api.tls.certificates import Certificates

log = logging.getLogger("insula.tls")
_STEADY = 60.0  # seconds after which a gate that ends is no failed start
_DAY = 86400.0
_LONGEST_LINE = 4096


def gate_user(settings: ApiSettings) -> int:
    """Return the user ID of the gate. Failed if there is no such user: nobody else may have it."""
    if settings.user.isdigit():
        return int(settings.user)
    try:
        return pwd.getpwnam(settings.user).pw_uid
    except KeyError:
        hint = f"useradd --system --no-create-home --shell /usr/sbin/nologin {settings.user}"
        raise Failed(f"there is no user {settings.user} for HTTPS to run as", hint) from None


def listen(addresses: list[str]) -> list[socket.socket]:
    """Listen on TCP addresses. Failed for one that can't be bound."""
    sockets: list[socket.socket] = []
    try:
        for text in addresses:
            host, port = split_address(text)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, port))
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise Failed(f"{text} can't be listened at: {error.strerror}", "choose another in [api] listen") from None
    return sockets


class TlsSupervisor:
    """`told` is called with each event of the gate; see `gate.tell`."""

    def __init__(self, settings: Settings, problems: Problems, told: Callable[[dict[str, Any]], None]) -> None:
        from insula.api.tls.certificates import Certificates  # takes 50 ms, and only those who listen need it

        self.settings = settings
        self.problems = problems
        self.told = told
        self.user = gate_user(settings.api)
        self.target = settings.run / "gate.sock"
        self.certificates: Certificates = Certificates(settings.root / "pki")
        self._listeners = listen(settings.api.listen)
        self._gates: set[asyncio.subprocess.Process] = set()
        self._current: asyncio.subprocess.Process | None = None
        self._followers: set[asyncio.Future[None]] = set()
        self._shown: tuple[bytes, bytes] = (b"", b"")

    async def run(self) -> None:
        """Keep a gate running, until this is cancelled."""
        failures, loop = 0, asyncio.get_running_loop()
        renewing = asyncio.ensure_future(self._renew_daily())
        try:
            while True:
                begun = loop.time()
                try:
                    await self._start()
                    self.problems["HTTPS"] = f"the gate has ended with {await self._ended()}"
                except Exception as failure:
                    self.problems.report("HTTPS", failure)
                failures = 0 if loop.time() - begun > _STEADY else failures + 1
                await asyncio.sleep(delay(failures))
        finally:
            renewing.cancel()
            await self._stop()
            await asyncio.gather(renewing, *self._followers, return_exceptions=True)

    async def _ended(self) -> int | None:
        """Wait until the gate of now has ended, and no other has taken its place."""
        while (current := self._current) is not None:
            await current.wait()
            if self._current is current:
                return current.returncode
        return None

    def names(self) -> list[str]:
        """Return the names and addresses that the server's certificate is for."""
        hosts = [split_address(text)[0] for text in self.settings.api.listen]
        own = [socket.gethostname(), "localhost", "127.0.0.1", "::1"]
        return [*self.settings.api.names, *(host for host in hosts if host not in ("0.0.0.0", "::")), *own]

    async def _start(self) -> None:
        """Start a gate with the certificate of now."""
        chain, clients = shown = await asyncio.to_thread(self._read)
        with contextlib.ExitStack() as stack:
            files = {"certificate": chain, "key": chain, "clients": clients}
            given = {name: _file(data, stack) for name, data in files.items()}
            listeners = [each.fileno() for each in self._listeners]
            work = {
                **given,
                "listeners": listeners,
                "target": str(self.target),
                "user": self.user,
                "parent": os.getpid(),
            }
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-m",
                "insula.api.tls.gate",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=[*given.values(), *listeners],
                env={"PATH": os.defpath},
                limit=_LONGEST_LINE,
            )
        assert process.stdin
        process.stdin.write(json.dumps(work).encode() + b"\n")
        process.stdin.close()
        self._gates.add(process)
        self._current, self._shown = process, shown
        follower = asyncio.ensure_future(self._follow(process))
        self._followers.add(follower)
        follower.add_done_callback(self._followers.discard)

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what a gate tells, until it ends."""
        assert process.stdout
        try:
            while line := await process.stdout.readline():
                event = json.loads(line)
                if event.get("event") == "ready":
                    self.problems.solved("HTTPS")
                self.told(event)
        except ValueError as error:  # a line that is too long, or no JSON: it is not what we have started
            log.error("the gate tells %s", error)
            process.kill()
        finally:
            await process.wait()
            self._gates.discard(process)

    async def _renew_daily(self) -> None:
        while True:
            await asyncio.sleep(_DAY)
            await self.problems.guard("certificate of HTTPS", self.renew())

    def _read(self) -> tuple[bytes, bytes]:
        """Return the server's key and certificates, and the authorities of clients. Blocks."""
        return self.certificates.server(self.names()).read_bytes(), self.certificates.trusted("client")

    async def renew(self, *, now: bool = False) -> None:
        """Replace the gate if it has other certificates than those of now. The old one passes on what it has, and
        accepts nothing; with `now` it ends, and its connections with it."""
        old = self._current
        if old is None or await asyncio.to_thread(self._read) == self._shown:
            return
        await self._start()
        with contextlib.suppress(ProcessLookupError):
            old.send_signal(signal.SIGKILL if now else signal.SIGTERM)

    async def _stop(self) -> None:
        """End the gates: connections end with insulad anyway."""
        for process in tuple(self._gates):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*(process.wait() for process in self._gates))
        for sock in self._listeners:
            sock.close()


def _file(data: bytes, stack: contextlib.ExitStack) -> int:
    """Return the descriptor of an unnamed file with `data`, which the gate opens again by /proc/self/fd."""
    fd = os.memfd_create("tls", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.write(fd, data)
    return fd
