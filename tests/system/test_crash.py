"""kill -9 of insulad, the monitor and the zygote at random moments of create, run and remove.

After each, what ran still runs, what was asked has happened or has not, and asking again works. At the end every
line of output and every exit status is there, and nothing is left over. The seed of a failing point is in its name:
INSULA_TEST_SEED=… plays a whole run again.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.daemon import PROCESSES, Daemon
from tests.support.machine import Run
from tests.support.snapshot import Snapshot, assert_unchanged
from tests.support.wait import patiently, until

POINTS, LONG = 40, 200  # those after POINTS with the mark `long`
LONGEST = 0.15  # seconds into the action
SEED = int(os.environ.get("INSULA_TEST_SEED") or random.SystemRandom().randrange(1 << 30))
TICKER = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"
LEAVER = "while [ ! -e /go ]; do sleep 0.02; done; echo last words; exit 7"


@dataclass(frozen=True)
class Point:
    """One crash: `victim` is killed `delay` seconds into `action`."""

    number: int
    victim: str
    action: str
    delay: float


def points() -> list[Point]:
    dice = random.Random(SEED)
    actions = ("create", "run", "remove", "exec")
    return [
        Point(number, dice.choice(PROCESSES), dice.choice(actions), dice.uniform(0, LONGEST))
        for number in range(POINTS + LONG)
    ]


def parameters() -> list[Any]:
    return [
        pytest.param(point, marks=[] if point.number < POINTS else pytest.mark.long, id=name_of(point))
        for point in points()
    ]


def name_of(point: Point) -> str:
    return f"{SEED}-{point.number}-{point.victim}-{point.action}-{point.delay:.3f}"


@dataclass(frozen=True)
class Town:
    """A daemon with an instance `ticker` that counts, and the host as it was before the first crash."""

    daemon: Daemon
    before: Snapshot
    ticker: dict[str, Any]


def without_engine(snapshot: Snapshot) -> Snapshot:
    """The three processes come back with other numbers and other namespaces; their files with other names."""
    return replace(snapshot, processes=frozenset(), namespaces=frozenset(), files=frozenset(), mounts=frozenset())


def status_of(cli: Cli, name: str) -> dict[str, Any] | None:
    found = [view["status"] for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return dict(found[0]) if found else None


@pytest.fixture(scope="module")
def town(run_: Run) -> Iterator[Town]:
    daemon = Daemon(run_)
    try:
        daemon.start()
        daemon.cli.ok("run", "-d", "--name", "ticker", "busybox", "sh", "-c", TICKER)
        daemon.cli.ok("run", "--rm", "busybox", "true")
        ticker = status_of(daemon.cli, "ticker")
        assert ticker
        yield Town(daemon, daemon.snapshot(), ticker)
    finally:
        daemon.remove()


def crash(daemon: Daemon, victim: str) -> None:
    """kill -9; insulad is started again as an init system would, the others come back by themselves."""
    until(lambda: daemon.pid(victim), f"the {victim} runs")
    assert daemon.kill(victim)
    if victim == "insulad":
        daemon.launch()


def recovered(daemon: Daemon) -> None:
    daemon.wait_until_it_answers()
    for name in PROCESSES:
        until(lambda name=name: daemon.pid(name), f"the {name} is back")  # type: ignore[misc]


@pytest.mark.parametrize("point", parameters())
def test_a_crash(town: Town, point: Point) -> None:
    daemon, cli = town.daemon, town.daemon.cli
    name = f"p{point.number}"
    if point.action == "remove":
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
    command = {
        "create": ("run", "-d", "--name", name, "busybox", "sleep", "600"),
        "run": ("run", "--rm", "--name", name, "busybox", "sh", "-c", "echo out; exit 7"),
        "remove": ("rm", "-f", name),
        "exec": ("exec", "ticker", "sh", "-c", "echo out; exit 7"),
    }[point.action]
    with cli.start(*command) as client:
        time.sleep(point.delay)
        crash(daemon, point.victim)
        out, err = answer_of(client)
    recovered(daemon)
    check_answer(cli, point, name, client, out, err)
    until(lambda: status_of(cli, name) is None or cli.run("rm", "-f", name).status == 0, f"{name} can be removed")
    ticker = status_of(cli, "ticker")
    assert ticker is not None
    assert (ticker["state"], ticker["pid"], ticker["restarts"]) == ("running", town.ticker["pid"], 0)


def answer_of(client: subprocess.Popen[str]) -> tuple[str, str]:
    """The output of a command. A command that does not end is killed."""
    try:
        return client.communicate(timeout=patiently(30))
    except subprocess.TimeoutExpired:
        client.kill()
        raise


def check_answer(cli: Cli, point: Point, name: str, client: subprocess.Popen[str], out: str, err: str) -> None:
    """The answer of the command line must be true; an error must be one line with a hint."""
    what = f"{client.returncode} {out!r} {err!r}"
    if point.action in ("run", "exec"):
        assert client.returncode in (7, 125), what
        if client.returncode == 7:
            assert out == "out\n", what
    elif client.returncode == 0:
        state = status_of(cli, name)
        assert (state is None) if point.action == "remove" else (state and state["state"] == "running"), (state, what)
    if client.returncode not in (0, 7):
        assert err.startswith("error: ") and "; hint: " in err and err.count("\n") == 1, what
    if point.action == "run" and client.returncode == 7:
        until(lambda: status_of(cli, name) is None, "--rm removes it")


@pytest.mark.parametrize("victim", PROCESSES)
def test_an_exit_during_the_crash_is_not_lost(town: Town, victim: str) -> None:
    """It ends while the victim is dead: for insulad, as long as we like."""
    daemon, cli = town.daemon, town.daemon.cli
    name = f"leaver-{victim}"
    cli.ok("run", "-d", "--name", name, "busybox", "sh", "-c", LEAVER)
    pid = status_of(cli, name)["pid"]  # type: ignore[index]
    until(lambda: daemon.pid(victim), f"the {victim} runs")
    daemon.kill(victim)
    with open(f"/proc/{pid}/root/go", "w"):
        pass
    if victim == "insulad":
        until(lambda: not os.path.exists(f"/proc/{pid}"), "it has ended, and was reaped without insulad")
        daemon.launch()
    recovered(daemon)
    assert cli.ok("wait", name) == "7"
    assert cli.ok("logs", name) == "last words"
    cli.ok("rm", name)


@pytest.mark.parametrize("busy", ["alone", "while it stops"])
def test_a_removal_is_committed_before_it_kills(town: Town, busy: str) -> None:
    """insulad dies at the moment at which the instance does: the next one removes it, and doesn't find it dead."""
    daemon, cli = town.daemon, town.daemon.cli
    cli.ok("run", "-d", "--name", "doomed", "--stop-timeout", "600", "busybox", "sleep", "600")  # deaf to SIGTERM
    pidfd = os.pidfd_open(status_of(cli, "doomed")["pid"])  # type: ignore[index]
    clients = []
    if busy == "while it stops":
        clients.append(cli.start("stop", "doomed"))
        until(lambda: status_of(cli, "doomed")["state"] == "stopping", "it is being stopped")  # type: ignore[index]
    insulad = daemon.pid("insulad")
    assert insulad
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    clients.append(cli.start("rm", "-f", "doomed"))
    assert poll.poll(1000 * patiently(30))
    os.kill(insulad, signal.SIGKILL)
    for client in clients:
        with client:
            answer_of(client)
    os.close(pidfd)
    daemon.reap()
    daemon.start()
    until(lambda: status_of(cli, "doomed") is None, "it is removed")


