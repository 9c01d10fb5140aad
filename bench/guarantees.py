"""Floors of bandwidth under overload, how soon unused bandwidth is shared and a flood is contained, and what the tree
of classes costs.

A fabric of its own in the network namespace of the benchmarks, and a namespace that plays the outside. Bytes are those
on the wire, as the classes count them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from bench.lib import Bench, Table
from bench.network import ROUNDS, SECONDS, Pair
from bench.overlay import close
from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.guarantees import Rate, Shaping
from tests.support.hosts import Cloud
from tests.support.lab import Lab, World
from tests.support.load import sink, tcp, udp
from tests.support.overload import Controls, switch_port_of

MBIT = 1_000_000
LINK = 200 * MBIT
FLOORS = (80, 40, 30, 20, 10)
SINK = 7000
STEP = 0.05  # seconds


class Contest:
    """Tenants t1, t2 and so on, and what each has sent."""

    def __init__(self, lab: Lab, count: int) -> None:
        self.lab, self.world, self.host = lab, World(), Rtnl()
        for number in range(1, count + 1):
            name = f"t{number}"
            lab.tenant(name)
            lab.network(name)
            lab.instance(name, "web")

    def shape(self, link: int, *floors: int | None) -> None:
        for number, mbit in enumerate(floors, 1):
            rate = Rate(floor=mbit * MBIT if mbit else None)
            self.lab.apply(f"t{number}", shaping=Shaping(link=link, out=rate, in_=rate))

    def netns(self, number: int) -> int:
        return self.lab.instances[f"t{number}", "web"].netns

    def sent(self) -> dict[str, int]:
        found = {}
        for name, tenant in self.lab.tenants.items():
            counters = self.lab.fabric.shaper.counters(self.host, tenant.index)
            found[name] = counters["out"].bytes if "out" in counters else 0
        return found

    def rates(self, seconds: float) -> dict[str, float]:
        began, before = time.monotonic(), self.sent()
        time.sleep(seconds)
        after, took = self.sent(), time.monotonic() - began
        return {name: (after[name] - before[name]) * 8 / took / MBIT for name in after}

    def until(self, right: Callable[[dict[str, float]], bool]) -> float:
        return _until(lambda: right(self.rates(STEP)))


def _until(right: Callable[[], bool], limit: float = 10.0) -> float:
    """Return the milliseconds until it is right for three steps in a row; those are not counted."""
    began, times = time.monotonic(), 0
    while times < 3:
        moment = time.monotonic()
        times = times + 1 if right() else 0
        if times == 1:
            found = (moment - began) * 1e3
        if time.monotonic() - began > limit:
            return float("inf")
    return found


def measure(bench: Bench) -> list[Table]:
    with ExitStack() as stack:
        lab = stack.enter_context(_lab(bench))
        contest = Contest(lab, len(FLOORS))
        stack.callback(contest.host.close)
        stack.enter_context(sink(contest.world.instance.netns, SINK))
        contest.shape(LINK, *FLOORS)
        tables = [_floors(bench, contest), _changes(bench, contest)]
        contest.shape(10_000 * MBIT, *([None] * len(FLOORS)))
        tables.append(_cost(bench, contest, stack))
    return tables


@contextmanager
def _lab(bench: Bench) -> Iterator[Lab]:
    lab = Lab(run=bench.scratch / "run" / "lab")
    try:
        yield lab
    finally:
        lab.fabric.teardown()
        for instance in lab.instances.values():
            instance.remove()
        with Rtnl() as host:
            host.execute(netlink.delete_link(name="wan"))


def _floors(bench: Bench, contest: Contest) -> Table:
    """All five send as much as they can, the one with the lowest floor with eight connections."""
    table = Table("Floors under overload", ["tenant", "floor, Mbit/s", "worst second", "× floor"])
    with ExitStack() as load:
        for number in range(1, len(FLOORS) + 1):
            connections = 8 if number == len(FLOORS) else 2
            load.enter_context(tcp(contest.netns(number), World.ADDRESS, SINK, connections=connections))
        time.sleep(2)
        seconds = [contest.rates(1) for _ in range(3 if bench.quick else 10)]
    for number, mbit in enumerate(FLOORS, 1):
        worst = min(each[f"t{number}"] for each in seconds)
        table.rows.append([f"t{number}", str(mbit), f"{worst:.1f}", f"{worst / mbit:.3f}"])
    table.notes.append(f"link of {LINK // MBIT} Mbit/s; bytes on the wire; t{len(FLOORS)} has 8 connections, others 2")
    return table


def _changes(bench: Bench, contest: Contest) -> Table:
    """How soon the others have what one no longer needs, and their floors when one begins a flood of datagrams."""
    table = Table("Changes of load", ["what", "median ms", "worst ms"])
    usable = LINK * 0.95 / MBIT
    floors = {"t2": FLOORS[1], "t3": FLOORS[2]}
    shared: dict[str, list[float]] = {"cubic": [], "bbr": []}
    contained = list[float]()
    for control in ("cubic", "bbr"):
        for _ in range(3 if bench.quick else 10):
            with ExitStack() as load:
                for number in (2, 3):
                    source = contest.netns(number)
                    load.enter_context(tcp(source, World.ADDRESS, SINK, connections=2, control=control))
                with udp(contest.netns(1), World.ADDRESS, SINK):  # TCP would go on with what it has in its buffers
                    time.sleep(1)
                shared[control].append(contest.until(lambda found: found["t2"] + found["t3"] >= usable * 0.95))
                load.enter_context(udp(contest.netns(5), World.ADDRESS, SINK))
                contained.append(contest.until(lambda found: all(found[n] >= floors[n] * 0.95 for n in floors)))
    for control, values in shared.items():
        table.rows.append(_row(f"unused bandwidth is shared ({control})", values))
    table.rows.append(_row("floors hold after a flood of datagrams began", contained))
    table.rows.append(_row("the same with a flood from another host", _from_another_host(bench)))
    table.notes.append("with BBR it may take longer: it sends more only after it has probed for it")
    table.notes.append(f"in steps of {STEP * 1e3:.0f} ms: 0 is within the first")
    return table


def _row(what: str, values: list[float]) -> list[str]:
    return [what, f"{statistics.median(values):.0f}", f"{max(values):.0f}"]


def _from_another_host(bench: Bench) -> list[float]:
    """acme, with a floor, sends by TCP from host 1 to 3; globex begins a flood from host 2. Return the milliseconds
    until acme has its floor there."""
    floor, found = 60 * MBIT, list[float]()
    with ExitStack() as stack:
        cloud = Cloud(3)
        stack.callback(close, cloud)
        for name, host in (("acme", 1), ("globex", 2)):
            cloud.tenant(name)
            cloud.network(name)
            for each, place in (("a", host), ("b", 3)):
                stack.callback(cloud.instance(name, each, place).remove)
            rate = Rate(floor=floor if name == "acme" else None)
            cloud.apply(name, shaping=Shaping(link=LINK // 2, out=rate, in_=rate))
            stack.enter_context(sink(cloud.instances[name, "b"].netns, SINK))
        receiver = cloud.hosts[2]
        switch_port_of(receiver, LINK // 2)
        controls = Controls(cloud)
        stack.callback(controls.close)
        acme, globex = (cloud.instances[name, "a"].netns for name in ("acme", "globex"))
        to = {name: cloud.instances[name, "b"].port.address for name in ("acme", "globex")}

        def arrived() -> int:
            with call_in(receiver.netns, Rtnl) as rtnl:
                return receiver.fabric.shaper.counters(rtnl, cloud.tenants["acme"].index)["in"].bytes

        def holds() -> bool:
            began, before = time.monotonic(), arrived()
            time.sleep(STEP)
            return (arrived() - before) * 8 / (time.monotonic() - began) >= floor * 0.95

        for _ in range(3 if bench.quick else 10):
            with tcp(acme, to["acme"], SINK, control="cubic"):
                time.sleep(1)
                with udp(globex, to["globex"], SINK):
                    time.sleep(STEP)
                    found.append(STEP * 1e3 + _until(holds))
            time.sleep(1.5)  # ceilings go
    return found


def _cost(bench: Bench, contest: Contest, stack: ExitStack) -> Table:
    """One stream to the outside with and without the tree, which limits nothing."""
    instance = contest.lab.instances["t1", "web"]
    world = contest.world.instance
    pair = Pair(stack, f"/proc/{instance.pid}/ns/net", f"/proc/{world.pid}/ns/net", World.ADDRESS)
    seconds, rounds = (0.5, 3) if bench.quick else (SECONDS, ROUNDS)
    streams: dict[str, list[float]] = {"with the tree": [], "without": []}
    for number in range(rounds + 1):
        for name in sorted(streams, reverse=bool(number % 2)):
            if name == "without":
                for tenant in contest.lab.tenants:
                    contest.lab.apply(tenant, shaping=None)
            else:
                contest.shape(400_000 * MBIT, *([None] * len(FLOORS)))
            if (value := pair.measure("stream", seconds)) and number:
                streams[name].append(value)
    table = Table("Cost of the tree", ["what", "TCP, Mbit/s"])
    for name, values in streams.items():
        table.rows.append([name, f"{statistics.median(values):.0f}"])
    ratio = statistics.median(a / b for a, b in zip(streams["with the tree"], streams["without"], strict=True))
    table.notes.append(f"throughput is {ratio:.2f} of that without; one stream from an instance to the outside")
    return table
