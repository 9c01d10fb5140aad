"""Tools of the benchmarks: a private daemon, interleaved rounds, medians, tables, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.machine import Run
from tests.support.peers import Missing

GAP = 0.05
"""Seconds between two measurements: back-to-back runs hide what a lone launch costs (grace periods of the kernel)."""

Measure = Callable[[], float]


@dataclass
class Table:
    """One table of the report. Cells are text; notes follow it."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        lines += [f"| {' | '.join(self.header)} |", f"|{'---|' * len(self.header)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), *([""] if self.notes else [])])


@dataclass(frozen=True)
class Bench:
    """The tools of a section: a daemon of its own, its command line, and a scratch directory (`run` is in memory)."""

    daemon: Daemon
    scratch: Path
    quick: bool = False

    @property
    def cli(self) -> Cli:
        return self.daemon.cli

    def rounds(self, count: int) -> int:
        return max(3, count // 5) if self.quick else count

    @classmethod
    def open(cls, run: Run, *, quick: bool) -> Bench:
        """A daemon for one section; `close` removes it."""
        daemon = Daemon(run)
        scratch = daemon.path / "bench"
        scratch.mkdir()
        try:
            for directory in (daemon.run, scratch / "run"):  # as /run is on any distribution; unmounted by `close`
                directory.mkdir()
                subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "run", directory], check=True)
            daemon.start()
        except BaseException:
            daemon.remove()
            raise
        return cls(daemon, scratch, quick)

    def close(self) -> None:
        self.daemon.remove()


class Agent:
    """A process in namespaces of its own that runs commands and says how long each took, as a shell would see it."""

    SOURCE = """
import json, subprocess, sys, time
for line in sys.stdin:
    request = json.loads(line)
    started = time.perf_counter()
    done = subprocess.run(request["argv"], env=request["env"], stdin=subprocess.DEVNULL, capture_output=True)
    seconds = time.perf_counter() - started
    answer = {"seconds": seconds, "status": done.returncode, "out": done.stdout.decode(errors="replace"),
              "err": done.stderr.decode(errors="replace")}
    print(json.dumps(answer), flush=True)
"""

    def __init__(self, *enter: str) -> None:
        """`enter` is a command that runs its arguments in the wanted namespaces, such as unshare(1)."""
        self.process = subprocess.Popen(
            [*enter, sys.executable, "-c", self.SOURCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        request = {"argv": [str(word) for word in argv], "env": dict(env or os.environ)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Missing("its namespaces can't be made here")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> float:
        answer = self.run(*argv, env=env)
        if answer["status"]:
            raise Missing(f"{Path(argv[0]).name}: {(answer['err'] or answer['out']).strip()[-200:]}")
        return float(answer["seconds"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def interleave(contestants: Mapping[str, Measure], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Every contestant once a round; the times of each, and why one dropped out. The first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    dropped: dict[str, str] = {}
    for number in range(rounds + 1):
        for name, measure in contestants.items():
            if name in dropped:
                continue
            try:
                seconds = measure()
            except (Missing, OSError, AssertionError, subprocess.SubprocessError) as problem:
                dropped[name] = " ".join(str(problem).split())[:300]
                del times[name]
                continue
            if number:
                times[name].append(seconds)
            time.sleep(GAP)
    return times, dropped


def comparison(title: str, times: Mapping[str, list[float]], dropped: Mapping[str, str], base: str) -> Table:
    """Medians in milliseconds with quartiles, and the ratio to `base`."""
    table = Table(title, ["what", "median ms", "quartiles", f"× {base}"])
    unit = statistics.median(times[base]) if times.get(base) else None
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratio = f"{middle / unit:.1f}" if unit else "-"
        table.rows.append([name, f"{middle * 1e3:.1f}", f"{low * 1e3:.1f} to {high * 1e3:.1f}", ratio])
    table.notes += [f"{name}: not measured: {why}" for name, why in dropped.items()]
    return table


def timed(act: Callable[[], object]) -> float:
    """Seconds that `act` takes."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def version(*command: str | Path) -> str:
    """The first line that a program says of its version."""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "not there"
    return (done.stdout or done.stderr).strip().splitlines()[0] if done.stdout or done.stderr else "not there"


def machine_facts() -> list[tuple[str, str]]:
    """The properties of the machine that the figures depend on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 10
    return [
        ("date", time.strftime("%Y-%m-%d", time.gmtime())),
        ("machine", f"{os.cpu_count()} CPUs ({cpu}), {memory / 1024:.0f} GiB"),
        ("kernel", platform.release()),
        ("cgroups", "version 2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "version 1"),
        ("python", platform.python_version()),
    ]
