"""Control groups: what a group of processes may use, and what it used; cgroups(7).

Version 1 has a hierarchy of directories for each controller (memory, cpu, pids, …), version 2 one for all. A
host has one or the other for any controller; `hybrid` hosts mount an empty version 2 tree beside version 1.
Here a group has one path, such as ``insula/acme/4f…``, and the files behind it are found for either version.

A process joins by writing ``0`` into a file that the parent opened: the kernel checks the opener's rights, so
this works from inside a new user namespace, and it is a hundred times cheaper than writing another's PID.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from typing import Any, NamedTuple

ROOT = "/sys/fs/cgroup"
_V1_CONTROLLERS = ("cpu", "cpuacct", "memory", "pids", "devices", "freezer", "blkio")
_CPU_PERIOD = 100_000  # microseconds, the kernel's default

Resources = dict[str, Any]
"""The `linux.resources` object of the OCI runtime-spec (config-linux.md)."""


class Hierarchy(NamedTuple):
    """Where the controllers are: version 2 if `unified`, else a directory for each version 1 controller."""

    unified: str | None
    controllers: dict[str, str]

    @property
    def version(self) -> int:
        return 2 if self.unified else 1


def detect(mounts: str = "/proc/self/mounts") -> Hierarchy:
    """Read the mounts: version 1 wherever the memory controller is mounted so, else version 2."""
    controllers: dict[str, str] = {}
    unified = None
    with open(mounts) as file:
        for line in file:
            _, target, fstype, options, *_ = line.split()
            if fstype == "cgroup2":
                unified = unified or target
            elif fstype == "cgroup":
                for option in options.split(","):
                    if option in (*_V1_CONTROLLERS, "cpuset", "hugetlb"):
                        controllers.setdefault(option, target)
    if "memory" in controllers:
        return Hierarchy(None, controllers)
    return Hierarchy(unified, {})


_hierarchy: Hierarchy | None = None


def hierarchy() -> Hierarchy:
    """`detect()`, once."""
    global _hierarchy
    if _hierarchy is None:
        _hierarchy = detect()
    return _hierarchy


class Cgroup:
    """The group at `path`, relative to the root of every hierarchy."""

    def __init__(self, path: str, tree: Hierarchy | None = None) -> None:
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"bad cgroup path {path!r}")
        self.path = path
        self.tree = tree or hierarchy()

    def directories(self) -> dict[str, str]:
        """Controller to directory; version 2 has the single entry ``""``."""
        if self.tree.unified:
            return {"": f"{self.tree.unified}/{self.path}"}
        return {c: f"{self.tree.controllers[c]}/{self.path}" for c in _V1_CONTROLLERS if c in self.tree.controllers}

    def exists(self) -> bool:
        return any(os.path.isdir(d) for d in self.directories().values())

    # -- making --------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the group and its parents, with the controllers handed down; nothing happens if it is there."""
        if self.tree.unified:
            self._create_unified()
            return
        for directory in set(self.directories().values()):
            try:
                os.mkdir(directory, 0o755)
            except FileExistsError:
                continue
            except FileNotFoundError:
                os.makedirs(directory, 0o755, exist_ok=True)

    def _create_unified(self) -> None:
        directory = self.tree.unified or ""
        for part in self.path.split("/"):
            with open(f"{directory}/cgroup.controllers") as file:
                available = set(file.read().split())
            with open(f"{directory}/cgroup.subtree_control") as file:
                missing = (available & {"cpu", "cpuset", "io", "memory", "pids", "hugetlb"}) - set(file.read().split())
            if missing:
                _write(f"{directory}/cgroup.subtree_control", " ".join(f"+{c}" for c in sorted(missing)))
            directory = f"{directory}/{part}"
            os.makedirs(directory, 0o755, exist_ok=True)

    def limit(self, resources: Resources) -> None:
        """Apply the limits; what is absent is left as it is. OSError names the file that refused."""
        if self.tree.unified:
            self._limit_unified(resources)
        else:
            self._limit_v1(resources)

    def _limit_v1(self, resources: Resources) -> None:
        at = self.directories()
        memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
        limit, swap = memory.get("limit"), memory.get("swap")
        if limit is not None:
            # memory+swap must never be below memory: raise or lower them in the order that keeps it so
            files = [("memory.limit_in_bytes", limit), ("memory.memsw.limit_in_bytes", swap)]
            known = [(f, v) for f, v in files if v is not None and os.path.exists(f"{at['memory']}/{f}")]
            try:
                for name, value in known:
                    _write(f"{at['memory']}/{name}", value)
            except OSError:
                for name, value in reversed(known):
                    _write(f"{at['memory']}/{name}", value)
        if (reservation := memory.get("reservation")) is not None:
            _write(f"{at['memory']}/memory.soft_limit_in_bytes", reservation)
        if (shares := cpu.get("shares")) is not None:
            _write(f"{at['cpu']}/cpu.shares", shares)
        if (quota := cpu.get("quota")) is not None:
            _write(f"{at['cpu']}/cpu.cfs_period_us", cpu.get("period") or _CPU_PERIOD)
            _write(f"{at['cpu']}/cpu.cfs_quota_us", quota)
        if (pids := (resources.get("pids") or {}).get("limit")) is not None:
            _write(f"{at['pids']}/pids.max", pids if pids > 0 else "max")
        for rule in resources.get("devices") or ():
            name = "devices.allow" if rule.get("allow") else "devices.deny"
            kind = rule.get("type", "a")
            numbers = ":".join("*" if (n := rule.get(k)) is None or n < 0 else str(n) for k in ("major", "minor"))
            access = rule.get("access") or "rwm"
            everything = kind == "a" or (kind not in "bc")
            _write(f"{at['devices']}/{name}", "a" if everything else f"{kind} {numbers} {access}")

    def _limit_unified(self, resources: Resources) -> None:
        at = self.directories()[""]
        memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
        if (limit := memory.get("limit")) is not None:
            _write(f"{at}/memory.max", limit if limit > 0 else "max")
            swap = memory.get("swap")
            if swap is not None and os.path.exists(f"{at}/memory.swap.max"):
                # version 1 counts memory and swap together, version 2 swap alone
                _write(f"{at}/memory.swap.max", max(0, swap - limit) if swap > 0 else "max")
        if (reservation := memory.get("reservation")) is not None:
            _write(f"{at}/memory.low", reservation)
        if (shares := cpu.get("shares")) is not None:
            _write(f"{at}/cpu.weight", 1 + ((max(2, shares) - 2) * 9999) // 262142)
        if (quota := cpu.get("quota")) is not None:
            _write(f"{at}/cpu.max", f"{quota if quota > 0 else 'max'} {cpu.get('period') or _CPU_PERIOD}")
        if (pids := (resources.get("pids") or {}).get("limit")) is not None:
            _write(f"{at}/pids.max", pids if pids > 0 else "max")

    # -- joining and leaving -------------------------------------------------------------------------------

    def open(self) -> list[int]:
        """Descriptors to join by: a process writes ``0`` to each (see `join`)."""
        name = "cgroup.procs" if self.tree.unified else "tasks"
        opened: list[int] = []
        try:
            for directory in self.directories().values():
                opened.append(os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        return opened

    def kill(self) -> None:
        """SIGKILL everything in the group and below it."""
        if self.tree.unified and os.path.exists(f"{self.directories()['']}/cgroup.kill"):
            _write(f"{self.directories()['']}/cgroup.kill", 1)
            return
        held: dict[int, int] = {}
        try:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    held[pid] = os.pidfd_open(pid)
            # a fork bomb wears out PIDs fast: what is in the group now is what was held, or another of the group
            for pid in self.processes():
                with contextlib.suppress(KeyError, ProcessLookupError):
                    signal.pidfd_send_signal(held[pid], signal.SIGKILL)
        finally:
            for pidfd in held.values():
                os.close(pidfd)

    def freeze(self, timeout: float = 5.0) -> None:
        """Take every process of the group off the processors, and wait until none runs; OSError if that fails."""
        self._write_freezer(True)
        deadline = time.monotonic() + timeout
        while not self.frozen():
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, "its processes don't freeze", self.path)
            time.sleep(0.002)

    def thaw(self) -> None:
        """Let them go on."""
        self._write_freezer(False)

    def _write_freezer(self, frozen: bool) -> None:
        if self.tree.unified:
            _write(f"{self.directories()['']}/cgroup.freeze", int(frozen))
        else:
            _write(f"{self.directories()['freezer']}/freezer.state", "FROZEN" if frozen else "THAWED")

    def frozen(self) -> bool:
        """Whether all of the group is frozen; False too where there is no group."""
        at = self.directories()
        try:
            if self.tree.unified:
                return _fields(f"{at['']}/cgroup.events").get("frozen") == 1
            with open(f"{at['freezer']}/freezer.state") as file:
                return file.read().strip() == "FROZEN"
        except (FileNotFoundError, KeyError):
            return False

    def remove(self, timeout: float = 5.0) -> None:
        """Remove the group and those below it; processes that are still dying in it are waited for, and killed."""
        deadline = time.monotonic() + timeout
        for directory in set(self.directories().values()):
            while not _remove_tree(directory):
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, "cgroup is busy", directory)
                self.kill()
                time.sleep(0.002)

    # -- reading -------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """PIDs, as the reader's PID namespace numbers them, of all in the group and below it."""
        directories = self.directories()
        directory = directories.get("pids") or next(iter(directories.values()))
        found: set[int] = set()
        for path, _, names in os.walk(directory):
            if "cgroup.procs" in names:
                try:
                    with open(f"{path}/cgroup.procs") as file:
                        found.update(int(line) for line in file)
                except OSError:
                    continue
        return sorted(found - {0})

    def oom_kills(self) -> int:
        """How often the kernel killed a process of this group for want of memory."""
        directories = self.directories()
        path = (
            f"{directories['']}/memory.events" if self.tree.unified else f"{directories['memory']}/memory.oom_control"
        )
        return _fields(path).get("oom_kill", 0)

    def values(self) -> dict[str, str]:
        """The limits and counters that are in force, file name to content, for people to read."""
        names = {
            "": "memory.max memory.current memory.swap.max cpu.max cpu.weight pids.max pids.current",
            "memory": "memory.limit_in_bytes memory.usage_in_bytes",
            "cpu": "cpu.cfs_quota_us cpu.cfs_period_us cpu.shares",
            "pids": "pids.max pids.current",
        }
        found = {}
        for controller, directory in self.directories().items():
            for name in names.get(controller, "").split():
                try:
                    with open(f"{directory}/{name}") as file:
                        found[name] = file.read().strip()
                except OSError:
                    continue
        return found


def join(descriptors: list[int]) -> None:
    """Move the calling process into the group behind the descriptors of `Cgroup.open`."""
    for fd in descriptors:
        os.write(fd, b"0")


def of_process(pid: int) -> str | None:
    """The path of the group that `pid` is in (cgroups(7), /proc/PID/cgroup); None if the process is gone."""
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except (FileNotFoundError, ProcessLookupError):
        return None
    wanted = "" if hierarchy().unified else "pids"
    for _, controllers, path in lines:
        if wanted in controllers.split(","):
            return path.lstrip("/")
    return None


def _write(path: str, value: object) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    except OSError as error:
        raise OSError(error.errno, f"write {value}: {error.strerror}", path) from None
    finally:
        os.close(fd)


def _fields(path: str) -> dict[str, int]:
    try:
        with open(path) as file:
            return {k: int(v) for k, v in (line.split() for line in file)}
    except (OSError, ValueError):
        return {}


def _remove_tree(directory: str) -> bool:
    """rmdir bottom-up; False while something in it is busy."""
    try:
        os.rmdir(directory)  # the usual case has no children
        return True
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
    for path, _, _ in os.walk(directory, topdown=False):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
            return False
    return True