def test_the_network_survives(town: Town) -> None:
    """Instances attached before the crashes answer to instances attached after them."""
    cli = town.daemon.cli
    cli.ok("run", "-d", "--name", "after", "busybox", "sleep", "600")
    assert cli.run("exec", "after", "ping", "-c", "1", "-W", "20", "ticker").status == 0
    cli.ok("rm", "-f", "after")


def test_no_line_of_output_is_lost(town: Town) -> None:
    """The ticker has counted through every crash so far."""
    numbers = [int(line) for line in town.daemon.cli.ok("logs", "ticker").splitlines()]
    assert len(numbers) > 10 * POINTS / 3
    assert numbers == list(range(len(numbers)))


def test_crashes_leave_nothing(town: Town) -> None:
    before, daemon = without_engine(town.before), town.daemon
    assert_unchanged(before, lambda: without_engine(daemon.snapshot()))
    containers = {view["instance"]["id"] for view in daemon.cli.json("ps", "-a")}
    assert set(os.listdir(daemon.root / "instances")) == containers
    assert set(os.listdir(daemon.run / "containers")) == containers
    assert before.cgroups, "the positive control: our control groups are seen"


def test_all_three_at_once(town: Town) -> None:
    """No process holds the streams any more, so output is lost; the instance and its exit are not."""
    daemon, cli = town.daemon, town.daemon.cli
    cli.ok("run", "-d", "--name", "victim", "busybox", "sh", "-c", LEAVER)
    pid = status_of(cli, "victim")["pid"]  # type: ignore[index]
    for name in ("insulad", "monitor", "zygote"):
        daemon.kill(name)
    daemon.start()
    recovered(daemon)
    assert status_of(cli, "victim")["pid"] == pid  # type: ignore[index]
    cli.run("exec", "victim", "touch", "/go")  # its PID 1 may take it along when it ends
    until(lambda: status_of(cli, "victim")["state"] == "exited", "its end is seen")  # type: ignore[index]
    cli.ok("rm", "victim")
