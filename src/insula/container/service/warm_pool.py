"""Spares: containers made ahead as far as they are alike, whose first process waits to be told which one it will be.

Half of what a launch costs doesn't depend on what is launched: the fork, the namespaces, the control group, /proc, /sys
and /dev with everything in them (`insula.container.create.rootfs.Stage`). So for a tenant that launched something
lately a few of them are kept ready: its next launch takes one, and only the root, a few bind mounts and execve(2)
are left.

A spare belongs to one tenant from its birth: its user namespace has the tenant's IDs, its control group is in the
tenant's. Nothing has ever run in it but our own code, and nothing is used twice. A control group can't change its name
(version 2), so a spare has the name of its container from the beginning: who wants one chooses among those offered.

They are made when the spawner has nothing else to do, and go when nobody launches for a while. A file for each tells
the next spawner what to clean up, should this one be killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from insula.container import wire
from insula.container.create import init, namespaces, sources, spawn
from insula.container.create.cgroup_mount import Groups
from insula.container.create.rootfs import Stage
from insula.container.service import launch
from insula.container.service.assignment import Handover
from insula.kernel import process, records
from insula.kernel.cgroups import Cgroup, delegation
from insula.kernel.undo import Undo
from insula.log import write as report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.container.service.launch import Layers
    from insula.container.service.run_directory import Launch

KEEP = 60.0  # seconds after the last launch
LIMIT = 32  # spares of all tenants together


class Mold:
    """What spares of one kind have in common. `parent` is the control group above theirs."""

    def __init__(self, asked: Launch) -> None:
        own = asked.config["linux"]
        self.parent = asked.cgroup.rpartition("/")[0]
        self.id_base = asked.id_base
        self.mounts = asked.config.get("mounts") or []
        self.stage = Stage(launch.engine_config(asked))
        self.devices = own.get("devices") or []
        self.rules = (own.get("resources") or {}).get("devices") or []  # device rules: a dozen writes in version 1
        self._alike = _alike(asked)

    def fits(self, asked: Launch) -> bool:
        """Whether what is made for this mold can become what is asked: equal where it is staged, alike elsewhere."""
        entries = asked.config.get("mounts") or []
        return (
            _alike(asked) == self._alike
            and len(entries) == len(self.mounts)
            and all(
                entry == ours if index in self.stage.entries else entry["destination"] == ours["destination"]
                for index, (entry, ours) in enumerate(zip(entries, self.mounts, strict=True))
            )
        )


def _alike(asked: Launch) -> tuple[object, ...]:
    own = asked.config["linux"]
    rules = (own.get("resources") or {}).get("devices")
    parent = asked.cgroup.rpartition("/")[0]
    return parent, asked.id_base, own.get("devices"), own.get("maskedPaths"), own.get("readonlyPaths"), rules


def _is_usual(asked: Launch) -> bool:
    """Whether it is in namespaces all of its own, and its group is nobody else's to divide."""
    return not asked.share and not delegation.asked_for(asked.config, True)


class Spare:
    """A parked child and its group."""

    __slots__ = ("child", "group", "id", "mold", "ready")

    def __init__(self, id_: str, mold: Mold, group: Cgroup, child: spawn.Child) -> None:
        self.id, self.mold, self.group, self.child = id_, mold, group, child
        self.ready = False  # stage 1 is done


