"""`make bench`: all sections one after another, and docs/benchmarks.md at the end.

    python -m bench.run [--only SECTION]… [--quick] [--output FILE]

With --only or --quick the tables are printed and no file is written, unless --output names one.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path

from bench.lib import Bench, machine_facts, version
from tests.support import machine
from tests.support.peers import Host, Missing

SECTIONS = (
    *("launch", "steps", "runtimes", "burst", "scale", "start", "commands", "api", "memory", "network", "ports"),
    *("outside", "overlay", "guarantees", "policy", "verify", "accounting", "revocation", "names", "stalls"),
    *("machines", "machine_network", "machine_devices", "machine_migration"),
)
REPORT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Written by `make bench`. All contestants of a table are measured in one run, in turns, with pauses in between;
figures are medians. On a small or busy machine trust the ratios, and those to ±25 %. Insula and its peers run in
private network, mount and pid namespaces; their data is on the same file system.
"""


def peers() -> list[tuple[str, str]]:
    """Whom we compare with."""
    names = ("crun", "runc", "docker", "podman")
    try:
        host = Host()
    except Missing as problem:
        return [(name, str(problem)) for name in names]
    try:
        return [(name, version(*host.command("env", "PATH=/usr/sbin:/usr/bin", name, "--version"))) for name in names]
    finally:
        host.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description="Measures Insula beside its peers.")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="only this section")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works")
    parser.add_argument("--output", type=Path, help="write the report there")
    options = parser.parse_args()
    output = options.output or (None if options.only or options.quick else REPORT)
    output = output and output.absolute()  # a section changes the working directory
    if not machine.possible():
        print("error: benchmarks take root, unshare, ip and tini; hint: run scripts/bench as root", file=sys.stderr)
        return 1
    if not machine.inside():
        machine.enter("bench.run")

    failed = False
    parts = [INTRODUCTION, "| | |\n|---|---|"]
    parts[-1] += "".join(f"\n| {name} | {value} |" for name, value in [*machine_facts(), *peers()]) + "\n"
    run = machine.Run()
    try:
        for name in options.only or SECTIONS:
            started = time.monotonic()
            print(f"==> {name}", file=sys.stderr)
            bench = None
            try:
                bench = Bench.open(run, quick=options.quick)
                parts += [table.markdown() for table in importlib.import_module(f"bench.{name}").measure(bench)]
            except Exception as problem:
                failed = True
                traceback.print_exc()
                parts.append(f"## {name}\n\nnot measured: {' '.join(str(problem).split())[:300]}\n")
            finally:
                if bench:
                    bench.close()
            print(f"    {time.monotonic() - started:.0f} s", file=sys.stderr)
    finally:
        run.close()
    report = "\n".join(parts)
    if output is None:
        print(report)
    else:
        output.write_text(report)
        print(f"written: {output}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
