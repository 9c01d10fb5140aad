"""How long a hostile instance of one tenant delays another tenant's request, and whether insulad is the cause.

In each case something is asked about an instance whose owner has prepared it so that the answer takes long, while
another tenant's request, `GET /v1/tenants/calm/instances`, is repeated with short pauses. The longest
of these is shown, beside what the machine did and what the event loop did (`bench/waits.py`).
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path

from bench import hostile
from bench.lib import Bench, Table
from bench.waits import Meter, Probe, Waits
from insula.client import Client
from insula.model.errors import InsulaError
from insula.model.stream import Kind

GOAL = 0.1
RECORDS = 2_000_000
NAMES = 100_000
PROCESSES = 1000
QUIET = 3.0  # seconds
COLUMNS = ("longest", "undisturbed", "quiet", "callback", "requests")
NOTES = [
    f"The goal is {GOAL * 1000:.0f} ms, undisturbed. One request after the other, 3 ms apart.",
    "undisturbed: the longest without the time for which insulad's event loop, or the client, could have run and "
    "other threads had the processors",
    "quiet: the longest of as many requests while nothing is asked of the hostile instance, just afterwards",
    "callback: the most processor time that the event loop spent on one thing before it turned to the next",
]


def measure(bench: Bench) -> list[Table]:
    client = Client(str(bench.cli.socket))
    for tenant in ("calm", "hostile"):
        client.tenants.create(tenant, spec_bytes=None)
        client.networks.create(tenant, "default", subnet="10.0.0.0/24")
    client.instances.run("calm", "busybox", ["sleep", "3600"], name="calm")
    scale = 10 if bench.quick else 1
    meter = Meter(bench)
    table = Table("The longest wait of another tenant", ["while", *COLUMNS, "it took"], notes=NOTES)
    *first, last = cases(bench, client, scale)
    for name, work in chain(first, hostile.cases(bench, client, scale), [last]):
        meter.clear()
        with Probe(bench) as probe:
            began = time.perf_counter()
            work()
            took = time.perf_counter() - began
        processor, callback = meter.busiest()
        with Probe(bench) as quiet:
            time.sleep(min(took, QUIET))
        found, rest = Waits.of(probe.waits), Waits.of(quiet.waits[: len(probe.waits)])
        row = [ms(found.longest), ms(found.undisturbed), ms(rest.longest), ms(processor), str(len(probe.waits))]
        table.rows.append([name, *row, f"{took:.2f} s"])
        print(f"    {' | '.join(table.rows[-1])} ({callback})", file=sys.stderr)
    return [table]


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def cases(bench: Bench, client: Client, scale: int) -> list[tuple[str, Callable[[], object]]]:
    instances = client.instances
    records, names, processes = RECORDS // scale, NAMES // scale, PROCESSES // scale

    def logged() -> Path:
        instances.run("hostile", "busybox", ["true"], name="logged")
        instances.wait("hostile", "logged")
        identity = instances.get("hostile", "logged")["instance"]["id"]
        path = Path(bench.daemon.root, "instances", identity, "log", "log")
        path.write_bytes(b"".join([struct.pack(">BIQ", Kind.STDOUT, 9, time.time_ns()) + b"x"]) * records)
        return path

    def drain(**options: object) -> None:
        for number, _ in enumerate(instances.logs("hostile", "logged", **options)):
            if number > records // 10:
                return

    def many_names() -> None:
        script = f"cd /; seq {names} | xargs touch; sleep 3600"
        instances.run("hostile", "busybox", ["sh", "-c", script], name="names")
        instances.exec_detached("hostile", "names", ["true"])
        upper = Path(bench.daemon.root, "instances", instances.get("hostile", "names")["instance"]["id"], "upper")
        while not (upper / str(names)).exists():
            time.sleep(0.1)

    def many_processes() -> None:
        script = f"i=0; while [ $i -lt {processes} ]; do sleep 3600 & i=$((i+1)); done; wait"
        instances.run("hostile", "busybox", ["sh", "-c", script], name="processes", resources={"pids": 2 * processes})
        while len(instances.top("hostile", "processes")) < processes:
            time.sleep(0.2)

    def packets() -> None:
        with suppress(InsulaError), instances.attach("hostile", "printer", start=True) as attachment:
            for number, _ in enumerate(attachment):
                if number > records // 200:
                    return

    logged()
    many_names()
    many_processes()
    printer = ["sh", "-c", "while :; do echo; done"]
    instances.run("hostile", "busybox", printer, name="printer", start=False)
    tail = f"`logs --tail 10` of {records:,} records of a byte"
    return [
        ("nothing", lambda: time.sleep(1.0)),
        (tail, lambda: drain(tail=10)),
        (f"`logs`: the first {records // 10:,} of them", drain),
        (f"`restart` with {names:,} names in /", lambda: instances.restart("hostile", "names", 0.0)),
        (f"`top` of {processes:,} processes", lambda: [instances.top("hostile", "processes") for _ in range(3)]),
        (f"`explain` of {processes:,} processes", lambda: instances.explain("hostile", "processes")),
        ("`run` that prints a byte at a time", packets),
        (f"`rm` of {names:,} files", lambda: instances.remove("hostile", "names", force=True)),
    ]
