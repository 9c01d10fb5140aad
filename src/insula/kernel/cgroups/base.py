"""The base class of control groups: the interface of both versions, and their common parts; cgroups(7).

`Cgroup(path)` makes an object of the class for the host's version: v1.py or v2.py. A process joins a group by writing
``0`` into a file that its parent opened. The kernel checks the privileges of the opener, so this works from inside a
new user namespace; and it is a hundred times faster than writing the PID of another process.

Every launch makes a group and sets its limits, so this path reads nothing that it doesn't need: directories are made
without checking whether they exist, and each value is written once.
"""

from __future__ import annotations

import errno
import os
import time

from insula.kernel.cgroups import files, settings
from insula.kernel.cgroups.hierarchy import Hierarchy, hierarchy
from insula.model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar

    from insula.kernel.cgroups.events import OutOfMemory
    from insula.kernel.cgroups.settings import Resources, Setting
    from insula.kernel.cgroups.stats import Stats

_READABLE = {
    "": "memory.max memory.current memory.swap.max cpu.max cpu.weight pids.max pids.current",
    "memory": "memory.limit_in_bytes memory.usage_in_bytes memory.kmem.tcp.limit_in_bytes",
    "cpu": "cpu.cfs_quota_us cpu.cfs_period_us cpu.shares",
    "pids": "pids.max pids.current",
    "cpuset": "cpuset.cpus cpuset.mems",
}
"""Controller to the files of `Cgroup.values`; version 2 has the single entry ``""``."""


