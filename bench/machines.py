"""Virtual machines: how fast they start and what memory they take, beside QEMU alone with the same command line."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from bench.lib import GAP, Agent, Bench, Table, comparison, interleave, timed
from insula.client import Client
from insula.control.instances.drivers.machine.shim import ask
from insula.kernel import sealed
from insula.kernel.event_loop import EventLoop
from insula.machine.qemu import root
from insula.machine.qemu.state import load
from insula.machine.shim.agent import AgentConnection
from insula.machine.shim.plan import command
from insula.machine.shim.qmp import Qmp
from insula.machine.shim.start import StartedQemu
from insula.model.errors import InsulaError
from tests.support import guests as machines
from tests.support.guests import DISK, Guest, Guests
from tests.support.peers import Missing

ROUNDS = 10
LONG = 300.0
TOGETHER = 20
IDENTITY = {"hostname": "guest", "generation": "bench"}


def measure(bench: Bench) -> list[Table]:
    if (found := machines.kernel()) is None:
        raise Missing("the kernel of guests is not there: scripts/kernel fetches it")
    path = bench.scratch / "guests"
    path.mkdir()
    guests = Guests(path, found)
    try:
        return [
            engine(bench, guests),
            memory(guests),
            forks(bench, guests),
            shell(bench),
            forked(bench),
            together(bench),
        ]
    finally:
        guests.close()


# -- in the engine ---------------------------------------------------------------------------------------------------


def engine(bench: Bench, guests: Guests) -> Table:
    """From the start of a process to the agent's answer with the machine's identity, and to a program's output."""
    sealed.mount_sealed()  # as insulad does
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(bench.rounds(ROUNDS) + 1):
        for cold in (False, True):
            kind = "boot" if cold else "copy"
            found = {f"{kind}: QEMU alone, to the agent": bare(guests, cold=cold)}
            to_agent, to_output = jailed(guests, cold=cold)
            found[f"{kind}: Insula, to the agent"] = to_agent
            found[f"{kind}: Insula, to the first output of a program"] = to_output
            for name, seconds in found.items():
                if number:
                    times[name].append(seconds)
            time.sleep(GAP)
    table = comparison("Start of a virtual machine, in the engine", times, {}, "copy: QEMU alone, to the agent")
    table.notes += [
        f"from the start of the process: of QEMU, and of `insula-oci run` for the machine in its container; {MODEL}",
        "QEMU alone has the same command line, the same disks and the same template, and no container around it",
        "the program is `echo` of busybox, from its image, on a disk of its own",
    ]
    return table


MODEL = "160 MiB, one processor, translated by QEMU (TCG)"


def bare(guests: Guests, *, cold: bool) -> float:
    """Seconds until the agent of a machine that is only QEMU has answered."""
    with guests.given() as (disk, descriptors):
        copies = [os.dup(fd) for fd in descriptors]
        config = guests.machine(cold, copies)
        kernel, initramfs = (f"{guests.root}{path}" for path in (root.KERNEL, root.INITRAMFS))
        plan = command(config._replace(kernel=kernel, initramfs=initramfs), root.QEMU)
        started = time.perf_counter()
        qemu = StartedQemu(plan)  # which closes what QEMU has been given
        try:
            for fd in {*copies} - {*plan["descriptors"]}:
                os.close(fd)
            qmp = Qmp(qemu.qmp)
            if not cold:
                load(qmp, plan["state"], DISK)
            agent = AgentConnection(qemu.agent.fileno(), EventLoop("bench"), lambda: None)
            agent.request("identity", **IDENTITY, seed=os.urandom(64).hex(), time=time.time_ns())
            return time.perf_counter() - started
        finally:
            os.kill(qemu.pid, signal.SIGKILL)
            os.waitpid(qemu.pid, 0)
            disk.unlink()


def jailed(guests: Guests, *, cold: bool) -> tuple[float, float]:
    """Seconds until the agent has answered, and until the first output of a program."""
    with guests.start("sh", "-c", "echo ready; exec sleep 600", cold=cold) as guest:
        if guest.line() != "ready\n":
            raise Missing("the machine did not start")
        output = time.monotonic() - guest.began
        answer = ready(guest)
        return answer["began"] + answer["seconds"]["identity"] - guest.began, output


def ready(guest: Guest) -> dict[str, Any]:
    """What the shim says when the machine is ready."""
    netns = os.open(f"/proc/{guest.pid}/ns/net", os.O_RDONLY)
    answer = asyncio.run(ask(netns, {"ask": "ready"}))
    assert answer is not None
    return answer


# -- memory ---------------------------------------------------------------------------------------------------------


def memory(guests: Guests) -> Table:
    """Private pages of QEMU and of the shim, while another machine of the same kind runs."""
    table = Table("Memory of a virtual machine, MiB", ["what", "QEMU, private", "shim, private", "both"])
    sleep = ("sh", "-c", "echo ready; exec sleep 600")
    for cold in (False, True):
        with guests.start(*sleep, cold=cold) as beside, guests.start(*sleep, cold=cold) as guest:
            assert beside.line() == guest.line() == "ready\n"
            time.sleep(1)
            name = "booted" if cold else "copy"
            _row(table, f"{name}, its program sleeps", guest)
            if not cold:
                assert guest.execute("ps")[0] == 0
                _row(table, f"{name}, after `ps` in it", guest)
    table.notes.append(f"{MODEL}; Private_Clean and Private_Dirty of proc_pid_smaps(5); two machines run at a time")
    return table


