"""The memory of an idle container: the growth of insulad, monitor and zygote, in PSS (proc_pid_smaps(5))."""

from __future__ import annotations

import time
from pathlib import Path

from bench.lib import Bench, Table
from insula.client import Client
from tests.support.daemon import PROCESSES

COUNT = 100


def pss(pid: int) -> int:
    """Proportional set size in KiB: shared pages count by the number of their users."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def sizes(bench: Bench) -> dict[str, int]:
    return {name: pss(pid) for name in PROCESSES if (pid := bench.daemon.pid(name))}


def measure(bench: Bench) -> list[Table]:
    count = 20 if bench.quick else COUNT
    client = Client(str(bench.cli.socket))
    client.instances.run("default", "busybox", ["sleep", "600"], name="warm")
    time.sleep(1)
    before = sizes(bench)
    names = [f"memory{number}" for number in range(count)]
    for name in names:
        client.instances.run("default", "busybox", ["sleep", "600"], name=name)
    time.sleep(2)
    after = sizes(bench)
    for name in ["warm", *names]:
        client.instances.remove("default", name, force=True)
    table = Table("Memory beside an idle container", ["process", "PSS, MiB", f"with {count} more", "KiB each"])
    for name, size in before.items():
        grown = after[name] - size
        table.rows.append([name, f"{size / 1024:.1f}", f"{after[name] / 1024:.1f}", f"{grown / count:.0f}"])
    first, last = sum(before.values()), sum(after.values())
    table.rows.append(["all", f"{first / 1024:.1f}", f"{last / 1024:.1f}", f"{(last - first) / count:.0f}"])
    table.notes.append("conmon has 1.1 MB each and containerd-shim 12.2 MB: measured earlier, not in this run")
    return [table]
