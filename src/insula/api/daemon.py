"""insulad: the daemon with the API and the control plane.

It may end at any time, by SIGTERM or SIGKILL: instances keep running under the monitor and the zygote, and the next
start adopts them. A lock (flock(2)) prevents a second daemon on the same root. The kernel releases it with the process,
so there is no stale PID file to clean up; the PID in the file is for people.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from insula import __version__
from insula.api.app import create_app
from insula.api.audit import record_event, record_malformed
from insula.api.outbox import Outbox
from insula.api.peer import group_id, listen
from insula.api.server import GateSocket, Server
from insula.audit.chain import ChainHead
from insula.audit.writer import AuditLog
from insula.control.plane import ControlPlane
from insula.control.problems import Problems
from insula.log import set_up
from insula.model.errors import Conflict, Denied, InsulaError
from insula.settings import ENVIRONMENT, LEVELS, Settings, load

if TYPE_CHECKING:
    from insula.api.tls.supervisor import TlsSupervisor

log = logging.getLogger("insula.daemon")
OPTIONS = (
    ("--config FILE", "settings (INSULA_CONFIG, else /etc/insula/insulad.toml if that exists); see insulad.toml(5)"),
    ("--check", "check the settings and exit: status 0 if they are valid, else 1"),
    ("--log-level LEVEL", "error, warning, info or debug, overriding the settings"),
    ("--version", "show the version"),
    ("-h --help", "show this help"),
)
"""The options of insulad: names with value, and their help."""
DESCRIPTION = """\
Runs Insula on this host until SIGTERM; instances keep running without it. scripts/up installs and starts it."""


_SWITCH = 0.001
"""Seconds after which a running thread releases the interpreter's lock (sys.setswitchinterval): the event loop waits up
to that long after each system call."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`, which contains our PID; Conflict if another daemon has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode("ascii", "replace").strip() or "unknown"
            raise Conflict(
                f"another insulad (process {pid}) has {path.parent}", "stop it, or choose another INSULA_ROOT"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(fd)


async def serve(settings: Settings) -> None:
    """Serve requests until SIGTERM or SIGINT, and leave the instances running.

    It listens before it reads any instance, so that no instance can prevent it from starting.
    """
    sys.setswitchinterval(_SWITCH)
    gc.disable()  # objects made until then are not garbage
    plane = await ControlPlane.open(settings)
    outbox = Outbox(plane.context.store, plane.context.problems)
    audit = await _audit_log(settings, plane.context.problems, outbox)
    try:
        https = _https(settings, plane, audit)
        app = create_app(plane, audit, str(settings.socket), https and https[0], outbox)
        server = Server(
            app, plane.begin, https and https[1], lambda peer, client: record_malformed(audit, peer, client)
        )
        gc.freeze()  # a full collection need not scan permanent objects: modules, and running instances
        gc.enable()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop.set)
        sockets = [listen(settings.socket), listen(settings.users_socket, everybody=True)]
        log.info("listening at %s and %s", settings.socket, settings.users_socket)
        if https:
            plane.tasks.spawn(https[0].run())
        await server.serve(sockets=sockets)
        log.info("stopping")
    finally:
        outbox.close()
        await asyncio.to_thread(audit.close)
        await plane.close()


def _https(settings: Settings, plane: ControlPlane, audit: AuditLog) -> tuple[TlsSupervisor, GateSocket] | None:
    """Listen for HTTPS if the settings say so. What prevents that is a problem of this host: the sockets serve on."""
    if not settings.api.listen:
        return None
    from insula.api.tls.supervisor import TlsSupervisor

    def told(event: dict[str, Any]) -> None:
        if event.get("event") != "ready":
            record_event(audit, event)

    try:
        supervisor = TlsSupervisor(settings, plane.context.problems, told)
        gate = GateSocket(listen(supervisor.target, owner=supervisor.user), supervisor.user)
    except InsulaError as error:
        plane.context.problems.report("HTTPS", error)
        return None
    return supervisor, gate


async def _audit_log(settings: Settings, problems: Problems, outbox: Outbox) -> AuditLog:
    """Open the audit log, with what the last insulad has left in the store. While it can't be written, `insula status`
    shows a problem, and from some number of lines on changes are refused."""
    loop = asyncio.get_running_loop()

    def tell(trouble: str | None) -> None:
        if trouble:
            problems["audit log"] = trouble
        else:
            problems.solved("audit log")

    def told(trouble: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, trouble)

    def recovered() -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(outbox.release_all)

    def headed(head: ChainHead) -> None:
        log.info("the head of the audit log is %s", head)

    wanted = settings.audit
    stored, intents = await outbox.load()
    audit = AuditLog(
        Path(wanted.path),
        wanted.size_bytes,
        wanted.files,
        group_id(),
        told,
        key=settings.root / "audit.key",
        stored=stored if stored and stored.seq else None,
        intents=intents,
        seen_by=Path(wanted.witness) if wanted.witness else None,
        headed=headed,
        recovered=recovered,
    )
    outbox.head = lambda: audit.head
    return audit


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line, as all commands of Insula do."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; hint: see `insulad --help`", file=sys.stderr)
        sys.exit(2)


def _arguments() -> argparse.Namespace:
    """Parse the command line; exits with status 0 after --help and --version, 2 if it is wrong."""
    variables = "\n".join(f"  {name:17} {key} of the settings" for name, key in ENVIRONMENT.items())
    parser = _Parser(
        prog="insulad",
        description=DESCRIPTION,
        epilog=f"environment, over the file:\n{variables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    for names, text in OPTIONS:
        flags = [word for word in names.split() if word.startswith("-")]
        if names == "-h --help":
            parser.add_argument(*flags, action="help", help=text)
        elif names == "--version":
            parser.add_argument(*flags, action="version", version=f"insulad {__version__}", help=text)
        elif names == "--check":
            parser.add_argument(*flags, action="store_true", help=text)
        else:
            levels = LEVELS if names.startswith("--log-level") else None
            parser.add_argument(*flags, metavar=names.split()[-1], choices=levels, help=text)
    return parser.parse_args()


def _settings(given: argparse.Namespace) -> Settings:
    """Load the settings as the command line requires. `Invalid`."""
    environ = {**os.environ, **({"INSULA_LOG_LEVEL": given.log_level} if given.log_level else {})}
    return load(Path(given.config) if given.config else None, environ)


def main() -> int:
    """Run `insulad`; exit status 0 after SIGTERM, 1 if it can't start, 2 for a wrong command line."""
    given = _arguments()
    try:
        settings = _settings(given)
        if given.check:
            print("the settings are valid")
            return 0
        if os.geteuid() != 0:
            raise Denied("insulad needs root", "start it with sudo, or by systemd")
        set_up(settings.log_level)
        # inherited by the monitor and the zygote, which have descriptors for every instance
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        settings.make()
        with locked(settings.root / "insulad.pid"):
            asyncio.run(serve(settings))
    except InsulaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: insulad can't start: {error}; hint: start it as root", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
