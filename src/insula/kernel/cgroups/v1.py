"""A control group of version 1, where each controller has a tree of directories (the kernel's admin-guide/cgroup-v1).

A hybrid host also mounts a version 2 tree without controllers. A group has a directory there too if processes are
started in it (`open_beside`), which is removed with the others.
"""

from __future__ import annotations

import errno
import os
import time

from insula.kernel.cgroups import cpuset, device_list, files, realtime, resources_v1, settings
from insula.kernel.cgroups.base import Cgroup, distinct
from insula.kernel.cgroups.hierarchy import BASE, ON_DEMAND
from insula.model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.kernel.cgroups.events import OutOfMemory
    from insula.kernel.cgroups.settings import Resources, Setting
    from insula.kernel.cgroups.stats import Stats

_PAUSE = 0.002


class CgroupV1(Cgroup, version=1):
    """The version 1 implementation of `Cgroup`."""

    members = "tasks"

    # -- directories -------------------------------------------------------------------------------------------

    def directory(self, controller: str) -> str | None:
        top = self.tree.controllers.get(controller)
        return top and f"{top}/{self.path}"

    def directories(self) -> dict[str, str]:
        found = self._base()
        for controller in ON_DEMAND:
            if (directory := self.directory(controller)) and os.access(directory, os.F_OK):
                found[controller] = directory
        return found

    def _base(self) -> dict[str, str]:
        """Return the directories that `create` makes, by controller."""
        controllers = self.tree.controllers
        return {name: f"{controllers[name]}/{self.path}" for name in BASE if name in controllers}

    def create(self) -> None:
        for directory in distinct(self._base()):
            try:
                os.mkdir(directory, 0o755)
            except FileExistsError:
                continue
            except FileNotFoundError:
                os.makedirs(directory, 0o755, exist_ok=True)

    def _add_controller(self, controller: str) -> None:
        """Make the group's directory of a further controller, and move its processes there. OSError."""
        directory = self.directory(controller)
        if directory is None or os.path.isdir(directory):
            return
        os.makedirs(directory, 0o755, exist_ok=True)
        if controller == "cpuset":
            cpuset.inherit(self.tree.controllers["cpuset"], self.path)
        there: set[int] = set()
        while new := set(self.processes()) - there:  # they may fork during the loop
            for pid in new:
                try:
                    files.write(f"{directory}/cgroup.procs", pid)
                except ProcessLookupError:
                    continue
            there |= new

    def open_beside(self) -> int | None:
        if not self.tree.beside:
            return None
        directory = f"{self.tree.beside}/{self.path}"
        try:
            os.makedirs(directory, 0o755, exist_ok=True)
            return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None

    def _removable(self) -> list[str]:
        beside = [f"{self.tree.beside}/{self.path}"] if self.tree.beside else []
        return [*super()._removable(), *beside]

    def delegate(self, uid: int) -> None:
        """Do nothing: version 1 limits neither the number of subgroups nor their depth, so no group is delegated."""

    def group_to_join(self, pid: int) -> Cgroup:
        return self

    # -- limits ------------------------------------------------------------------------------------------------

    def _settings(self, resources: Resources) -> list[Setting]:
        found = resources_v1.settings(resources)
        for controller in dict.fromkeys(setting.controller for setting in found):
            if controller in ON_DEMAND:
                self._add_controller(controller)
        return found

    def _write_settings(
        self, wanted: list[Setting], resources: Resources, replaced: list[tuple[str, str]] | None
    ) -> None:
        try:
            settings.write_all(self.directory, wanted, undo=replaced)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._raise_realtime_budgets(resources.get("cpu") or {}):
                raise
            settings.write_all(self.directory, wanted, undo=replaced)

    def _raise_realtime_budgets(self, cpu: dict[str, Any]) -> bool:
        """Raise the real-time budgets of the ancestors for `realtimeRuntime`; False if it isn't set. OSError."""
        top, runtime = self.tree.controllers.get("cpu"), cpu.get("realtimeRuntime") or 0
        if not top or runtime <= 0:
            return False
        period = cpu.get("realtimePeriod") or int(files.read(f"{self.directory('cpu')}/cpu.rt_period_us") or 1_000_000)
        realtime.raise_budgets(top, self.path, runtime, period)
        return True

    def _set_devices(self, rules: list[dict[str, Any]]) -> None:
        directory = self.directory("devices")
        if directory is None:
            raise settings.unsupported("devices", "this host has no controller devices")
        device_list.apply(directory, rules)

    # -- killing and freezing ----------------------------------------------------------------------------------

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.thaw()  # a frozen process does not handle SIGKILL

    def _freeze(self, deadline: float) -> None:
        """Write FROZEN until the state is no longer FREEZING (the kernel's freezer-subsystem.rst).

        The state may stay FREEZING while processes fork, unless FROZEN is written again.
        """
        files.write(self._freezer(), "FROZEN")
        while not self._all_frozen() and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            files.write(self._freezer(), "FROZEN")

    def thaw(self) -> None:
        self._thaw_by(lambda: files.write(self._freezer(), "THAWED"))

    def take_back(self, pid: int) -> None:
        files.write(f"{self.directory('freezer')}/cgroup.procs", pid)

    def frozen(self) -> bool:
        return files.read(self._freezer()) in ("FROZEN", "FREEZING")

    def _all_frozen(self) -> bool:
        return files.read(self._freezer()) == "FROZEN"

    def _freezer(self) -> str:
        return f"{self.directory('freezer')}/freezer.state"

    # -- reading -----------------------------------------------------------------------------------------------

    def oom_kills(self) -> int:
        return files.fields(f"{self.directory('memory')}/memory.oom_control").get("oom_kill", 0)

    def oom_notifications(self) -> OutOfMemory:
        from insula.kernel.cgroups import events  # `insula-oci run` has no use for it

        return events.OutOfMemoryV1(self.directory("memory") or "", self.oom_kills)

    def _memory_usage(self) -> int:
        return int(files.read(f"{self.directory('memory')}/memory.usage_in_bytes") or 0)

    def _cpu_time(self, at: int) -> int:
        return int(files.read_in(at, "cpuacct.usage"))

    def _usage(self) -> Stats:
        from insula.kernel.cgroups import stats  # as above

        return stats.read_v1(self.directories(), self.oom_kills())


def frozen_elsewhere(pid: int) -> str | None:
    """Return the path of the version 1 freezer group that freezes a process; None if none does."""
    try:
        with open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except (FileNotFoundError, ProcessLookupError):
        return None
    path = next((path for _, controllers, path in lines if "freezer" in controllers.split(",")), None)
    return None if path is None else Cgroup(path.lstrip("/")).frozen_at()
