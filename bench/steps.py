"""The steps of a launch in the child process, timed from inside.

The engine's own functions are called here, without a zygote around them, and `step`, through which a child does
everything that may fail, is wrapped. The child writes its times into memory that it shares with us (MAP_SHARED,
mmap(2)), up to the last moment before execve(2) replaces it.
"""

from __future__ import annotations

import mmap
import os
import select
import shutil
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.launch import real_launch
from bench.lib import GAP, Bench, Table
from insula.container import wire
from insula.container.create import exec_process, init, rootfs, steps
from insula.container.service import launch, warm_pool
from insula.container.service.run_directory import Launch, RunDirectory
from insula.kernel import syscalls
from insula.kernel.cgroups import Cgroup

ROUNDS = 25
_RECORD = struct.Struct("50sdd")
_SPACE = 1 << 16


class Shared:
    """(step, start, end) of each step, written by the child and read by the parent."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _SPACE)

    def clear(self) -> None:
        self.memory[:] = bytes(_SPACE)

    def add(self, name: str, start: float, end: float) -> None:
        (count,) = struct.unpack_from("I", self.memory)
        _RECORD.pack_into(self.memory, 8 + count * _RECORD.size, name.encode()[:50], start, end)
        struct.pack_into("I", self.memory, 0, count + 1)

    def read(self) -> list[tuple[str, float, float]]:
        (count,) = struct.unpack_from("I", self.memory)
        records = (_RECORD.unpack_from(self.memory, 8 + i * _RECORD.size) for i in range(count))
        return [(name.rstrip(b"\0").decode(), start, end) for name, start, end in records]


@contextmanager
def timed_steps(shared: Shared) -> Iterator[None]:
    """`step` writes down how long it took, in whatever forks from here."""
    modules: list[Any] = [init, rootfs, exec_process]
    original = steps.step

    def timed(step: steps.Step, action: Callable[..., object], *arguments: Any, about: str = "") -> None:
        start = time.monotonic()
        try:
            original(step, action, *arguments, about=about)
        finally:
            shared.add(step.text.format(about), start, time.monotonic())

    for module in modules:
        module.step = timed
    try:
        yield
    finally:
        for module in modules:
            module.step = original


class Stand:
    """Launches without a zygote: what that does, one after the other, with a clock in hand."""

    def __init__(self, bench: Bench, asked: Launch) -> None:
        self.asked, self.scratch, self.prefix = asked, bench.scratch / "steps", f"{bench.daemon.prefix}/steps"
        self.run = bench.scratch / "run" / "steps"
        (self.run / "containers").mkdir(parents=True)
        (self.scratch / "layers").mkdir(parents=True)
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
        syscalls.mount("tmpfs", str(self.scratch / "layers"), "tmpfs")
        os.chdir(self.scratch / "layers")
        for name, fstype in (("proc", "proc"), ("sys", "sysfs")):  # as in zygote.main
            os.mkdir(name)
            syscalls.mount(fstype, name, fstype, syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC)
        syscalls.prctl(syscalls.PR_SET_SECUREBITS, syscalls.SECBIT_NO_SETUID_FIXUP)
        self.layers, self.shared = launch.Layers(), Shared()
        self.pool = warm_pool.WarmPool(str(self.run / "spares"), 1)
        self.pool.open()
        self.program = Path(asked.seccomp or "").read_bytes()

    def request(self, name: str) -> Launch:
        home = self.scratch / name
        (home / "upper").mkdir(parents=True)
        (home / "work").mkdir()
        os.chown(home / "upper", self.asked.id_base, self.asked.id_base)
        return self.asked._replace(
            id=name, upper=str(home / "upper"), work=str(home / "work"), cgroup=f"{self.prefix}/{name}", volatile=True
        )

    def launch(self, *, ahead: bool) -> list[tuple[str, float]]:
        """(what, milliseconds) from the request to the end, in order."""
        spare = None
        if ahead:
            Cgroup(self.prefix).create()
            spare = self.pool.make(warm_pool.Template(self.asked._replace(cgroup=f"{self.prefix}/mold")))
            assert wire.receive(spare.child.sync)
        asked = self.request(spare.id if spare else os.urandom(16).hex())
        bundle = RunDirectory(str(self.run), asked.id)
        bundle.create(asked)
        self.shared.clear()
        time.sleep(GAP)
        begin = time.monotonic()
        if spare:
            child = warm_pool.assign(spare, asked, self.layers, f"{bundle.path}/launch.json", asked.seccomp)
            self.pool.release(spare.id)
        else:
            child = launch.start(asked, self.layers, exec_process.Filter(self.program, asked.seccomp_flags))
            wire.send(child.sync, {"event": "mapped"})
        prepared = time.monotonic()
        ready = wire.receive(child.sync)
        assert ready and ready[0]["event"] == "ready", ready
        wire.send(child.sync, {"event": "start"})
        assert wire.receive(child.sync) is None
        running = time.monotonic()
        waiting = select.poll()
        waiting.register(child.pidfd, select.POLLIN)
        waiting.poll()
        end = time.monotonic()
        _, status = os.waitpid(child.pid, 0)
        assert status == 0, status
        for fd in (child.pidfd, *child.streams.values()):
            os.close(fd)
        child.sync.close()
        Cgroup(asked.cgroup).remove()
        bundle.remove()
        shutil.rmtree(self.scratch / asked.id)
        done = [step for step in self.shared.read() if step[2] > begin]
        own = [(name, stop - start) for name, start, stop in done]
        between = (running - done[0][1]) - sum(seconds for _, seconds in own)
        return [
            ("parent: prepare and clone" if not ahead else "parent: prepare and hand over", prepared - begin),
            *own,
            ("Python between the steps, and execve", between),
            ("the program, and the end of its namespaces", end - running),
            ("in all", end - begin),
        ]


def measure(bench: Bench) -> list[Table]:
    stand = Stand(bench, real_launch(bench))
    tables = []
    with timed_steps(stand.shared):
        for title, ahead in (("made from nothing", False), ("made ahead: what is left", True)):
            rounds = [stand.launch(ahead=ahead) for _ in range(bench.rounds(ROUNDS) + 1)][1:]
            table = Table(f"Steps of a launch, {title}", ["step", "median ms"])
            for position, (name, _) in enumerate(rounds[0]):
                milliseconds = statistics.median(each[position][1] for each in rounds) * 1e3
                table.rows.append([name, f"{milliseconds:.2f}"])
            table.notes.append("parent and child overlap, so the parts are more than the whole; no network, no zygote")
            tables.append(table)
    return tables