class Pool:
    """Up to `size` spares for every tenant that is launching. `directory` has a file for each of them."""

    def __init__(self, directory: str, size: int) -> None:
        self.directory = directory
        self.size = size
        self.spares: dict[str, Spare] = {}
        self._molds: dict[str, tuple[Mold, float]] = {}  # by parent, with the time of the last launch; latest last

    def open(self) -> None:
        """Remove what a spawner that was killed left: the children died with it, their groups didn't."""
        os.makedirs(self.directory, 0o700, exist_ok=True)
        for name in os.listdir(self.directory):
            path = f"{self.directory}/{name}"
            try:
                group = records.read(path).decode()
                if group.endswith(f"/{name}"):
                    Cgroup(group).remove()
                os.unlink(path)
            except (OSError, ValueError) as error:
                report("insula-spawner", f"what is left of spare {name!r} can't be removed", error)

    # -- which ones there should be ----------------------------------------------------------------------------------

    def note(self, asked: Launch) -> None:
        """Something was launched: more like it may follow."""
        if self.size and _is_usual(asked):
            parent = asked.cgroup.rpartition("/")[0]
            mold, _ = self._molds.pop(parent, (None, 0.0))
            if mold is None or not mold.fits(asked):
                mold = Mold(asked)
            self._molds[parent] = mold, time.monotonic()

    def wanted(self) -> Mold | None:
        """Of which kind one is missing; those who launched last come first."""
        if len(self.spares) >= LIMIT:
            return None
        for mold, _ in reversed(self._molds.values()):
            if sum(spare.mold is mold for spare in self.spares.values()) < self.size:
                return mold
        return None

    def patience(self) -> float | None:
        """Seconds until something expires."""
        if not self._molds:
            return None
        return max(0.0, min(last for _, last in self._molds.values()) + KEEP - time.monotonic())

    def expired(self) -> list[Spare]:
        """Those that nobody will want: the molds of tenants that launched nothing for a while are forgotten."""
        now = time.monotonic()
        for parent in [p for p, (_, last) in self._molds.items() if last + KEEP <= now]:
            del self._molds[parent]
        wanted = [mold for mold, _ in self._molds.values()]
        return [spare for spare in self.spares.values() if spare.mold not in wanted]

    def forget(self, mold: Mold) -> None:
        """It can't be made: ask no more until the next launch."""
        self._molds.pop(mold.parent, None)

    # -- making and taking -------------------------------------------------------------------------------------------

    def make(self, mold: Mold) -> Spare:
        """A new one, which says "parked" when it is ready. OSError or StepError; then nothing of it is left."""
        above = Cgroup(mold.parent)
        if not above.exists():  # the tenant is gone, and must not come back by this
            raise FileNotFoundError(2, "its parent's control group is gone", mold.parent)
        identity = os.urandom(16).hex()
        group = Cgroup(f"{mold.parent}/{identity}")
        with Undo() as undo, Undo() as handed:
            self._record(identity, group.path)
            undo.callback(self._forget_record, identity)
            undo.callback(group.remove)
            group.create()
            into, join = spawn.enter_group(group, handed)
            group.limit({"devices": mold.rules})
            plan = namespaces.plan(launch.engine_namespaces(mold.id_base), handed)
            later = set(range(len(mold.mounts))) - set(mold.stage.entries)
            opened = sources.open_all({"mounts": mold.mounts, "linux": {"devices": mold.devices}}, plan, but=later)
            handed.callback(opened.close)
            ours, theirs = wire.pair()
            undo.callback(ours.close)
            handed.callback(theirs.close)
            groups = Groups(group.directories(), plan.cgroup)
            given = init.Inheritance(
                sync=theirs, root=-1, sources=opened, join=join, groups=groups, stdio=[], program=None
            )
            pid, pidfd = spawn.clone(plan, mold.id_base, into)
            if pid == 0:
                init.park(mold.stage, given, plan)
            undo.hold(pidfd)
            process.map_ids(pid, plan.uids, plan.gids)
            wire.send(ours, {"event": "mapped"})
            undo.keep()
        spare = self.spares[identity] = Spare(identity, mold, group, spawn.Child(pid, pidfd, ours))
        return spare

    def fits(self, spare: Spare, asked: Launch) -> bool:
        """Whether it can become the container that is asked for."""
        return spare.ready and spare.group.path == asked.cgroup and _is_usual(asked) and spare.mold.fits(asked)

    def release(self, identity: str) -> None:
        """The spare of that id, if it was one, is a container now, which has records of its own."""
        self.spares.pop(identity, None)
        self._forget_record(identity)

    def drop(self, spare: Spare) -> None:
        """End it, and remove all that there is of it."""
        self.spares.pop(spare.id, None)
        child = spare.child
        child.sync.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        os.close(child.pidfd)
        spare.group.remove()
        self._forget_record(spare.id)

    def _record(self, identity: str, group: str) -> None:
        with open(f"{self.directory}/{identity}", "w") as file:
            file.write(group)

    def _forget_record(self, identity: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.directory}/{identity}")


def furnish(spare: Spare, asked: Launch, layers: Layers, config: int, program: str | None) -> spawn.Child:
    """Tell a spare which container it is, with everything that it needs. `config` is the open file of `asked`.

    OSError or StepError if anything is refused: then the spare is of no more use, and the caller drops it.
    """
    spec = asked.config
    with Undo() as undo, Undo() as handed:
        resources = spec["linux"].get("resources") or {}
        spare.group.limit({name: limits for name, limits in resources.items() if name != "devices"})
        root, stdio, streams = launch.root_and_streams(asked, layers, handed, undo)
        plan = namespaces.plan(launch.engine_namespaces(asked.id_base), handed)
        opened = sources.open_all(spec, plan, but=spare.mold.stage.entries)
        handed.callback(opened.close)
        filter_ = handed.hold(os.open(program, os.O_RDONLY | os.O_CLOEXEC)) if program else -1
        handover = Handover(
            config=config, program=filter_, flags=asked.seccomp_flags, root=root, sources=opened, stdio=stdio
        )
        if (score := spec["process"].get("oomScoreAdj")) is not None:
            process.set_oom_score(spare.child.pid, score)
        handover.send(spare.child.sync)
        spare.child.streams = streams
        undo.keep()
    return spare.child
