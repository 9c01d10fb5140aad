"""One control group, whichever version the host has: made, joined, limited, frozen, emptied, removed; cgroups(7).

A process joins by writing ``0`` into a file that the parent opened: the kernel checks the opener's rights, so
this works from inside a new user namespace, and it is a hundred times cheaper than writing another's PID.

Making a group and limiting it is part of every launch, so nothing is read there that need not be: directories are made
without a look whether they are there, and values are written once each.
"""

from __future__ import annotations

import errno
import os
import time

from insula.kernel.cgroups import files, settings
from insula.kernel.cgroups.hierarchy import BASE, ON_DEMAND, Hierarchy, hierarchy

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import Any

    from insula.kernel.cgroups.events import OutOfMemory
    from insula.kernel.cgroups.settings import Resources, Setting
else:
    import _signal as signal  # without the enumerations of `signal`, which cost 4 ms


class Cgroup:
    """The group at `path`, relative to the root of every hierarchy."""

    def __init__(self, path: str, tree: Hierarchy | None = None) -> None:
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"bad cgroup path {path!r}")
        self.path = path
        self.tree = tree or hierarchy()

    # -- where it is ---------------------------------------------------------------------------------------

    def directory(self, controller: str) -> str | None:
        """That of a version 1 controller, or None if the host lacks it; of any controller the one of version 2."""
        top = self.tree.unified or self.tree.controllers.get(controller)
        return top and f"{top}/{self.path}"

    def directories(self) -> dict[str, str]:
        """Controller to directory; version 2 has the single entry ``""``."""
        found = self._base()
        for controller in ON_DEMAND if not self.tree.unified else ():
            if (directory := self.directory(controller)) and os.access(directory, os.F_OK):
                found[controller] = directory
        return found

    def _base(self) -> dict[str, str]:
        """Those that `create` makes."""
        if self.tree.unified:
            return {"": f"{self.tree.unified}/{self.path}"}
        controllers = self.tree.controllers
        return {c: f"{controllers[c]}/{self.path}" for c in BASE if c in controllers}

    def exists(self) -> bool:
        return any(os.path.isdir(d) for d in self.directories().values())

    # -- making --------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the group and its parents, with the controllers handed down; nothing happens if it is there."""
        for directory in self._distinct(self._base()):
            try:
                os.mkdir(directory, 0o755)
            except FileExistsError:
                continue
            except FileNotFoundError:
                os.makedirs(directory, 0o755, exist_ok=True)
        if self.tree.unified and not os.access(f"{directory}/pids.max", os.F_OK):
            self._hand_down()

    @staticmethod
    def _distinct(directories: dict[str, str]) -> list[str]:
        """Controllers may share a hierarchy, such as cpu,cpuacct."""
        return list(dict.fromkeys(directories.values()))

    def _hand_down(self) -> None:
        """Version 2: a group has the files of a controller if its parent hands it down (cgroup.subtree_control)."""
        from insula.kernel.cgroups.v2 import CONTROLLERS

        directory = self.tree.unified or ""
        for part in self.path.split("/"):
            available = set((files.read(f"{directory}/cgroup.controllers") or "").split()).intersection(CONTROLLERS)
            missing = available - set((files.read(f"{directory}/cgroup.subtree_control") or "").split())
            if missing:
                _enable(f"{directory}/cgroup.subtree_control", sorted(missing))
            directory = f"{directory}/{part}"

    def limit(self, resources: Resources) -> None:
        """Apply limits; what is absent is left as it is. OSError names the field of linux.resources, and the file."""
        self._write(resources, None)

    def update(self, resources: Resources) -> None:
        """The same on a group that runs: if one is refused, those before it are put back. OSError."""
        undo: list[tuple[str, str]] = []
        try:
            if (resources.get("memory") or {}).get("checkBeforeUpdate"):
                self._check_usage(resources["memory"].get("limit") or -1)
            self._write(resources, undo)
        except OSError:
            settings.put_back(undo)
            raise

    def _write(self, resources: Resources, undo: list[tuple[str, str]] | None) -> None:
        if wanted := self._settings(resources):
            try:
                settings.write_all(self.directory, wanted, undo=undo)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._hand_down_realtime(resources.get("cpu") or {}):
                    raise
                settings.write_all(self.directory, wanted, undo=undo)
        if rules := resources.get("devices"):
            from insula.kernel.cgroups import devices  # last, because they are not put back

            devices.apply(self, rules)

    def _settings(self, resources: Resources) -> list[Setting]:
        if self.tree.unified:
            from insula.kernel.cgroups import v2

            return v2.settings(resources, lambda file: files.read(f"{self.directory('')}/{file}"))
        from insula.kernel.cgroups import v1

        found = v1.settings(resources)
        for controller in dict.fromkeys(s.controller for s in found):
            if controller in ON_DEMAND:
                self._enter(controller)
        return found

    def _enter(self, controller: str) -> None:
        """Make its directory in a version 1 hierarchy where it has none yet, and bring its processes there."""
        directory = self.directory(controller)
        if directory is None or os.path.isdir(directory):
            return
        os.makedirs(directory, 0o755, exist_ok=True)
        if controller == "cpuset":
            from insula.kernel.cgroups import cpuset

            cpuset.inherit(self.tree.controllers["cpuset"], self.path)
        there: set[int] = set()
        while new := set(self.processes()) - there:  # they may fork meanwhile
            for pid in new:
                try:
                    files.write(f"{directory}/cgroup.procs", pid)
                except ProcessLookupError:
                    continue
            there |= new

    def _hand_down_realtime(self, cpu: dict[str, Any]) -> bool:
        """Let the groups above have what is asked for; False if nothing is. OSError if they can't."""
        top, runtime = self.tree.controllers.get("cpu"), cpu.get("realtimeRuntime") or 0
        if self.tree.unified or not top or runtime <= 0:
            return False
        from insula.kernel.cgroups import realtime

        period = cpu.get("realtimePeriod") or int(files.read(f"{self.directory('cpu')}/cpu.rt_period_us") or 1_000_000)
        realtime.hand_down(top, self.path, runtime, period)
        return True

    def _check_usage(self, limit: int) -> None:
        """linux.resources.memory.checkBeforeUpdate: below what is used, the kernel would kill to get there."""
        file = "memory.current" if self.tree.unified else "memory.usage_in_bytes"
        used = int(files.read(f"{self.directory('memory')}/{file}") or 0)
        if 0 <= limit < used:
            raise OSError(errno.EBUSY, f"linux.resources.memory.limit: {limit} is less than the {used} bytes in use")

    # -- joining and leaving -------------------------------------------------------------------------------

    def open(self, below: dict[str, str] | None = None) -> list[int]:
        """Descriptors to join by: a process writes ``0`` to each (see `join`).

        `below` has paths of groups in this one: by controller of version 1, and under ``""`` for all that it does not
        name, which may have it or not. FileNotFoundError if one that is named has it not, or none has it.
        """
        name = "cgroup.procs" if self.tree.unified else "tasks"
        opened: list[int] = []
        directories = self._distinct(self.directories())
        if below:
            directories = self._below(below)
        try:
            for directory in directories:
                opened.append(os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CLOEXEC))
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
        return self._distinct(found)

    def open_beside(self) -> int | None:
        """A hybrid host's group of the same path in version 2, made if need be: a descriptor to be born in it.

        None on other hosts, and where the caller may not make it: what is limited does not depend on it.
        """
        if not self.tree.beside:
            return None
        directory = f"{self.tree.beside}/{self.path}"
        try:
            os.makedirs(directory, 0o755, exist_ok=True)
            return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None

    def kill(self) -> None:
        """SIGKILL everything in the group and below it, frozen or not."""
        if self.tree.unified:
            try:
                files.write(f"{self.directory('')}/cgroup.kill", 1)  # Linux 5.14
                return
            except FileNotFoundError:
                if not self.exists():
                    return
        self.signal(signal.SIGKILL)
        self.thaw()  # in version 1 a frozen process does not even die

    def signal(self, number: int) -> None:
        """Send a signal to every process in the group and below it."""
        held: dict[int, int] = {}
        try:
            for pid in self.processes():
                try:
                    held[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
            # a fork bomb wears out PIDs fast: what is in the group now is what was held, or another of the group
            for pid in self.processes():
                try:
                    signal.pidfd_send_signal(held[pid], number)
                except (KeyError, ProcessLookupError):
                    continue
        finally:
            for pidfd in held.values():
                os.close(pidfd)

    def remove(self, timeout: float = 5.0) -> None:
        """Remove the group and those below it; processes that are still dying in it are waited for, and killed."""
        deadline = time.monotonic() + timeout
        directories = self._distinct(self.directories())
        if self.tree.beside:
            directories.append(f"{self.tree.beside}/{self.path}")
        for directory in directories:
            while not _remove_tree(directory):
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, "cgroup is busy", directory)
                self.kill()
                time.sleep(0.002)

    # -- stop and go ---------------------------------------------------------------------------------------

    def freeze(self, timeout: float = 10.0) -> None:
        """Stop every process in the group, and return once they all stand still.

        OSError with ETIMEDOUT, and all run again, if one does not, such as a process that waits for a dead disk.
        """
        from insula.kernel.cgroups import freezer

        freezer.freeze(self, timeout)

    def thaw(self) -> None:
        """Let them go on; nothing happens if they do, or if the group is gone."""
        from insula.kernel.cgroups import freezer

        freezer.thaw(self)

    def take_back(self, pid: int) -> None:
        """Have this group, and no other, say whether the process `pid` is frozen.

        In version 1 somebody may have moved it into a frozen group of the freezer's hierarchy, where it can't die.
        """
        from insula.kernel.cgroups import freezer

        freezer.take_back(self, pid)

    def frozen(self) -> bool:
        """Whether it was frozen, by itself or with a parent; False if the group is gone."""
        from insula.kernel.cgroups import freezer

        return freezer.frozen(self)

    def frozen_at(self) -> str | None:
        """The path of the topmost group, of those above it and itself, that is frozen; None if none is."""
        parts = self.path.split("/")
        paths = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        return next((path for path in paths if Cgroup(path, self.tree).frozen()), None)

    # -- reading -------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """PIDs, as the reader's PID namespace numbers them, of all in the group and below it."""
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

    def stats(self) -> dict[str, Any]:
        """What the group used until now: see stats.py for the keys. FileNotFoundError if it is gone."""
        from insula.kernel.cgroups import stats

        return stats.read(self)

    def oom_kills(self) -> int:
        """How often the kernel killed a process of this group for want of memory."""
        file = "memory.events" if self.tree.unified else "memory.oom_control"
        return files.fields(f"{self.directory('memory')}/{file}").get("oom_kill", 0)

    def oom_notifications(self) -> OutOfMemory:
        """Something to poll that becomes readable when memory runs out in the group; OSError."""
        from insula.kernel.cgroups import events

        return events.OutOfMemory(self)

    def values(self) -> dict[str, str]:
        """The limits and counters that are in force, file name to content, for people to read."""
        names = {
            "": "memory.max memory.current memory.swap.max cpu.max cpu.weight pids.max pids.current",
            "memory": "memory.limit_in_bytes memory.usage_in_bytes memory.kmem.tcp.limit_in_bytes",
            "cpu": "cpu.cfs_quota_us cpu.cfs_period_us cpu.shares",
            "pids": "pids.max pids.current",
            "cpuset": "cpuset.cpus cpuset.mems",
        }
        found = {}
        for controller, directory in self.directories().items():
            for name in names.get(controller, "").split():
                if (content := files.read(f"{directory}/{name}")) is not None:
                    found[name] = content
        return found


def join(descriptors: list[int]) -> None:
    """Move the calling process into the group behind the descriptors of `Cgroup.open`."""
    for fd in descriptors:
        os.write(fd, b"0")


def _enable(subtree_control: str, controllers: list[str]) -> None:
    """All of them, or each that can be: what is missing then is told by who writes to its files.

    Not where processes are: there only some can be, and groups below would take no process any more.
    """
    try:
        files.write(subtree_control, " ".join(f"+{c}" for c in controllers))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return
        for controller in controllers:
            try:
                files.write(subtree_control, f"+{controller}")
            except OSError:
                continue


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
