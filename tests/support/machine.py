"""Runs all tests in PID, mount and network namespaces of their own.

    /proc       shows the tests' own processes only, so that a snapshot of it is exact
    mounts      are shared among themselves, as under systemd, and vanish with the last process
    network     has a loopback device and nothing else: no packet of a test leaves it
    PID 1       is tini, an init that reaps orphans; if the tests are killed, the kernel kills what they started

Control groups and files are the host's, under names that begin with the run's prefix. A lock tells which runs
live; what a dead one left is removed by the next.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from insula.control.instances.drivers.container.terminals import Terminals
from tests.support.launcher import Launcher

MARK = "INSULA_TEST_MACHINE"
RUNS = Path("/tmp/insula-test")
CGROUPS = Path("/sys/fs/cgroup")
NETNS = Path("/run/netns")
ENTER = (
    "unshare --pid --kill-child --mount-proc --mount --net --ipc --uts --propagation private "
    "sh -c 'mount --make-rshared / && ip link set lo up && exec \"$@\"' sh tini -s -g --"
)


def inside() -> bool:
    """Whether this process runs in such a machine already."""
    return MARK in os.environ


def possible() -> bool:
    """Whether one can be made: it takes root and three programs."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("unshare", "ip", "tini"))


def enter(module: str) -> NoReturn:
    """Replaces this process by `python -m module` with the same arguments inside a new machine."""
    shell = f'exec {ENTER} "$@"'
    os.environ[MARK] = "1"
    os.environ["PATH"] = f"/usr/sbin:/sbin:{os.environ['PATH']}"
    os.execvp("sh", ["sh", "-c", shell, "sh", sys.executable, "-m", module, *sys.argv[1:]])


class Run:
    """One run of the tests: a directory for its daemons, and a lock that says that it lives."""

    def __init__(self) -> None:
        RUNS.mkdir(mode=0o711, exist_ok=True)
        remove_dead_runs()
        self.name = f"it{secrets.token_hex(2)}"
        self.path = RUNS / self.name
        self._daemons = itertools.count()
        making = RUNS / f".{self.name}"  # another run takes one without a lock for dead
        making.mkdir()
        self._lock = (making / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        making.rename(self.path)
        self._launcher: Launcher | None = None

    def next_prefix(self) -> str:
        """For one more daemon; at most eight characters."""
        return f"{self.name}{next(self._daemons):02x}"

    def launcher(self) -> Launcher:
        """What starts the daemons; it runs from the first use on."""
        self._launcher = self._launcher or Launcher()
        return self._launcher

    def close(self) -> None:
        if self._launcher:
            self._launcher.close()
        remove_cgroups(self.name)
        remove_tree(self.path)
        self._lock.close()


def remove_dead_runs() -> None:
    """Remove control groups and files of runs whose lock is free."""
    for path in RUNS.glob("it*"):
        try:
            with open(path / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for run in path.glob("*/run"):
                    put_back_terminals(run)
                remove_cgroups(path.name)
                for name in NETNS.glob(f"{path.name}*"):
                    name.unlink()  # the namespace went with its mount
                remove_tree(path)
        except FileNotFoundError:
            remove_tree(path)
        except BlockingIOError:
            continue


def remove_tree(path: Path) -> None:
    """Remove a directory; rm(1), because what a killed run leaves may be nested deeper than Python recurses."""
    subprocess.run(["rm", "-rf", path], stderr=subprocess.DEVNULL, check=False)


def put_back_terminals(run: Path) -> None:
    """What kernel.pty.max was before the daemon with that run directory raised it: it is the whole machine's.

    Where a daemon of another test raised it further, that one puts back what it was before both.
    """
    record = run / "terminals"
    with suppress(FileNotFoundError, ValueError):
        before, ours = record.read_text().split()
        for other in RUNS.glob("*/*/run/terminals"):
            with suppress(FileNotFoundError, ValueError):
                theirs = other.read_text().split()
                if theirs[0] == ours and other != record:
                    other.write_text(f"{before} {theirs[1]}")
        Terminals(record).restore()


def remove_cgroups(prefix: str) -> None:
    """Every control group whose path begins with `prefix`, in every hierarchy; what is killed may be on its way out."""
    tops = [*CGROUPS.glob(f"{prefix}*"), *CGROUPS.glob(f"*/{prefix}*")]
    for top in tops:  # a frozen process doesn't even die
        for name, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            for path in top.rglob(name):
                path.write_text(word)
    for _ in range(50):
        for top in tops:
            for directory, _, files in os.walk(top, topdown=False):
                for name in files:  # podman's, where no hierarchy is mounted; those of a control group stay
                    with suppress(OSError):
                        os.unlink(f"{directory}/{name}")
                with suppress(OSError):
                    os.rmdir(directory)
        if not any(top.exists() for top in tops):
            return
        time.sleep(0.1)
    raise OSError(f"processes are left in the control groups {prefix}*")


class Namespaces:
    """The network of one private host: its own namespace, and behind an uplink another that plays the outside.

    The host is 198.18.0.2/24 and 2001:2:0:ffff::2/64, the outside .1 and ::1 (RFC 2544, RFC 5180).
    """

    OUTSIDE = "198.18.0.1"
    OUTSIDE6 = "2001:2:0:ffff::1"

    def __init__(self) -> None:
        self._holders = [self._hold(), self._hold()]
        self.host, self.outside = (f"/proc/{p.pid}/ns/net" for p in self._holders)
        self.ip(self.host, "link add uplink0 type veth peer name host0 netns " + str(self._holders[1].pid))
        for namespace, device, last in ((self.host, "uplink0", 2), (self.outside, "host0", 1)):
            self.ip(namespace, f"link set {device} addrgenmode none up")
            self.ip(namespace, f"address add 198.18.0.{last}/24 dev {device}")
            self.ip(namespace, f"address add 2001:2:0:ffff::{last}/64 dev {device} nodad")
        self.ip(self.host, f"route add default via {self.OUTSIDE}")
        self.ip(self.host, f"-6 route add default via {self.OUTSIDE6}")

    @staticmethod
    def _hold() -> subprocess.Popen[str]:
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep infinity"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        return holder

    @staticmethod
    def wrap(namespace: str, *command: str) -> list[str]:
        """`command`, to be run in that namespace."""
        return ["nsenter", f"--net={namespace}", *command]

    def ip(self, namespace: str, arguments: str) -> str:
        """The output of ip(8) in that namespace."""
        command = self.wrap(namespace, "ip", *arguments.split())
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def close(self) -> None:
        for holder in self._holders:
            with holder:  # closes our end of its output, too
                holder.kill()
