"""Two hundred instances at once, on a network: the time until all run, and until all are removed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from bench.lib import Bench, Table, timed
from insula.client import Client
from insula.model.errors import InsulaError

COUNT = 200
PARALLEL = 16


def measure(bench: Bench) -> list[Table]:
    """Through the API, as a scheduler would ask for them."""
    count = 40 if bench.quick else COUNT
    client = Client(str(bench.cli.socket))
    names = [f"burst{number}" for number in range(count)]
    table = Table(f"{count} instances on one network", ["what", "seconds", "each, ms"])

    failures: list[str] = []

    def each(act: Callable[[str], object]) -> float:
        def attempt(name: str) -> None:
            try:
                act(name)
            except InsulaError as problem:
                failures.append(str(problem))

        with ThreadPoolExecutor(PARALLEL) as pool:
            return timed(lambda: list(pool.map(attempt, names)))

    started = each(lambda name: client.instances.run("default", "busybox", ["sleep", "600"], name=name))
    running = sum(view["status"]["state"] == "running" for view in client.instances.list("default"))
    time.sleep(1)
    removed = each(lambda name: client.instances.remove("default", name, force=True))
    for what, seconds in (("start", started), ("remove", removed)):
        table.rows.append([what, f"{seconds:.2f}", f"{seconds / count * 1e3:.1f}"])
    table.notes.append(f"{PARALLEL} requests at a time through the API; {running} of {count} ran at the end")
    table.notes += [f"{len(failures)} requests failed, the first: {failures[0]}"] if failures else []
    return [table]
