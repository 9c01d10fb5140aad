"""The remains of fifty hostile or damaged instances, for an insulad that starts over them.

`Zoo.open` makes them on a daemon that runs, kills insulad, and damages what the kernel and the disk have of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from insula.client import Client
from insula.store.protocol import Put
from insula.store.sqlite import SqliteStore
from tests.support import elf
from tests.support.daemon import Daemon
from tests.support.wait import until

TENANT = "zoo"
DEEP = 1500
MANY = 20_000
_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_DETACH = 0x4206, 0x4207, 17
_libc = ctypes.CDLL(None, use_errno=True)

Damage = Callable[[Path], None]


# -- what may be where a record should be --------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(b"\0\xff{" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_json(path: Path) -> None:
    path.write_text('[{"pid": "one"}]')


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 200_000)


def endless(path: Path) -> None:
    path.write_bytes(b"{")
    os.truncate(path, 1 << 40)


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "x").touch()


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        at = os.open(path.parent, os.O_PATH)  # its whole path may be too long for an address
        sock.bind(f"/proc/self/fd/{at}/{path.name}")
        os.close(at)


def link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


DAMAGES: tuple[Damage, ...] = (garbage, empty, other_json, nested, endless, directory, fifo, unix_socket, link)


def deep(top: Path, depth: int = DEEP) -> None:
    """Directories within each other."""
    top.mkdir(parents=True, exist_ok=True)
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("dd", dir_fd=fd)
        below = os.open("dd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def odd_names(top: Path) -> None:
    for name in (b"\xff\xfe", b"a\nb", b"-rf", b" ", b"*", b"x" * 255, "ä".encode("latin-1")):
        os.mkdir(bytes(top) + b"/" + name)


def many(top: Path) -> None:
    """A huge directory."""
    (top / "one").touch()
    for number in range(MANY):
        os.link(top / "one", top / str(number))


def leave(daemon: Daemon) -> set[str]:
    """Make leftovers of no instance below the root and the run directory of a dead daemon; return the names of those
    that can't be removed, since something is mounted there."""
    instances, run = daemon.root / "instances", daemon.run
    deep(instances / "leftover-deep")
    odd_names(instances)
    fifo(instances / "leftover-fifo")
    link(instances / "leftover-link")
    unix_socket(instances / "leftover-socket")
    mounted = instances / "leftover-mount" / "upper"
    mounted.mkdir(0o755, parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(mounted)], check=True)
    for name, damage in (("directory", directory), ("fifo", fifo), ("garbage", garbage)):
        for parent in ("containers", "spares", "network/tenants"):
            damage(run / parent / f"leftover-{name}")
    return {"leftover-mount"}


# -- the zoo ---------------------------------------------------------------------------------------------------------


