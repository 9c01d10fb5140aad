"""A control group of version 2, whose controllers share one tree of directories (admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import errno
import os
import select
import time

from insula.kernel.cgroups import delegation, device_program, files, resources_v2
from insula.kernel.cgroups.base import Cgroup
from insula.kernel.cgroups.hierarchy import of_process
from insula.model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.kernel.cgroups.events import OutOfMemory
    from insula.kernel.cgroups.settings import Resources, Setting
    from insula.kernel.cgroups.stats import Stats


class CgroupV2(Cgroup, version=2):
    """The version 2 implementation of `Cgroup`."""

    # -- directories -------------------------------------------------------------------------------------------

    @property
    def _directory(self) -> str:
        return f"{self.tree.unified}/{self.path}"

    def directory(self, controller: str) -> str:
        return self._directory

    def directories(self) -> dict[str, str]:
        return {"": self._directory}

    def create(self) -> None:
        try:
            os.mkdir(self._directory, 0o755)
        except FileExistsError:
            pass
        except FileNotFoundError:
            os.makedirs(self._directory, 0o755, exist_ok=True)
        if not os.access(f"{self._directory}/pids.max", os.F_OK):
            self._enable_controllers()

    def _enable_controllers(self) -> None:
        """Enable the controllers in cgroup.subtree_control of all ancestors: only then a group has their files."""
        directory = self.tree.unified or ""
        for part in self.path.split("/"):
            available = set((files.read(f"{directory}/cgroup.controllers") or "").split())
            enabled = set((files.read(f"{directory}/cgroup.subtree_control") or "").split())
            if missing := available.intersection(resources_v2.CONTROLLERS) - enabled:
                _enable(f"{directory}/cgroup.subtree_control", sorted(missing))
            directory = f"{directory}/{part}"

    def open_beside(self) -> int | None:
        return None

    def delegate(self, uid: int) -> None:
        delegation.delegate(self._directory, uid)

    def group_to_join(self, pid: int) -> Cgroup:
        path = of_process(pid) or ""
        return Cgroup(path, self.tree) if path.startswith(f"{self.path}/") else self

    # -- limits ------------------------------------------------------------------------------------------------

    def _settings(self, resources: Resources) -> list[Setting]:
        return resources_v2.settings(resources, lambda file: files.read(f"{self._directory}/{file}"))

    def _set_devices(self, rules: list[dict[str, Any]]) -> None:
        device_program.install(self._directory, rules)

    # -- killing and freezing ----------------------------------------------------------------------------------

    def kill(self) -> None:
        try:
            files.write(f"{self._directory}/cgroup.kill", 1)
        except FileNotFoundError:
            if self.exists():  # before Linux 5.14
                self.signal(signal.SIGKILL)
                self.thaw()

    def _freeze(self, deadline: float) -> None:
        """Write cgroup.freeze, and poll cgroup.events, whose changes are reported by POLLPRI."""
        files.write(f"{self._directory}/cgroup.freeze", 1)
        watched = os.open(f"{self._directory}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            changed = select.poll()
            changed.register(watched, select.POLLPRI)
            while not self._all_frozen() and (left := deadline - time.monotonic()) > 0:
                changed.poll(min(left, 0.1) * 1000)
        finally:
            os.close(watched)

    def thaw(self) -> None:
        self._thaw_by(lambda: files.write(f"{self._directory}/cgroup.freeze", 0))

    def take_back(self, pid: int) -> None:
        """Do nothing: in version 2 a process has a single group."""

    def frozen(self) -> bool:
        return files.read(f"{self._directory}/cgroup.freeze") == "1" or self._all_frozen()

    def _all_frozen(self) -> bool:
        return files.fields(f"{self._directory}/cgroup.events").get("frozen") == 1

    # -- reading -----------------------------------------------------------------------------------------------

    def oom_kills(self) -> int:
        return files.fields(f"{self._directory}/memory.events").get("oom_kill", 0)

    def oom_notifications(self) -> OutOfMemory:
        from insula.kernel.cgroups import events  # `insula-oci run` has no use for it

        return events.OutOfMemoryV2(self._directory, self.oom_kills)

    def _memory_usage(self) -> int:
        return int(files.read(f"{self._directory}/memory.current") or 0)

    def _cpu_time(self, at: int) -> int:
        numbers = dict(line.split() for line in files.read_in(at, "cpu.stat").splitlines())
        return int(numbers["usage_usec"]) * 1000

    def _usage(self) -> Stats:
        from insula.kernel.cgroups import stats  # as above

        return stats.read_v2(self._directory)


def _enable(subtree_control: str, controllers: list[str]) -> None:
    """Enable all controllers, or those that can be enabled; a missing one is reported by the write that needs it.

    Nothing is enabled in a group with processes (EBUSY): there only threaded controllers can be enabled, and subgroups
    could then not take processes.
    """
    try:
        files.write(subtree_control, " ".join(f"+{controller}" for controller in controllers))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return
        for controller in controllers:
            try:
                files.write(subtree_control, f"+{controller}")
            except OSError:
                continue
