"""Measures how long a request waits, and for what: the tools of `bench/stalls.py`."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import insula
from bench import callbacks
from bench.lib import Bench

PAUSE = 0.003
PROBE = """
import json, os, select, sys, time
from insula.client import Client
client, pause = Client(sys.argv[1]), float(sys.argv[3])
files = [os.open(path, os.O_RDONLY) for path in (f"/proc/{sys.argv[2]}/task/{sys.argv[2]}/schedstat",
                                                 "/proc/self/task/%d/schedstat" % os.getpid())]
def queued():
    return sum(int(os.pread(file, 100, 0).split()[1]) for file in files) / 1e9
client.instances.list("calm")
print("ready", flush=True)
waits = []
while not select.select([sys.stdin], [], [], pause)[0]:
    before, began = queued(), time.perf_counter()
    client.instances.list("calm")
    took = time.perf_counter() - began
    waits.append((took, queued() - before))
print(json.dumps(waits))
"""


class Waits(NamedTuple):
    """Seconds: the longest wait, and the longest without the time for which the event loop's thread and the one that
    asks could have run and other threads had the processors (schedstat, proc(5))."""

    longest: float
    undisturbed: float

    @classmethod
    def of(cls, waits: list[tuple[float, float]]) -> Waits:
        took = [each for each, _ in waits]
        return cls(max(took, default=0.0), max((each - queued for each, queued in waits), default=0.0))


class Probe:
    """Another tenant's requests, one after the other, from a process of their own, while the `with` lasts; then
    `waits` has how long each took and how much of that was waiting for a processor."""

    def __init__(self, bench: Bench) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(insula.__file__).parents[1])}
        arguments = [str(bench.cli.socket), str(bench.daemon.pid("insulad")), str(PAUSE)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROBE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"
        self.waits: list[tuple[float, float]] = []

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exc: object) -> None:
        said, _ = self._process.communicate("over\n")
        self.waits = json.loads(said)


class Meter:
    """The daemon of a bench with `bench/callbacks.py` around it."""

    def __init__(self, bench: Bench) -> None:
        path = bench.scratch / "callbacks"
        path.write_bytes(bytes(callbacks.RECORD.size))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), callbacks.RECORD.size)
        bench.daemon.stop()
        bench.daemon.wrapper = (sys.executable, "-I", callbacks.__file__, str(path))
        bench.daemon.start()

    def clear(self) -> None:
        """Drop the measurements."""
        self._shared[:] = bytes(callbacks.RECORD.size)

    def busiest(self) -> tuple[float, str]:
        """Seconds of processor time of the callback that used most since `clear`, and its name."""
        processor, name = callbacks.RECORD.unpack(self._shared[:])
        return processor / 1e9, name.rstrip(b"\0").decode(errors="replace")