class Zoo:
    """`problems` are words of which each must show in a problem of the host; `lost` are instances whose own record in
    the store is damaged, so that only their names are known; `running` are those that must run as before, with their
    PIDs."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.client = Client(str(daemon.cli.socket))
        self.ids: dict[str, str] = {}
        self.pids: dict[str, int] = {}
        self.problems: list[str] = []
        self.lost: set[str] = set()
        self.running: set[str] = set()
        self._damages: list[Callable[[], object]] = []  # once insulad is dead
        self._writes: list[Put] = []
        self._traced: list[int] = []
        self._numbers = iter(range(1000))

    @classmethod
    @contextmanager
    def open(cls, daemon: Daemon) -> Iterator[Zoo]:
        """A zoo on `daemon`, whose insulad is dead."""
        zoo = cls(daemon)
        zoo._populate()
        daemon.kill("insulad")
        for damage in zoo._damages:
            damage()
        asyncio.run(zoo._damage_the_store())
        try:
            yield zoo
        finally:
            for pid in zoo._traced:
                _libc.ptrace(_PTRACE_DETACH, pid, None, None)
            for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
                if (target := line.split()[4]).startswith(f"{daemon.root}/"):
                    subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
            subprocess.run(["rm", "-rf", "--one-file-system", str(daemon.root / "instances")], check=False)

    def home(self, name: str) -> Path:
        """The directory of an instance."""
        return self.daemon.root / "instances" / self.ids[name]

    def container(self, name: str) -> Path:
        """Its run directory."""
        return self.daemon.run / "containers" / self.ids[name]

    def add(self, kind: str, *, run: bool = True, tenant: str = TENANT, runs_on: bool = False, **spec: object) -> str:
        """One more instance; its name begins with `kind`."""
        name = f"{kind}-{next(self._numbers)}"
        view = self.client.instances.run(
            tenant, "busybox", ["sleep", "3600"], start=run, name=name, stop_timeout=0, networks=[], **spec
        )
        self.ids[name] = view["instance"]["id"]
        if run:
            self.pids[name] = view["status"]["pid"]
        if runs_on:
            self.running.add(name)
        return name

    def later(self, work: Callable[..., object], *arguments: Any) -> None:
        """Done when insulad is dead."""
        self._damages.append(lambda: work(*arguments))

    def _populate(self) -> None:
        self.client.tenants.create(TENANT)
        self._states()
        self._trees()
        self._records()
        self._store()

    # -- states of processes -----------------------------------------------------------------------------------------

    def _states(self) -> None:
        for _ in range(3):
            self.add("usual", runs_on=True)
            self.later(os.kill, self.pids[self.add("stopped", runs_on=True)], signal.SIGSTOP)
        self.later(self._trace, self.add("traced", runs_on=True))
        self.client.instances.pause(TENANT, self.add("paused", runs_on=True))
        for _ in range(2):
            self.later(os.kill, self.pids[self.add("killed")], signal.SIGKILL)
            self.later(os.kill, self.pids[self.add("again", restart={"name": "always"})], signal.SIGKILL)
        if platform.machine() == elf.ONLY:
            self._leader_gone()

    def _trace(self, name: str) -> None:
        pid = self.pids[name]
        assert _libc.ptrace(_PTRACE_SEIZE, pid, None, None) == 0, os.strerror(ctypes.get_errno())
        assert _libc.ptrace(_PTRACE_INTERRUPT, pid, None, None) == 0
        os.waitpid(pid, 0x40000000)  # __WALL
        self._traced.append(pid)

    def _leader_gone(self) -> None:
        name = self.add("threads", run=False, runs_on=True)
        cli, program = self.daemon.cli.of(TENANT), self.daemon.path / "program"
        self.client.instances.remove(TENANT, name)
        script = "until [ -e /go ]; do sleep 0.05; done; exec /program"
        view = self.client.instances.run(TENANT, "busybox", ["sh", "-c", script], name=name, networks=[])
        self.ids[name], self.pids[name] = view["instance"]["id"], view["status"]["pid"]
        program.write_bytes(elf.leader_gone())
        program.chmod(0o755)
        cli.ok("cp", program, f"{name}:/program")
        cli.ok("exec", name, "touch", "/go")
        stat = Path(f"/proc/{self.pids[name]}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", "its main thread has exited")

    # -- trees ---------------------------------------------------------------------------------------------------------

    def _trees(self) -> None:
        for fill in (deep, odd_names, many):
            for kind in (f"{fill.__name__}".replace("_", "-"), f"{fill.__name__}-removed".replace("_", "-")):
                name = self.add(kind, run=False)
                self.later(fill, self.home(name) / "upper")
                self.later((self.home(name) / "upper").mkdir, 0o755, True, True)
                self._damages[-2:] = reversed(self._damages[-2:])
                if kind.endswith("removed"):  # killed between commit and removal
                    self._change(name, wanted="removed")

    # -- records of single instances -----------------------------------------------------------------------------------

    def _records(self) -> None:
        for damage in DAMAGES:
            kind = damage.__name__.replace("_", "-")
            name = self.add(f"{kind}-launch", runs_on=True)
            self._damage(damage, name, self.home(name) / "launch.json")
            name = self.add(f"{kind}-state", runs_on=True)
            self._damage(damage, name, self.container(name) / "state.json")
            name = self.add(f"{kind}-config", runs_on=True)
            self._damage(damage, name, self.container(name) / "launch.json")
        for damage in (garbage, directory, fifo):
            name = self.add(f"{damage.__name__}-exit")
            self.later(os.kill, self.pids[name], signal.SIGKILL)
            self.later(until, self.exited(name), "its end is recorded")
            self._damage(damage, name, self.container(name) / "exit.json")
        name = self.add("log", runs_on=True)
        self.later((self.home(name) / "log" / "log").unlink, True)
        self.later(fifo, self.home(name) / "log" / "log")
        for where in (self.home, self.container):
            name = self.add(f"no-{where.__name__}", run=False)
            self.later(shutil.rmtree, where(name), True)
            self.later(where(name).touch)

    def exited(self, name: str) -> Callable[[], bool]:
        return (self.container(name) / "exit.json").exists

    def _damage(self, damage: Damage, name: str, path: Path) -> None:
        self.later(damage, path)
        self.problems.append(f"{TENANT}/{name}")

    # -- the store -----------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        for kind, value in (("broken", b"{"), ("later", b""), ("nested", b"[" * 100_000), ("binary", b"\xff\0")):
            readable = kind == "later"  # a field of a later version is left out
            name = self.add(f"{kind}-record", runs_on=readable)
            if not readable:
                self.lost.add(name)
            self._writes.append(Put(f"/instances/{TENANT}/{name}", value))
            name = self.add(f"{kind}-status", runs_on=True)
            self._writes.append(Put(f"/status/{TENANT}/{name}", value))
        for tenant in ("sick", "sound"):
            self.client.tenants.create(tenant)
            self.client.networks.create(tenant, "net", "10.1.0.0/24")
        self.lost.add(self.add("orphan", tenant="sick"))
        self._writes += [Put("/tenants/sick", b"{}"), Put("/networks/sick/net", b"[]"), Put("/usage/sick", b"")]
        self.problems += ["/tenants/sick", "/networks/sick/net", "/usage/sick"]
        self._writes += [Put("/images/_/docker.io/library/odd:latest", b"{}"), Put("/events/zoo/usual-0", b"{")]

    def _change(self, name: str, **changes: object) -> None:
        """Another wanted state in the store."""
        self._writes.append(Put(f"/instances/{TENANT}/{name}", json.dumps(changes).encode()))

    async def _damage_the_store(self) -> None:
        store = SqliteStore(self.daemon.root / "state.db")
        try:
            for write in self._writes:
                value, key = write.value, write.key
                with contextlib.suppress(ValueError, KeyError, UnicodeDecodeError, RecursionError):
                    changes = json.loads(value)
                    if isinstance(changes, dict) and "wanted" in changes:  # an object with something changed
                        found = await store.get(key)
                        assert found
                        value = json.dumps({**json.loads(found.value), **changes}).encode()
                if "later-" in key:  # of a later version: there is a field that this one doesn't know
                    found = await store.get(key)
                    assert found
                    value = json.dumps({**json.loads(found.value), "unknown": 1}).encode()
                elif key.startswith(("/instances", "/status")) and value == write.value:
                    self.problems.append(key)
                await store.put(key, value)
        finally:
            await store.close()
