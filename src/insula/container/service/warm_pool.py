"""Warm containers: prepared ahead as far as containers are alike, until they are assigned a request.

Half of the cost of a launch doesn't depend on the request: the fork, the namespaces, the control group, /proc,
/sys and /dev with everything in them (`insula.container.create.rootfs.PremountPlan`). So for each parent group in
which something was launched lately, a few are kept ready. The next launch takes one; only the root, a few bind mounts
and execve(2) are left to do.

A warm container belongs to one parent group and one range of IDs from the beginning. Only our own code has run in it,
and it is used once. A control group of version 2 can't be renamed, so a warm container has its final id and group from
the beginning: a client chooses among the ids that are offered.

They are made while the zygote is idle, and removed when nothing was launched for a while. Each has a file, by which
the next zygote removes its group if this one is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from insula.container import wire
from insula.container.create import init, namespaces, sources, spawn
from insula.container.create.cgroup_mount import Groups
from insula.container.create.rootfs import PremountPlan
from insula.container.create.warm import Assignment, wait_for_assignment
from insula.container.service import launch
from insula.kernel import process, records
from insula.kernel.cgroups import Cgroup, delegation
from insula.kernel.rollback import Rollback
from insula.log import write as report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.container.service.launch import Layers
    from insula.container.service.run_directory import Launch

KEEP = 60.0  # seconds after the last launch
LIMIT = 32  # warm containers in all


class Template:
    """The common part of the warm containers of one parent group; `parent` is the control group above theirs."""

    def __init__(self, request: Launch) -> None:
        linux_config = request.config["linux"]
        self.parent = request.cgroup.rpartition("/")[0]
        self.id_base = request.id_base
        self.mounts = request.config.get("mounts") or []
        self.premount_plan = PremountPlan(launch.engine_config(request))
        self.devices = linux_config.get("devices") or []
        # device rules: a dozen writes in version 1
        self.rules = (linux_config.get("resources") or {}).get("devices") or []
        self._common = _common_parts(request)

    def fits(self, request: Launch) -> bool:
        """Whether a container of this template can become `request`.

        Entries of `mounts` that are made ahead must be equal; the others need the same destinations.
        """
        entries = request.config.get("mounts") or []
        return (
            _common_parts(request) == self._common
            and len(entries) == len(self.mounts)
            and all(
                entry == ours if index in self.premount_plan.entries else entry["destination"] == ours["destination"]
                for index, (entry, ours) in enumerate(zip(entries, self.mounts, strict=True))
            )
        )


def _common_parts(request: Launch) -> tuple[object, ...]:
    config = request.config["linux"]
    rules = (config.get("resources") or {}).get("devices")
    parent = request.cgroup.rpartition("/")[0]
    return parent, request.id_base, config.get("devices"), config.get("maskedPaths"), config.get("readonlyPaths"), rules


def _can_be_warm(request: Launch) -> bool:
    """Whether all its namespaces are its own, and its control group is not delegated to it."""
    return not request.share and not delegation.is_requested(request.config, True)


class WarmContainer:
    """A waiting child and its control group. `ready` is set once the child waits for its assignment."""

    __slots__ = ("child", "group", "id", "ready", "template")

    def __init__(self, id_: str, template: Template, group: Cgroup, child: spawn.SpawnedProcess) -> None:
        self.id, self.template, self.group, self.child = id_, template, group, child
        self.ready = False

    def offer(self) -> wire.Message:
        """The message that tells clients of it."""
        process = {"pid": self.child.pid, "start_time": self.child.start_time}
        return {"event": "spare", "id": self.id, "parent": self.template.parent, **process}


class WarmPool:
    """Up to `size` warm containers for every parent group in use. `directory` has a file for each of them."""

    def __init__(self, directory: str, size: int) -> None:
        self.directory = directory
        self.size = size
        self.containers: dict[str, WarmContainer] = {}
        # by parent, with the time of the last launch; the latest is last
        self._templates: dict[str, tuple[Template, float]] = {}

    def open(self) -> None:
        """Remove the control groups that a killed zygote left. Its children died with it."""
        os.makedirs(self.directory, 0o700, exist_ok=True)
        for name in os.listdir(self.directory):
            path = f"{self.directory}/{name}"
            try:
                group = records.read(path).decode()
                if group.endswith(f"/{name}"):
                    Cgroup(group).remove()
                os.unlink(path)
            except (OSError, ValueError) as error:
                report("insula-zygote", f"what is left of warm container {name!r} can't be removed", error)

    # -- which are wanted ----------------------------------------------------------------------------------

    def launched(self, request: Launch) -> None:
        """Take note of a launch: similar ones may follow."""
        if self.size and _can_be_warm(request):
            parent = request.cgroup.rpartition("/")[0]
            template, _ = self._templates.pop(parent, (None, 0.0))
            if template is None or not template.fits(request):
                template = Template(request)
            self._templates[parent] = template, time.monotonic()

    def missing(self) -> Template | None:
        """A template with too few warm containers; None if there is none. Those used last come first."""
        if len(self.containers) >= LIMIT:
            return None
        for template, _ in reversed(self._templates.values()):
            if sum(warm.template is template for warm in self.containers.values()) < self.size:
                return template
        return None

    def idle_timeout(self) -> float | None:
        """Seconds until a template expires; None if there is none."""
        if not self._templates:
            return None
        return max(0.0, min(last for _, last in self._templates.values()) + KEEP - time.monotonic())

    def expired(self) -> list[WarmContainer]:
        """Warm containers whose template is gone. Forgets templates that were not used for `KEEP` seconds."""
        now = time.monotonic()
        for parent in [p for p, (_, last) in self._templates.items() if last + KEEP <= now]:
            del self._templates[parent]
        in_use = [template for template, _ in self._templates.values()]
        return [warm for warm in self.containers.values() if warm.template not in in_use]

    def forget(self, template: Template) -> None:
        """Make no more of this template until the next launch: making one failed."""
        self._templates.pop(template.parent, None)

    # -- making and taking -------------------------------------------------------------------------------------------

    def make(self, template: Template) -> WarmContainer:
        """A new one, which sends "parked" when it is ready. OSError or StepError; then nothing of it is left."""
        above = Cgroup(template.parent)
        if not above.exists():  # the tenant is gone, and must not come back by this
            raise FileNotFoundError(2, "its parent's control group is gone", template.parent)
        identity = os.urandom(16).hex()
        group = Cgroup(f"{template.parent}/{identity}")
        with Rollback() as undo, Rollback() as child_fds:
            self._record(identity, group.path)
            undo.callback(self._remove_record, identity)
            undo.callback(group.remove)
            group.create()
            into, join = spawn.enter_group(group, child_fds)
            group.limit({"devices": template.rules})
            plan = namespaces.plan(launch.engine_namespaces(template.id_base), child_fds)
            later = set(range(len(template.mounts))) - set(template.premount_plan.entries)
            config = {"mounts": template.mounts, "linux": {"devices": template.devices}}
            prepared = sources.open_all(config, plan, but=later)
            child_fds.callback(prepared.close)
            ours, theirs = wire.pair()
            undo.callback(ours.close)
            child_fds.callback(theirs.close)
            groups = Groups(group.directories(), plan.cgroup)
            args = init.InitArgs(
                sync=theirs, root=-1, sources=prepared, join=join, groups=groups, stdio=[], program=None
            )
            pid, pidfd = spawn.clone(plan, template.id_base, into)
            if pid == 0:
                wait_for_assignment(template.premount_plan, args, plan)
            undo.hold(pidfd)
            process.map_ids(pid, plan.uids, plan.gids)
            wire.send(ours, {"event": "mapped"})
            undo.keep()
        warm = self.containers[identity] = WarmContainer(
            identity, template, group, spawn.SpawnedProcess(pid, pidfd, ours)
        )
        return warm

    def fits(self, warm: WarmContainer, request: Launch) -> bool:
        """Whether it can become the container of `request`."""
        fits = warm.group.path == request.cgroup and _can_be_warm(request) and warm.template.fits(request)
        return warm.ready and fits

    def release(self, identity: str) -> None:
        """Take the one of that id out of the pool, if there is one: it is a container now, with records of its own."""
        self.containers.pop(identity, None)
        self._remove_record(identity)

    def drop(self, warm: WarmContainer) -> None:
        """Kill one, and remove its group and its record."""
        self.containers.pop(warm.id, None)
        child = warm.child
        child.sync.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        os.close(child.pidfd)
        warm.group.remove()
        self._remove_record(warm.id)

    def _record(self, identity: str, group: str) -> None:
        with open(f"{self.directory}/{identity}", "w") as file:
            file.write(group)

    def _remove_record(self, identity: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.directory}/{identity}")


# -- assignment --------------------------------------------------------------------------------------------------------


def assign(
    warm: WarmContainer, request: Launch, layers: Layers, config: str, program: str | None
) -> spawn.SpawnedProcess:
    """Make a warm container the one of `request`. `config` is the file of `request`, `program` that of its filter.

    OSError or StepError if anything is refused: then it is of no more use, and the caller drops it.
    """
    spec = request.config
    with Rollback() as undo, Rollback() as child_fds:
        resources = spec["linux"].get("resources") or {}
        warm.group.limit({name: limits for name, limits in resources.items() if name != "devices"})
        root, stdio, streams = launch.root_and_streams(request, layers, child_fds, undo)
        plan = namespaces.plan(launch.engine_namespaces(request.id_base), child_fds)
        prepared = sources.open_all(spec, plan, but=warm.template.premount_plan.entries)
        child_fds.callback(prepared.close)
        filter_ = child_fds.hold(os.open(program, os.O_RDONLY | os.O_CLOEXEC)) if program else -1
        file = child_fds.hold(os.open(config, os.O_RDONLY | os.O_CLOEXEC))
        assignment = Assignment(
            config=file, program=filter_, flags=request.seccomp_flags, root=root, sources=prepared, stdio=stdio
        )
        if (score := spec["process"].get("oomScoreAdj")) is not None:
            process.set_oom_score(warm.child.pid, score)
        assignment.send(warm.child.sync)
        warm.child.streams = streams
        undo.keep()
    return warm.child
