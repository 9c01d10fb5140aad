"""What accounting costs: insulad's processor time while instances sleep, and a reading of all their counters."""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.lib import Bench, Table, timed
from insula.client import Client

COUNTS = (200, 1000)
PARALLEL = 8
WINDOW = 10.0  # seconds between periodic readings
ROUNDS = 20


def measure(bench: Bench) -> list[Table]:
    client, table = (
        Client(str(bench.cli.socket)),
        Table(
            "Accounting", ["instances", "insulad, idle: CPU ms in 10 s", "usage, all asleep, ms", "usage, all read, ms"]
        ),
    )
    running = 0
    for count in (20,) if bench.quick else COUNTS:
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda number: start(client, f"acc{number}"), range(running, count)))
        running = count
        time.sleep(12)  # the launches' own work is over, and all were read once
        idle = min(spent(bench) for _ in range(1 if bench.quick else 3))
        asleep = [timed(lambda: client.tenants.usage("default")) for _ in range(bench.rounds(ROUNDS))]
        client.instances.run("default", "busybox", ["sh", "-c", "while :; do sleep 0.01; done"], name="restless")
        read = [timed(lambda: client.tenants.usage("default")) for _ in range(bench.rounds(ROUNDS))]
        client.instances.remove("default", "restless", force=True)
        figures = [f"{idle * 1e3:.1f}", *(f"{statistics.median(each) * 1e3:.1f}" for each in (asleep, read))]
        table.rows.append([str(count), *figures])
    table.notes += [
        "idle: user and system time of insulad, to 10 ms; the least of three windows of ten seconds, so that "
        "the controllers' pass over all instances, once a minute, is not in it",
        "usage: a request for the tenant's usage with all of its instances; all read: one of them works, so that the "
        "tenant's control group has changed, and every instance's counters are read",
    ]
    return [table]


def start(client: Client, name: str) -> None:
    client.instances.run("default", "busybox", ["sleep", "3600"], name=name)


def spent(bench: Bench) -> float:
    """Processor time of insulad in one window, seconds."""
    before = processor_time(bench)
    time.sleep(WINDOW)
    return processor_time(bench) - before


def processor_time(bench: Bench) -> float:
    fields = Path(f"/proc/{bench.daemon.pid('insulad')}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