class Cgroup:
    """The group at `path`, relative to the root of every hierarchy.

    The class for each version implements every method that raises NotImplementedError here; a test checks that. Calling
    `Cgroup` makes an object of one of them, as with pathlib.Path, which an abc.ABC does not allow. `tree` is a
    hierarchy to use instead of the host's.
    """

    _versions: ClassVar[dict[int, type[Cgroup]]] = {}
    members = "cgroup.procs"
    """The file to which a process writes ``0`` to join the group."""

    def __init_subclass__(cls, *, version: int) -> None:
        Cgroup._versions[version] = cls

    def __new__(cls, path: str, tree: Hierarchy | None = None) -> Cgroup:
        return object.__new__(cls.implementation((tree or hierarchy()).version))

    @classmethod
    def implementation(cls, version: int) -> type[Cgroup]:
        """Return the class for a version, which is imported when it is first needed: the other one would cost
        `insula-oci run` 1 ms."""
        if version not in cls._versions:
            __import__(f"insula.kernel.cgroups.v{version}")
        return cls._versions[version]

    def __init__(self, path: str, tree: Hierarchy | None = None) -> None:
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"bad cgroup path {path!r}")
        self.path = path
        self.tree = tree or hierarchy()

    # -- implemented by each version ---------------------------------------------------------------------------

    def directory(self, controller: str) -> str | None:
        """Return the directory of a version 1 controller, None if the host lacks it; version 2 has one for all."""
        raise NotImplementedError

    def directories(self) -> dict[str, str]:
        """Return the directory of each controller; version 2 has the single entry ``""``."""
        raise NotImplementedError

    def create(self) -> None:
        """Make the group and its parents, with controllers enabled in the parents; no error if it exists."""
        raise NotImplementedError

    def open_beside(self) -> int | None:
        """Open the group of the same path in the version 2 tree of a hybrid host, for CLONE_INTO_CGROUP.

        The group is made if it is missing. None on other hosts, and without permission: no limit depends on it.
        """
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL everything in the group and below it, frozen or not."""
        raise NotImplementedError

    def thaw(self) -> None:
        """Resume frozen processes; no error if none is frozen, or if the group is gone. OSError."""
        raise NotImplementedError

    def frozen(self) -> bool:
        """Whether the group is frozen, by itself or with a parent; False if it is gone."""
        raise NotImplementedError

    def take_back(self, pid: int) -> None:
        """Move the process `pid` back into this group of the freezer controller. OSError.

        In version 1 it may have been moved into a frozen group of that hierarchy, where it can't be killed.
        """
        raise NotImplementedError

    def delegate(self, uid: int) -> None:
        """Delegate the group to a user of the host, which may make groups below it; see delegation.py. OSError."""
        raise NotImplementedError

    def group_to_join(self, pid: int) -> Cgroup:
        """Return the group for processes that join the container of `pid`: this one, or the subgroup that has `pid`."""
        raise NotImplementedError

    def oom_kills(self) -> int:
        """Return how many processes of the group the OOM killer has killed."""
        raise NotImplementedError

    def oom_notifications(self) -> OutOfMemory:
        """Return an object to poll, readable when memory runs out in the group. OSError."""
        raise NotImplementedError

    def _settings(self, resources: Resources) -> list[Setting]:
        """Convert `resources` to files and values. OSError for fields that this version lacks."""
        raise NotImplementedError

    def _set_devices(self, rules: list[dict[str, Any]]) -> None:
        """Apply device rules. OSError names linux.resources.devices, and the file or call that refused."""
        raise NotImplementedError

    def _memory_usage(self) -> int:
        """Return the memory in use, in bytes."""
        raise NotImplementedError

    def _usage(self) -> Stats:
        """Return the usage; see stats.py."""
        raise NotImplementedError

    def _cpu_time(self, at: int) -> int:
        """Return the processor time, nanoseconds; `at` is the directory that has it. OSError."""
        raise NotImplementedError

    def _freeze(self, deadline: float) -> None:
        """Stop the processes, and wait until all are frozen or until `deadline` (time.monotonic). OSError."""
        raise NotImplementedError

    def _all_frozen(self) -> bool:
        raise NotImplementedError

    # -- limits ------------------------------------------------------------------------------------------------

    def limit(self, resources: Resources) -> None:
        """Apply limits; absent fields are left unchanged. OSError names the field of linux.resources, and the file."""
        self._write(resources, None)

    def update(self, resources: Resources) -> None:
        """Apply limits to a running group; if one is refused, those before it are restored. OSError."""
        replaced: list[tuple[str, str]] = []
        try:
            if (resources.get("memory") or {}).get("checkBeforeUpdate"):
                self._check_usage(resources["memory"].get("limit") or -1)
            self._write(resources, replaced)
        except OSError:
            settings.put_back(replaced)
            raise

    def _write(self, resources: Resources, replaced: list[tuple[str, str]] | None) -> None:
        if wanted := self._settings(resources):
            self._write_settings(wanted, resources, replaced)
        if rules := resources.get("devices"):
            self._set_devices(rules)  # last, because they are not restored

    def _write_settings(
        self, wanted: list[Setting], resources: Resources, replaced: list[tuple[str, str]] | None
    ) -> None:
        settings.write_all(self.directory, wanted, undo=replaced)

    def _check_usage(self, limit: int) -> None:
        """Apply linux.resources.memory.checkBeforeUpdate: under a limit below the usage the kernel kills processes."""
        used = self._memory_usage()
        if 0 <= limit < used:
            raise OSError(errno.EBUSY, f"linux.resources.memory.limit: {limit} is less than the {used} bytes in use")

    # -- joining and leaving -----------------------------------------------------------------------------------

    def exists(self) -> bool:
        return any(os.path.isdir(directory) for directory in self.directories().values())

    def open(self, below: dict[str, str] | None = None) -> list[int]:
        """Open the files by which a process joins: it writes ``0`` to each (see `join`).

        `below` has paths of subgroups by controller of version 1. The path under ``""`` is for all controllers that it
        does not name; a controller without such a subgroup uses this group. FileNotFoundError if a named controller
        lacks its subgroup, or if no controller has the one under ``""``.
        """
        directories = self._below(below) if below else distinct(self.directories())
        opened: list[int] = []
        try:
            for directory in directories:
                opened.append(os.open(f"{directory}/{self.members}", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        return opened

    def _below(self, paths: dict[str, str]) -> list[str]:
        own = self.directories()
        if unknown := paths.keys() - own.keys() - {""}:
            raise FileNotFoundError(errno.ENOENT, f"unknown controller {min(unknown):.40}")
        found: dict[str, str] = {}
        for name, directory in own.items():
            path = paths.get(name) or paths.get("", "")
            there = os.path.isdir(f"{directory}/{path}")
            if not there and name in paths:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            found[name] = f"{directory}/{path}" if path and there else directory
        if paths.get("") and not any(os.path.isdir(f"{directory}/{paths['']}") for directory in own.values()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), paths[""])
        return distinct(found)

    def signal(self, number: int) -> None:
        """Send a signal to every process in the group and below it."""
        held: dict[int, int] = {}
        try:
            for pid in self.processes():
                try:
                    held[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
            # a fork bomb reuses PIDs fast: only a process that is still in the group after its pidfd was opened counts
            for pid in self.processes():
                try:
                    signal.pidfd_send_signal(held[pid], number)
                except (KeyError, ProcessLookupError):
                    continue
        finally:
            for pidfd in held.values():
                os.close(pidfd)

    def remove(self, timeout: float = 5.0) -> None:
        """Remove the group and its subgroups; its processes are killed. OSError (EBUSY) after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for directory in self._removable():
            while not _remove_tree(directory):
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, "cgroup is busy", directory)
                self.kill()
                time.sleep(0.002)

    def _removable(self) -> list[str]:
        return distinct(self.directories())

    # -- freezing ----------------------------------------------------------------------------------------------

    def freeze(self, timeout: float = 10.0) -> None:
        """Freeze every process in the group, and return when all are frozen.

        A parent sees SIGSTOP, and any process of the same user can undo it; processes inside can neither notice nor
        undo freezing. OSError (ETIMEDOUT) if a process isn't frozen in `timeout` seconds, such as one that waits for a
        broken disk; the others are resumed then.
        """
        self._freeze(time.monotonic() + timeout)
        if not self._all_frozen():
            self.thaw()
            raise OSError(errno.ETIMEDOUT, f"not all processes of the group froze in {timeout:g} s", self.path)

    def _thaw_by(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # it was removed
                raise

    def frozen_at(self) -> str | None:
        """Return the path of the topmost frozen group, of its ancestors and itself; None if none is frozen."""
        parts = self.path.split("/")
        paths = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        return next((path for path in paths if Cgroup(path, self.tree).frozen()), None)

    # -- reading -----------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Return the PIDs, in the reader's PID namespace, of all processes in the group and its subgroups."""
        directory = self.directory("pids") or next(iter(self.directories().values()))
        found: set[int] = set()
        for path, _, names in os.walk(directory):
            if "cgroup.procs" in names:
                try:
                    with open(f"{path}/cgroup.procs") as file:
                        found.update(int(line) for line in file)
                except OSError:
                    continue
        return sorted(found - {0})

    def stats(self) -> Stats:
        """Return the group's usage; stats.py has the keys. FileNotFoundError if the group is gone."""
        found = self._usage()
        if not found.get("pids") and not self.exists():
            raise FileNotFoundError(errno.ENOENT, "no such control group", self.path)
        return {key: value for key, value in found.items() if value}

    def counters(self) -> tuple[int, int, int]:
        """Return the group's inode number, processor time (nanoseconds) and memory in use (bytes).

        The processor time includes processes and subgroups that are gone. The inode number tells whether it is the
        same group as before: the kernel does not reuse it until it boots. FileNotFoundError if the group is gone.
        """
        at = os.open(self.directory("cpuacct") or "", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return os.fstat(at).st_ino, self._cpu_time(at), self._memory_usage()
        finally:
            os.close(at)

    def is_empty(self) -> bool:
        """Whether no process is in the group or below it. A process that was not waited for yet may count as one."""
        count = files.read(f"{self.directory('pids') or ''}/pids.current")
        return count == "0" if count is not None else not self.processes()

    def empty(self, timeout: float = 5.0) -> None:
        """Kill all processes in the group and below it, and wait until they are gone, or for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.processes() and time.monotonic() < deadline:
            self.kill()
            time.sleep(0.002)

    def values(self) -> dict[str, str]:
        """Return limits and counters for people to read, by file name."""
        found = {}
        for controller, directory in self.directories().items():
            for name in _READABLE.get(controller, "").split():
                if (content := files.read(f"{directory}/{name}")) is not None:
                    found[name] = content
        return found


def join(descriptors: list[int]) -> None:
    """Move the calling process into the group behind the descriptors of `Cgroup.open`."""
    for fd in descriptors:
        os.write(fd, b"0")


def distinct(directories: dict[str, str]) -> list[str]:
    """Return each directory once: controllers may share a hierarchy, such as cpu,cpuacct."""
    return list(dict.fromkeys(directories.values()))


def _remove_tree(directory: str) -> bool:
    """Remove a tree of groups bottom-up; False while one of them is busy."""
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
