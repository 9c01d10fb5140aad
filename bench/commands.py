"""Frequent commands: `ps` and `exec`, compared with docker's and podman's."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from bench.lib import Agent, Bench, Measure, Table, comparison, interleave
from bench.peers import docker, podman
from tests.support.peers import IMAGE, Missing

ROUNDS = 20
INSTANCES = 10


def measure(bench: Bench) -> list[Table]:
    cli = bench.cli
    names = [f"idle{number}" for number in range(INSTANCES)]
    for name in names:
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "3600")
    with ExitStack() as stack:
        stack.callback(lambda: [cli.ok("rm", "-f", name) for name in names])
        agent = Agent()
        stack.callback(agent.close)
        environment = cli.environment()

        def insula(*arguments: str) -> Measure:
            return lambda: agent.seconds(*cli.command(*arguments), env=environment)

        ps: dict[str, Measure] = {"insula ps": insula("ps")}
        execute: dict[str, Measure] = {"insula exec": insula("exec", names[0], "true")}
        missing: dict[str, str] = {}
        for name, make in (("docker", docker), ("podman", podman)):
            try:
                peer = make(bench)
                stack.callback(peer.close)
                peer.seconds("run", "-d", "--name", "idle", "--network=bridge", IMAGE, "sleep", "3600")
            except (Missing, OSError, AssertionError) as problem:
                missing[name] = " ".join(str(problem).split())[:300]
                continue
            ps[f"{name} ps"] = partial(peer.seconds, "ps")
            execute[f"{name} exec"] = partial(peer.seconds, "exec", "idle", "true")
        tables = []
        for title, contestants, base in (("`ps`", ps, "insula ps"), ("`exec NAME true`", execute, "insula exec")):
            times, dropped = interleave(contestants, bench.rounds(ROUNDS))
            tables.append(comparison(title, times, {**missing, **dropped}, base))
    tables[0].notes.append(f"{INSTANCES} instances run in Insula, one container in each peer")
    return tables
