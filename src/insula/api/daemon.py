"""insulad: the daemon that holds the API and control.

It may end at any time, by SIGTERM or SIGKILL: instances keep running under the keeper and the spawner, and the next
start adopts them. What tells it apart from a second daemon on the same root is a lock that the kernel drops with the
process (flock(2)), so there is no stale PID file to clean up; the number in the file is for people.
"""

from __future__ import annotations

import asyncio
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

from insula import __version__
from insula.api.app import create_app
from insula.api.peer import listen
from insula.api.server import Server
from insula.control.plane import ControlPlane
from insula.control.settings import Settings
from insula.model.errors import Conflict, InsulaError

log = logging.getLogger("insula.daemon")
USAGE = """\
usage: insulad

Runs Insula on this host until SIGTERM; instances keep running without it. scripts/up installs and starts it.

environment:
  INSULA_ROOT    what must survive a reboot (/var/lib/insula)
  INSULA_RUN     what must not (/run/insula)
  INSULA_SOCKET  where the API is served (insulad.sock in INSULA_RUN)
  INSULA_PREFIX  begins the names of network namespaces, tables and control groups (insula)"""


_SWITCH = 0.001
"""Seconds after which a thread that computes gives way (sys.setswitchinterval): the event loop waits for that each time
it comes back from a system call."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock at `path`, which has our PID in it; Conflict when another daemon has it."""
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
    """Answer requests until SIGTERM or SIGINT, and leave the instances running.

    It listens before anything of an instance is looked at: none can keep it from answering.
    """
    sys.setswitchinterval(_SWITCH)
    gc.disable()  # nothing that is made until then is garbage
    plane = await ControlPlane.open(settings)
    try:
        server = Server(create_app(plane), plane.begin)
        gc.freeze()  # a full collection needn't look again and again at what stays: modules, and what runs already
        gc.enable()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop.set)
        sock = listen(settings.socket)
        log.info("listening at %s", settings.socket)
        await server.serve(sockets=[sock])
        log.info("stopping")
    finally:
        await plane.close()


def main() -> int:
    """The entry point of `insulad`; exit status 0 after SIGTERM, 1 when it can't start, 2 for a wrong command line."""
    if sys.argv[1:]:
        wanted = sys.argv[1] in ("-h", "--help", "--version")
        print(f"insulad {__version__}" if sys.argv[1] == "--version" else USAGE, file=None if wanted else sys.stderr)
        return 0 if wanted else 2
    if os.geteuid() != 0:
        print("error: insulad needs root; hint: start it with sudo, or by systemd", file=sys.stderr)
        return 1
    # the journal notes the time itself (systemd.exec(5), JOURNAL_STREAM)
    when = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(level=logging.INFO, format=when + "%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every write to a client that went away
    try:
        # the keeper and the spawner inherit it, and hold descriptors for every instance
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        settings = Settings.from_environment()
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