def _row(table: Table, what: str, guest: Guest) -> None:
    shim, [qemu] = guest.pid, children(guest.pid)
    sizes = [private(qemu), private(shim)]
    table.rows.append([what, *(f"{size:.1f}" for size in (*sizes, sum(sizes)))])


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def private(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


# -- forks ------------------------------------------------------------------------------------------------------------


def forks(bench: Bench, guests: Guests) -> Table:
    """How long a guest stands still, how soon the agents of its copies answer, and what is a copy's own."""
    times: dict[str, list[float]] = defaultdict(list)
    with guests.start("sh", "-c", "while read -r word; do echo $word; done") as guest:
        echo(guest)
        for _ in range(bench.rounds(ROUNDS)):
            moment = guest.moment()
            times["the original stands still, s"].append(moment.seconds)
            with guests.start(moment=moment) as one, guests.start(moment=moment) as other:
                for copy in (one, other):
                    echo(copy)
                    answer = ready(copy)
                    seconds = answer["began"] + answer["seconds"]["identity"] - copy.began
                    times["a copy's agent has answered after, s"].append(seconds)
                time.sleep(1)
                for copy in (one, other):
                    [qemu] = children(copy.pid)
                    times["a copy's private memory in QEMU, MiB"].append(private(qemu))
            os.close(moment.memory)
            os.close(moment.state)
            moment.disk.unlink()
    table = Table("Copies of a virtual machine that runs", ["what", "median", "least", "most"])
    for what, found in times.items():
        table.rows.append([what, *(f"{each:.2f}" for each in (statistics.median(found), min(found), max(found)))])
    table.notes.append(f"{MODEL}; two copies of each moment at once, in containers; a program that waits")
    return table


def echo(guest: Guest) -> None:
    """Have the program of a guest answer."""
    assert guest.process.stdin is not None
    guest.process.stdin.write("word\n")
    guest.process.stdin.flush()
    if guest.line() != "word\n":
        raise Missing("the machine did not start")


# -- with insulad --------------------------------------------------------------------------------------------------


def shell(bench: Bench) -> Table:
    """From the shell, as users type it, on a network."""
    agent, environment = Agent(), bench.cli.environment()
    run = ("run", "--rm")

    def insula(*arguments: str) -> Any:
        return lambda: agent.seconds(*bench.cli.command(*run, *arguments, "busybox", "echo"), env=environment)

    try:
        times, dropped = interleave(
            {
                "insula run --rm": insula(),
                "insula run --vm --rm": insula("--vm"),
                "insula run --vm --rm --network none": insula("--vm", "--network", "none"),
                "insula run --vm --cold --rm": insula("--vm", "--cold"),
            },
            bench.rounds(ROUNDS),
        )
    finally:
        agent.close()
    table = comparison("`run busybox echo` from the shell", times, dropped, "insula run --rm")
    table.notes.append("256 MiB, one processor; to the end of the machine, which writes its disk and turns itself off")
    return table


def forked(bench: Bench) -> Table:
    """A machine that runs is forked: from the shell to the agents' answers."""
    cli = bench.cli
    table = Table("`insula fork` of a machine of 128 MiB", ["copies", "s", "each, ms"])
    cli.ok("run", "-d", "--vm", "-m", "128m", "--name", "parent", "busybox", "sleep", "3600", timeout=LONG)
    for count in (1, 4):
        times = []
        for _ in range(bench.rounds(ROUNDS)):
            times.append(timed(partial(cli.ok, "fork", "-n", str(count), "parent", timeout=LONG)))
            states = {view["instance"]["name"]: view["status"]["state"] for view in cli.json("ps")}
            names = sorted(set(states) - {"parent"})
            if [states[name] for name in names] != ["running"] * count:
                raise Missing(f"{count} copies do not run: {states}")
            cli.ok("rm", "-f", *names)
        seconds = statistics.median(times)
        table.rows.append([str(count), f"{seconds:.2f}", f"{seconds / count * 1e3:.0f}"])
    cli.ok("rm", "-f", "parent")
    table.notes.append("median; the copies run when the command ends; on one network, a program that sleeps")
    return table


def together(bench: Bench) -> Table:
    """Many at once, through the API."""
    client = Client(str(bench.cli.socket))
    count = 5 if bench.quick else TOGETHER
    names = [f"machine{number}" for number in range(count)]
    failures: list[str] = []

    def start(name: str) -> None:
        try:
            options = {"kind": "machine", "cold": False}
            client.instances.run("default", "busybox", ["sleep", "600"], name=name, options=options)
        except InsulaError as problem:
            failures.append(str(problem))

    start("warm")
    with ThreadPoolExecutor(count) as pool:
        seconds = timed(lambda: list(pool.map(start, names)))
    running = sum(view["status"]["state"] == "running" for view in client.instances.list("default"))
    sizes = [private(child) for shim in _shims(client) for child in children(shim)]
    for name in ["warm", *names]:
        with suppress(InsulaError):
            client.instances.remove("default", name, force=True)
    table = Table(f"{count} virtual machines at once", ["what", "seconds", "each, ms"])
    table.rows.append(["to the answer of all agents", f"{seconds:.2f}", f"{seconds / count * 1e3:.0f}"])
    table.notes.append(f"on one network, through the API; {running - 1} of {count} ran at the end")
    if sizes:
        table.notes.append(f"private memory of QEMU, median: {statistics.median(sizes):.1f} MiB")
    table.notes += [f"{len(failures)} requests failed, the first: {failures[0]}"] if failures else []
    return table


def _shims(client: Client) -> Iterator[int]:
    for view in client.instances.list("default"):
        if pid := view["status"].get("pid"):
            yield int(pid)
