"""One launch, from the request to the end of `true`, inside the engine and from the shell, compared with peers."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench.lib import Agent, Bench, Measure, Table, comparison, interleave, timed
from bench.peers import CRUN, Runtime, bundle_config, docker, podman, root_file_system
from insula.container.service import client
from insula.container.service.protocol import MONITOR_PID, ZYGOTE_PID
from insula.container.service.run_directory import Launch, RunDirectory
from tests.support.peers import Missing

ROUNDS = 25
SLEEPER = "sleeper"


def measure(bench: Bench) -> list[Table]:
    return [engine(bench), shell(bench)]


def real_launch(bench: Bench) -> Launch:
    """The request of insulad to the runtime for an instance of busybox, taken from one that runs."""
    bench.cli.ok("run", "-d", "--name", SLEEPER, "busybox", "sleep", "600")
    identity = bench.cli.json("inspect", SLEEPER)[0]["instance"]["id"]
    launch = RunDirectory(str(bench.daemon.run), identity).launch()
    assert launch
    bench.cli.ok("rm", "-f", SLEEPER)
    launch.config["process"]["args"] = ["/bin/true"]
    sources = bench.scratch / "etc"
    sources.mkdir(exist_ok=True)
    for mount in launch.config["mounts"]:
        if str(mount.get("source", "")).startswith(str(bench.daemon.root)):
            source = sources / Path(mount["source"]).name
            source.touch()
            mount["source"] = str(source)
    return launch


class Engine:
    """The runtime alone: its own monitor and zygote, no daemon, no network, no HTTP."""

    def __init__(self, bench: Bench, launch: Launch) -> None:
        self.launch_of, self.scratch, self.prefix = launch, bench.scratch / "engine", bench.daemon.prefix
        self.loop = asyncio.new_event_loop()
        self.runtime = client.Runtime(bench.scratch / "run" / "engine")
        self.loop.run_until_complete(self.runtime.open())

    def launch(self) -> float:
        name = self.runtime.choose_id(f"{self.prefix}/bench")
        directory = self.scratch / name
        (directory / "upper").mkdir(parents=True)
        (directory / "work").mkdir()
        os.chown(directory / "upper", self.launch_of.id_base, self.launch_of.id_base)
        launch = self.launch_of._replace(
            id=name,
            upper=str(directory / "upper"),
            work=str(directory / "work"),
            cgroup=f"{self.prefix}/bench/{name}",
            log=str(directory),
            volatile=True,
        )

        async def run() -> None:
            await self.runtime.create(launch)
            await self.runtime.start(name)
            record = await self.runtime.wait(name)
            if record.exit_status != 0:
                raise Missing(f"the container ended with {record}")

        seconds = timed(lambda: self.loop.run_until_complete(run()))
        self.loop.run_until_complete(self.runtime.delete(name))
        shutil.rmtree(directory, ignore_errors=True)  # its log may still be open
        return seconds

    def close(self) -> None:
        self.loop.run_until_complete(self.runtime.close())
        for name in (MONITOR_PID, ZYGOTE_PID):
            pid = int((Path(self.runtime.run) / name).read_text().split()[0])
            os.kill(pid, 15)
        self.loop.close()


class Twin:
    """bench/twin.c: the same system calls without an engine around them; it measures itself."""

    def __init__(self, bench: Bench, lower: Path) -> None:
        self.program = bench.scratch / "twin"
        source = Path(__file__).with_name("twin.c")
        try:
            subprocess.run(["gcc", "-O2", "-static", "-o", self.program, source], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as problem:
            raise Missing(f"twin.c can't be compiled: {problem}") from None
        self.lower, self.scratch, self.group = lower, bench.scratch / "twin-scratch", f"{bench.daemon.prefix}-twin"

    def launch(self) -> float:
        shutil.rmtree(self.scratch, ignore_errors=True)
        (self.scratch / "upper").mkdir(parents=True)
        (self.scratch / "work").mkdir()
        command = [self.program, self.lower, self.scratch, self.group]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            raise Missing(done.stderr.strip())
        return float(done.stdout) / 1e3


def engine(bench: Bench) -> Table:
    """In the engine: no process is started but the container's own, except crun's."""
    with ExitStack() as stack:
        launch = real_launch(bench)
        contestants: dict[str, Measure] = {}
        missing: dict[str, str] = {}

        def add(name: str, make: Callable[[], Any]) -> None:
            try:
                peer = make()
            except (Missing, OSError, AssertionError) as problem:
                missing[name] = " ".join(str(problem).split())[:300]
                return
            if hasattr(peer, "close"):
                stack.callback(peer.close)
            contestants[name] = peer.launch

        root = root_file_system(bench)
        add("C twin", lambda: Twin(bench, root))
        add("Insula engine", lambda: Engine(bench, launch))
        add("crun run", lambda: Runtime(bench, CRUN, bundle_config(launch, root), "engine"))
        times, dropped = interleave(contestants, bench.rounds(ROUNDS))
        table = comparison("Launch to exit of `true`, in the engine", times, {**missing, **dropped}, "C twin")
    table.notes += [
        "seven namespaces, limits, overlay, masked paths, capabilities, no_new_privs, seccomp; no network",
        "crun is a process for every launch, with the same config.json; the twin and the engine's requests are not",
    ]
    return table


def shell(bench: Bench) -> Table:
    """A launch from the shell, as users type it, on a network."""
    with ExitStack() as stack:
        agent = Agent()
        stack.callback(agent.close)
        environment = bench.cli.environment()

        def insula(*arguments: str) -> Measure:
            return lambda: agent.seconds(*bench.cli.command(*arguments), env=environment)

        contestants: dict[str, Measure] = {
            "insula run --rm": insula("run", "--rm", "busybox", "true"),
            "insula run --rm --network none": insula("run", "--rm", "--network", "none", "busybox", "true"),
            "insula run -d --rm": insula("run", "-d", "--rm", "busybox", "true"),
        }
        missing: dict[str, str] = {}
        for name, make in (("docker", docker), ("podman", podman)):
            try:
                peer = make(bench)
                stack.callback(peer.close)
            except (Missing, OSError, AssertionError) as problem:
                missing[name] = " ".join(str(problem).split())[:300]
                continue
            contestants[f"{name} run --rm"] = partial(peer.launch, "--network=bridge")
            contestants[f"{name} run --rm --network none"] = partial(peer.launch, "--network=none")
        times, dropped = interleave(contestants, bench.rounds(15))
    table = comparison("`run busybox true` from the shell", times, {**missing, **dropped}, "insula run --rm")
    table.notes.append("`run -d` does not wait for the end")
    return table
