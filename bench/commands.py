"""The commands that people type all day: `ps` and `exec`, beside docker's and podman's."""

from __future__ import annotations

from contextlib import ExitStack

from bench.lib import Agent, Bench, Measure, Missing, Table, comparison, interleave
from bench.peers import Docker, Podman

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
        try:
            docker = Docker(bench)
            stack.callback(docker.close)
            docker.seconds("run", "-d", "--name", "idle", "bench", "sleep", "3600")
            stack.callback(lambda: docker.agent.run(docker.docker, "rm", "-f", "idle", env=docker.env))
            ps["docker ps"] = lambda: docker.seconds("ps")
            execute["docker exec"] = lambda: docker.seconds("exec", "idle", "true")
        except (Missing, OSError, AssertionError) as problem:
            missing["docker"] = " ".join(str(problem).split())[:300]
        try:
            podman = Podman(bench)
            stack.callback(podman.close)
            podman.seconds("run", "-d", "--name", "idle", podman.parent, "localhost/bench", "sleep", "3600")
            ps["podman ps"] = lambda: podman.seconds("ps")
            execute["podman exec"] = lambda: podman.seconds("exec", "idle", "true")
        except (Missing, OSError, AssertionError) as problem:
            missing["podman"] = " ".join(str(problem).split())[:300]
        tables = []
        for title, contestants, base in (("`ps`", ps, "insula ps"), ("`exec NAME true`", execute, "insula exec")):
            times, dropped = interleave(contestants, bench.rounds(ROUNDS))
            tables.append(comparison(title, times, {**missing, **dropped}, base))
    tables[0].notes.append(f"{INSTANCES} instances run in Insula, one container in each peer")
    return tables
