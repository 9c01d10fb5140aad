"""The time from the start of insulad to its first answer: with no state, and with remains of hostile instances."""

from __future__ import annotations

import statistics
import time

from bench.lib import Bench, Table
from insula.client import Client
from insula.model.errors import InsulaError
from tests.support.zoo import Zoo

ROUNDS = 5
LIMIT = 30.0


def measure(bench: Bench) -> list[Table]:
    table = Table("Start of insulad", ["what is there", "first answer, ms", "every instance looked at, ms"])
    rounds = bench.rounds(ROUNDS)
    table.rows.append(row("nothing", [start(bench) for _ in range(rounds)]))
    with Zoo.open(bench.daemon) as zoo:
        table.rows.append(row(f"{len(zoo.ids)} hostile instances' remains", [start(bench)]))
        table.rows.append(row("the same, put right by then", [start(bench) for _ in range(rounds)]))
    table.notes += [
        "from execve of the daemon until `GET /v1/status` is answered, asked every 5 ms; medians",
        "the second row is one start, for the next one finds most of it repaired",
        "what the zoo holds is in tests/support/zoo.py",
    ]
    return [table]


def row(what: str, starts: list[tuple[float, float]]) -> list[str]:
    answers, looks = zip(*starts, strict=True)
    return [what, f"{statistics.median(answers) * 1e3:.0f}", f"{statistics.median(looks) * 1e3:.0f}"]


def start(bench: Bench) -> tuple[float, float]:
    """Seconds to the first answer, and until every instance was looked at."""
    daemon, client = bench.daemon, Client(str(bench.cli.socket), timeout=LIMIT)
    daemon.kill("insulad")
    began = time.monotonic()
    daemon.launch()
    first = None
    while time.monotonic() - began < LIMIT:
        try:
            status = client.host.status()
        except (InsulaError, OSError):
            time.sleep(0.005)
            continue
        first = first or time.monotonic() - began
        if not status["reconciling"]:
            return first, time.monotonic() - began
        time.sleep(0.005)
    raise AssertionError(f"after {LIMIT:g} s not everything was looked at")
