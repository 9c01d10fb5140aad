"""Snapshots of the host before and after an operation; the difference shows what it has left behind."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from tests.support.machine import CGROUPS, RUNS, Namespaces
from tests.support.wait import until

PASSING = ("insula-warm\n", "insula-umount\n")
STATE = re.compile(r"(state\.db(-wal|-shm)?|audit\.key)$")
"""Files that come and go by themselves: the key of the audit log is written a second after the first entry."""


@dataclass(frozen=True)
class Snapshot:
    """Names of all objects of each kind; `difference` compares two."""

    processes: frozenset[str]
    namespaces: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    devices: frozenset[str]
    routes: frozenset[str]
    rules: frozenset[str]
    files: frozenset[str]

    @classmethod
    def take(cls, prefix: str, namespace: str, *directories: Path, holder: int | str = "self") -> Snapshot:
        """Of this machine, the control groups of `prefix`, the host's network `namespace` and the files below.

        Mounts are those that process `holder` sees. Spares come and go, and are left out as long as the zygote has
        them in its records. While some are made, which takes seconds on a busy machine, no two snapshots are equal.
        """
        taken: list[Snapshot] = []

        def again_the_same() -> bool:
            spares, parked = _spares(directories)
            taken.append(cls._take(spares, parked, prefix, namespace, *directories, holder=holder))
            return taken[-1] in taken[-2:-1] and _spares(directories) == (spares, parked)

        until(again_the_same, "two snapshots are equal", interval=0.01)
        return taken[-1]

    @classmethod
    def _take(
        cls,
        spares: set[str],
        parked: set[int],
        prefix: str,
        namespace: str,
        *directories: Path,
        holder: int | str,
    ) -> Snapshot:
        return cls(
            processes=frozenset(_processes(parked)),
            namespaces=frozenset(_namespaces(parked)),
            mounts=frozenset(_mounts(holder, prefix)),
            cgroups=frozenset(path for path in _cgroups(prefix) if Path(path).name not in spares),
            devices=frozenset(_lines(namespace, "ip", "-brief", "link")),
            routes=frozenset(_lines(namespace, "ip", "route", "show", "table", "all")),
            rules=frozenset(_lines(namespace, "nft", "--stateless", "list", "ruleset")),
            files=frozenset(path for path in _files(directories) if Path(path).name not in spares),
        )

    def difference(self, after: Snapshot) -> list[str]:
        """One line for each object that appeared or vanished since."""
        lines = []
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(after, field.name)
            lines += [f"{field.name}: appeared: {x}" for x in sorted(new - old)]
            lines += [f"{field.name}: vanished: {x}" for x in sorted(old - new)]
        return lines


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _spares(directories: tuple[Path, ...]) -> tuple[set[str], set[int]]:
    """The ids of containers that are made ahead (insula.container.service.warm_pool), and their processes."""
    found: set[str] = set()
    for directory in directories:
        for path, _, files in os.walk(directory):
            if Path(path).name == "spares":
                found |= set(files)
    return found, {pid for pid in _pids() if _is_spare(pid, found)}


def _is_spare(pid: int, spares: set[str]) -> bool:
    try:
        if Path(f"/proc/{pid}/comm").read_text() in PASSING:  # it may not be in its group yet
            return True
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return False
    return any(line.rpartition("/")[2] in spares for line in lines)


def _processes(parked: set[int]) -> list[str]:
    found = []
    for pid in set(_pids()) - parked:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        head, tail = stat.rsplit(")", 1)
        rest = tail.split()
        if rest[0] != "Z" or int(rest[1]) != os.getpid():  # our own zombies are the test's, not the daemon's
            found.append(f"{pid} started {rest[19]} {head.split('(', 1)[1]}")
    return found


def _namespaces(parked: set[int]) -> set[str]:
    found = set()
    for pid in set(_pids()) - parked:
        for kind in ("cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "user", "uts"):
            try:
                found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
            except OSError:
                continue
    return found


def _mounts(holder: int | str, prefix: str) -> list[str]:
    """But not those of other runs of the tests, which go with their directories."""
    found = []
    for line in Path(f"/proc/{holder}/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        below = left.split()[4].removeprefix(f"{RUNS}/")
        if below.startswith("it") and not prefix.startswith(below.split("/")[0]):
            continue
        found.append(f"{left.split()[4]} {left.split()[3]} {right.split()[0]}")
    return found


def _cgroups(prefix: str) -> list[str]:
    tops = [CGROUPS / prefix, *CGROUPS.glob(f"*/{prefix}")]
    return [path for top in tops for path, _, _ in os.walk(top)]


def _lines(namespace: str, *command: str) -> list[str]:
    done = subprocess.run(Namespaces.wrap(namespace, *command), check=True, capture_output=True, text=True)
    # "if7", "@if7" and states such as UP change when a peer goes to another namespace; names are what matters
    return [" ".join(re.sub(r"@\S+", "", line).split()) for line in done.stdout.splitlines()]


def _files(directories: tuple[Path, ...]) -> list[str]:
    found = []
    for directory in directories:
        for path, folders, files in os.walk(directory):
            found += [os.path.join(path, name) for name in [*folders, *files] if not STATE.search(name)]
    return found


def assert_unchanged(before: Snapshot, take: Callable[[], Snapshot], timeout: float = 15.0) -> None:
    """Waits until nothing differs from `before`: cleanup may go on for a moment after the answer."""
    last: list[str] = []

    def same() -> bool:
        last[:] = before.difference(take())
        return not last

    try:
        until(same, "everything as before", timeout, interval=0.2)
    except AssertionError:
        raise AssertionError(f"left behind or lost: {'; '.join(last)}") from None  # one line: reports have the first
