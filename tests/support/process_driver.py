"""`ProcessDriver`: a driver outside of the tree, whose instances are plain processes of the host.

It isolates nothing. It shows what `Driver` asks for: each method looks at files and processes, so that another
control plane can go on where this one ended. A supervising process (`_SUPERVISOR`) has the instance's process as its
child, and writes down how it ended.

    instances/ID/process   "PID START_TIME STARTED" of the instance's process
    instances/ID/exit      its exit status, once it has ended
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, Literal

from insula.control.instances.drivers.base import (
    Archive,
    Connect,
    CreateOptions,
    Log,
    MemoryEvents,
    Observed,
    Running,
    Streams,
)
from insula.control.instances.drivers.directory import Directory, LaunchRecord, boot_id
from insula.image.store import ImageStore
from insula.kernel import process
from insula.model.disks import FurtherDisk
from insula.model.errors import Failed, InsulaError, Invalid, NotFound, Unavailable
from insula.model.guests import GuestReport
from insula.model.objects import Exit, Instance, InstanceStatus, Network, Port, Resources, Tenant
from insula.model.views import ExecSpec, Explanation, ProcessView
from insula.network.fabric import Nic, Places
from insula.settings import Settings
from insula.volume.quota import DiskQuota

_SUPERVISOR = """
import os, subprocess, sys, time
directory, *command = sys.argv[1:]
child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
started = open(f"/proc/{child.pid}/stat").read().rsplit(")", 1)[1].split()[19]
for name, text in (("process", lambda: f"{child.pid} {started} {time.time()}"), ("exit", lambda: str(child.wait()))):
    said = text()
    with open(f"{directory}/{name}.new", "w") as draft:
        draft.write(said)
    os.rename(f"{directory}/{name}.new", f"{directory}/{name}")
