"""A thousand running instances on one network: what launches and commands cost beside ten, what a restart of insulad
costs, and what our processes need for each of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from bench.launch import Twin
from bench.lib import GAP, Bench, Measure, Table, timed
from bench.memory import pss
from bench.peers import root_file_system
from insula.client import Client
from tests.support.daemon import PROCESSES
from tests.support.peers import Missing

FEW, MANY = 10, 1000
ROUNDS = 30
PARALLEL = 8
PROGRAM = ["sleep", "3600"]
Figures = dict[str, float]


def measure(bench: Bench) -> list[Table]:
    many = 100 if bench.quick else MANY
    host = Host(bench)
    host.fill(FEW)
    few = host.figures(bench.rounds(ROUNDS))
    before = host.costs()
    started = host.fill(many)
    after = host.costs()
    lots = host.figures(bench.rounds(ROUNDS))
    removed = host.empty()
    host.fill(FEW)
    again = host.figures(bench.rounds(ROUNDS))  # what else the machine does changes meanwhile
    few = {what: (value + again[what]) / 2 for what, value in few.items()}
    speed = Table(f"{many} running instances beside {FEW}", ["what", f"at {FEW}, ms", f"at {many}, ms", "ratio"])
    for what, value in few.items():
        speed.rows.append([what, f"{value * 1e3:.1f}", f"{lots[what] * 1e3:.1f}", f"{lots[what] / value:.2f}"])
    if "C twin" in few:
        beside = lots["launch"] / lots["C twin"] / (few["launch"] / few["C twin"])
        speed.notes.append(f"in launches of the C twin, a launch at {many} is {beside:.2f} × one at {FEW}")
    speed.notes += [
        f"at {FEW}: the mean of before and after; "
        "medians, of launches also the fastest quarter's end; a launch is asked of the API and ends when it runs",
        "the C twin launches to the exit of `true`, beside each launch: what this machine did meanwhile",
        "CPU: of insulad, monitor, zygote and dnsmasq together, for each launch",
        "restart: from the start of insulad until it answers, every instance adopted",
        f"{many - FEW} started in {started:.1f} s, removed in {removed:.1f} s, {PARALLEL} requests at a time",
    ]
    size = Table(f"What {many} instances need", ["process", f"MiB at {FEW}", f"at {many}", "KiB each", "files each"])
    for name, (memory, files) in before.items():
        each = (after[name][0] - memory) / (many - FEW), (after[name][1] - files) / (many - FEW)
        row = [name, f"{memory / 1024:.1f}", f"{after[name][0] / 1024:.1f}", f"{each[0]:.1f}", f"{each[1]:.1f}"]
        size.rows.append(row)
    return [speed, size]


class Host:
    """A daemon that fills up."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.client = Client(str(bench.cli.socket))
        self.twin: Twin | None = None
        with suppress(Missing):  # no compiler
            self.twin = Twin(bench, root_file_system(bench))

    # -- how many ------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        return [view["instance"]["name"] for view in self.client.instances.list("default")]

    def fill(self, count: int) -> float:
        """Until so many run; seconds."""
        return _all(self.run, [f"scale{number}" for number in range(len(self.names()), count)])

    def empty(self) -> float:
        return _all(self.remove, self.names())

    def run(self, name: str) -> None:
        self.client.instances.run("default", "busybox", PROGRAM, name=name)

    def remove(self, name: str) -> None:
        self.client.instances.remove("default", name, force=True)

    # -- what that costs -----------------------------------------------------------------------------------------------

    def figures(self, rounds: int) -> Figures:
        """Seconds."""
        launches, twins, spent = [], [], []
        for _ in range(rounds + 1):
            before = self.cpu()
            launches.append(timed(lambda: self.run("probe")))
            time.sleep(GAP)  # a spare takes the place of the one that was used
            spent.append(self.cpu() - before)
            self.remove("probe")
            if self.twin:
                twins.append(self.twin.launch())
            time.sleep(GAP)
        quarter, middle, _ = statistics.quantiles(launches[1:], n=4)
        found = {"launch": middle, "launch, fastest quarter": quarter, "launch, CPU": statistics.median(spent[1:])}
        if twins:
            found["C twin"] = statistics.median(twins[1:])
        for command in ("ps", "exec scale0 true", "stats --no-stream"):
            ok = partial(self.bench.cli.ok, *command.split())
            found[f"insula {command}"] = _median(partial(timed, ok), max(3, rounds // 3))
        found["restart"] = _median(self.restart, 3)
        return found

    def restart(self) -> float:
        daemon = self.bench.daemon
        count = len(self.names())
        daemon.stop()
        seconds = timed(daemon.start)
        running = sum(view["status"]["state"] == "running" for view in self.client.instances.list("default"))
        assert running == count, f"{running} of {count} were adopted"
        return seconds

    def pids(self) -> dict[str, int]:
        found = {name: pid for name in PROCESSES if (pid := self.bench.daemon.pid(name))}
        found["dnsmasq"] = int(next(self.bench.daemon.run.glob("**/default/pid")).read_text())
        return found

    def cpu(self) -> float:
        """Seconds of processor time that our processes have used."""
        return sum(_cpu(pid) for pid in self.pids().values())

    def costs(self) -> dict[str, tuple[int, int]]:
        """KiB of memory and open files of each process."""
        time.sleep(1)
        return {name: (pss(pid), len(os.listdir(f"/proc/{pid}/fd"))) for name, pid in self.pids().items()}


def _all(act: Callable[[str], None], names: list[str]) -> float:
    with ThreadPoolExecutor(PARALLEL) as pool:
        return timed(lambda: list(pool.map(act, names)))


def _median(act: Measure, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        time.sleep(GAP)
        times.append(act())
    return statistics.median(times)


def _cpu(pid: int) -> float:
    """CPU time of all threads as the scheduler counts it, in nanoseconds; /proc/PID/stat has hundredths of a second."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            total += int(path.read_text().split()[0])
    return total / 1e9