"""
_NAP, _PATIENCE = 0.01, 30.0  # seconds


class ProcessDriver:
    """See `Driver`. It takes the place of the container driver: another kind would be a member of `Options`."""

    kind = "container"
    features: frozenset[str] = frozenset()
    trouble = None
    snapshots = None

    def __init__(self, settings: Settings, images: ImageStore, disk: DiskQuota) -> None:
        self._instances = settings.instances

    def _directory(self, instance_id: str) -> Directory:
        return Directory(self._instances, instance_id)

    # -- this host ------------------------------------------------------------------------------------------------

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def take_down(self) -> None: ...
    def make_room(self, instances: int) -> None: ...
    async def release_layer(self, path: str) -> None: ...

    def ids(self) -> set[str]:
        return set()  # there is nothing apart from the directories

    # -- the life of an instance ----------------------------------------------------------------------------------

    def reserve(self, tenant: str) -> str:
        return secrets.token_hex(16)

    async def validate(self, tenant: Tenant, draft: Instance) -> None:
        if draft.spec.networks:
            raise Invalid("processes of the host have no network of their own", "--network none")

    async def prepare(self, tenant: Tenant, instance: Instance) -> None:
        """Do nothing: a process needs nothing that takes long."""

    async def create(self, tenant: Tenant, instance: Instance, options: CreateOptions) -> None:
        directory = self._directory(instance.id)
        directory.path.mkdir(exist_ok=True)
        directory.write_record(LaunchRecord(starts=instance.starts, boot=boot_id()))
        (directory.path / "command").write_text("\0".join(instance.spec.command))

    def nic(self, instance_id: str) -> Nic:
        raise NotFound("it has no network", "--network none")

    async def start(self, instance_id: str) -> Running:
        path = self._directory(instance_id).path
        command = (path / "command").read_text().split("\0")
        words = [sys.executable, "-ISE", "-c", _SUPERVISOR, str(path), *command]
        subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        for _ in range(int(_PATIENCE / _NAP)):
            if running := self._running(path):
                return running
            await asyncio.sleep(_NAP)
        raise Failed(f"{command[0]} does not start", "see insulad's log")

    def is_ready(self, instance_id: str) -> bool:
        return True

    async def ready(self, instance_id: str) -> bool:
        return True

    async def failure(self, instance_id: str) -> InsulaError | None:
        return None

    def signal(self, instance_id: str, number: int, exec_id: str | None = None, *, group: bool = False) -> None:
        running = self._running(self._directory(instance_id).path)
        if running is None or not process.is_alive(running.pid, running.start_time):
            raise NotFound("it has ended", "start it")
        os.kill(running.pid, number)

    def frozen_elsewhere(self, instance_id: str) -> str | None:
        return None

    async def pause(self, instance_id: str) -> None:
        raise _lacking("pause")

    async def resume(self, instance_id: str) -> None: ...
    async def answers(self, instance_id: str) -> AsyncIterator[bool]:
        return
        yield True

    async def sync(self, instance_id: str) -> None: ...
    async def plug(self, instance: Instance, beside: Places, missing: Places, connect: Connect) -> None: ...
    async def unplug(self, instance: Instance, port: Port, beside: Places) -> None: ...
    async def attach_disks(self, instance: Instance) -> None: ...
    def check_disks(self, instance: Instance, disks: Sequence[FurtherDisk], *, active: bool) -> None: ...
    def check_resize(self, instance: Instance, resources: Resources, state: str) -> None: ...
    async def resize(self, instance: Instance) -> Sequence[str]:
        return ()

    async def wait(self, instance_id: str, exec_id: str | None = None) -> Exit:
        path = self._directory(instance_id).path
        while (ended := _exit(path)) is None:
            if not path.is_dir():
                raise NotFound("it was removed", "run it again")
            await asyncio.sleep(_NAP)
        return ended

    async def flushed(self, instance_id: str, exec_id: str | None = None) -> None: ...

    def observe(self, instance: Instance, status: InstanceStatus) -> Observed:
        directory = self._directory(instance.id)
        running = self._running(directory.path)
        if running is None:
            return Observed("none", None, directory.record())
        state: Literal["ended", "running"] = "ended" if _exit(directory.path) else "running"
        return Observed(state, running, directory.record())

    async def discard(self, instance: Instance) -> None:
        path = self._directory(instance.id).path
        with suppress(NotFound):
            self.signal(instance.id, signal.SIGKILL)
            await self.wait(instance.id)
        for name in ("process", "exit"):
            (path / name).unlink(missing_ok=True)

    async def discard_stray(self, instance_id: str) -> None: ...

    async def remove_directory(self, instance_id: str) -> None:
        await self._directory(instance_id).remove()

    def end_of_boot(self, instance_id: str) -> None:
        self._directory(instance_id).end_of_boot()

    @staticmethod
    def _running(path: Path) -> Running | None:
        try:
            pid, start_time, started = (path / "process").read_text().split()
        except FileNotFoundError:
            return None
        return Running(int(pid), int(start_time), float(started))

    # -- a running instance: it has none of these features ---------------------------------------------------------

    async def prepare_exec(self, tenant: Tenant, instance: Instance, spec: ExecSpec) -> object:
        raise _lacking("exec")

    async def exec(
        self,
        instance_id: str,
        prepared: object,
        exec_id: str | None = None,
        *,
        stdin: bool = False,
        detach: bool = False,
    ) -> str:
        raise _lacking("exec")

    def execs(self, instance_id: str) -> list[str]:
        return []

    def forget_exec(self, instance_id: str, exec_id: str) -> None: ...

    async def attach(self, instance_id: str, exec_id: str | None = None, *, stdin: bool = False) -> Streams:
        raise _lacking("attach")

    def has_exited(self, instance_id: str) -> bool:
        return _exit(self._directory(instance_id).path) is not None

    def log(self, instance_id: str, *, since: float = 0.0, tail: int | None = None) -> Log:
        raise _lacking("logs")

    def holder(
        self, tenant: Tenant, instance: Instance, network: Network | None
    ) -> AbstractAsyncContextManager[Running]:
        raise _lacking("files")

    def archive(
        self, verb: Literal["write", "read", "export"], process: Running, path: str, copy: str | None = None
    ) -> AbstractAsyncContextManager[Archive]:
        raise _lacking("files")

    async def guest_report(self, instance_id: str) -> GuestReport:
        return GuestReport(answered=False)

    async def screenshot(self, instance_id: str) -> bytes:
        raise _lacking("screen")

    def memory_events(self, instance: Instance) -> MemoryEvents:
        raise _lacking("events of memory")

    # -- looking --------------------------------------------------------------------------------------------------

    def stats(self, instances: Sequence[Instance]) -> dict[str, dict[str, Any]]:
        return {}

    def processes(self, tenant: Tenant, instance_id: str) -> Sequence[ProcessView]:
        raise _lacking("processes")

    def explain(
        self, tenant: Tenant, instance: Instance, status: InstanceStatus, near: Mapping[str, Running]
    ) -> Explanation:
        raise _lacking("explain")


def _exit(path: Path) -> Exit | None:
    """Its exit, as a shell tells it."""
    try:
        status = int((path / "exit").read_text())
        finished = (path / "exit").stat().st_mtime
    except FileNotFoundError:
        return None
    ended_by = -status if status < 0 else None
    return Exit(exit_status=128 - status if status < 0 else status, signal=ended_by, finished=finished or time.time())


def _lacking(feature: str) -> Unavailable:
    return Unavailable(f"processes of the host have no {feature}", "use a container")
