"""Guests whose kernel and agent are the guest's own, as after root in it has loaded a kernel of its choice: what the
shim and insulad make of what they send. The agent is ours, changed; what it does is chosen by the host name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from insula.machine.guest import initramfs
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until

LONG = 300.0
INIT = """\
import os, struct, time
from insula.agent import main as agent
from insula.machine import protocol
usual = agent.Agent._answer
mode = []
slept = []
def send(self, data):
    fd = self.channel.fd
    os.set_blocking(fd, True)
    while data:
        data = data[os.write(fd, data):]
def answer(self, session, request):
    verb = request["verb"]
    if verb == "identity":
        mode[:] = [request["hostname"]]
        if mode == ["mute"]:
            time.sleep(100000)
        if mode == ["another"]:
            return dict(generation="0" * 32, version=protocol.VERSION)
        if mode == ["list"]:
            self.channel.send(session, protocol.REPLY, b"[1]")
            return None
        if mode == ["deep"]:
            self.channel.send(session, protocol.REPLY, b"[" * 100000)
            return None
        if mode == ["huge"]:
            send(self, struct.pack(">IBI", session, protocol.REPLY, 0xffffffff) + bytes(100000))
            time.sleep(100000)
        if mode == ["garbage"]:
            send(self, os.urandom(1 << 20))
            time.sleep(100000)
        if mode in (["slow"], ["unheld"]) and self.first and not slept:
            slept.append(1)
            time.sleep(4)
    if verb == "freeze" and mode == ["unheld"]:
        raise OSError(1, "no")
    if verb == "start" and mode == ["status"]:
        self.channel.send(session, protocol.REPLY, b"{{}}")
        self.channel.send(session, protocol.EXIT, b'{{"status": 1' + b"0" * 4000 + b"}}")
        return None
    if verb == "start" and mode == ["text"]:
        self.channel.send(session, protocol.REPLY, b"{{}}")
        self.channel.send(session, protocol.EXIT, b'{{"status": "zero"}}')
        return None
    if verb == "start" and mode == ["flood"]:
        self.channel.send(session, protocol.REPLY, b"{{}}")
        frame = protocol.encode(session, protocol.STDOUT, b"flood " * 5000)
        stray = protocol.encode(77777, protocol.STDOUT, b"stray " * 5000)
        while True:
            send(self, frame + stray)
    if verb == "exec" and mode == ["silent"]:
        return None
    if verb == "exec" and mode == ["liar"]:
        self.channel.send(session, protocol.ERROR, b'{{"step": 5, "errno": "x", "error": ["\\\\u001b[2J"]}}')
        return None
    return usual(self, session, request)
agent.Agent._answer = answer
agent.main()
"""


TELL = "while :; do cut -d ' ' -f 1 /proc/uptime; usleep 50000; done"
"""A program that prints the seconds since the guest was booted."""


@pytest.fixture(scope="module")
def hostile(daemon: Daemon, guests_kernel: Path) -> Iterator[Cli]:
    """The command line of a daemon whose machines, if they are booted, have this agent."""
    cli = daemon.cli
    cli.ok("run", "--vm", "--rm", "--network", "none", "busybox", "true", timeout=LONG)
    [root] = daemon.root.glob("machines/*/*/rootfs")
    init = initramfs.INIT.split("from insula.agent.main import main")[0]
    before = (root / "boot/initramfs").read_bytes()
    replace(root, initramfs.build(guests_kernel / "modules", init + INIT))
    yield cli
    replace(root, before)


def replace(root: Path, data: bytes) -> None:
    (root / "boot/new").write_bytes(data)
    (root / "boot/new").rename(root / "boot/initramfs")


@pytest.fixture
def guests(hostile: Cli) -> Iterator[Cli]:
    yield hostile
    names = [view["instance"]["name"] for view in hostile.json("ps", "-a")]
    if names:
        hostile.ok("rm", "-f", *names, timeout=LONG)


def words(mode: str) -> tuple[str, ...]:
    """Those of `insula run` for a machine with this agent."""
    return ("run", "-d", "--vm", "--cold", "--name", mode, "busybox", "sh", "-c", TELL)


def begin(cli: Cli, mode: str) -> None:
    cli.run(*words(mode), timeout=LONG)


def status(cli: Cli, name: str) -> dict[str, Any]:
    found = [dict(view["status"]) for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return found[0] if found else {"state": "none"}


@pytest.mark.parametrize(
    ("mode", "code"), [("another", 125), ("list", 125), ("deep", 125), ("huge", 125), ("garbage", 125)]
)
def test_what_is_no_answer_ends_the_machine_with_one_line(guests: Cli, mode: str, code: int) -> None:
    begin(guests, mode)
    until(lambda: status(guests, mode)["state"] == "exited", "it ended", LONG)
    assert status(guests, mode)["exit"]["exit_status"] == code
    said = guests.run("logs", mode).err
    assert said.count("\n") == 1 and said.startswith("the machine ") and len(said) < 300, said


@pytest.mark.parametrize("mode", ["status", "text"])
def test_an_exit_status_that_is_none(guests: Cli, mode: str) -> None:
    begin(guests, mode)
    until(lambda: status(guests, mode)["state"] == "exited", "it ended", LONG)
    assert 0 <= status(guests, mode)["exit"]["exit_status"] <= 255


def test_one_that_never_answers_is_starting_and_delays_nobody(guests: Cli, cli: Cli) -> None:
    with guests.start(*words("mute")) as starting:
        until(lambda: status(guests, "mute")["state"] == "starting", "it is made", LONG)
        with guests.start("exec", "mute", "true") as waiting:
            assert cli.ok("run", "--rm", "busybox", "echo", "well") == "well"
            assert guests.json("ps", "-a") and guests.json("stats", "--no-stream") and guests.json("explain", "mute")
            assert waiting.poll() is None, "the control: who needs the guest waits"
            assert "starting" in waiting.communicate(timeout=patiently(LONG))[1]
        starting.wait(LONG)
    assert status(guests, "mute")["state"] == "starting", "it is not ended for that"
    guests.ok("rm", "-f", "mute")


def test_one_that_floods_is_bounded(guests: Cli, cli: Cli, daemon: Daemon) -> None:
    """It sends output without a window, and of programs that there are not: memory and log are bounded, and others are
    served."""
    begin(guests, "flood")
    insulad = daemon.pid("insulad")

    def memory(pid: int) -> int:
        line = next(each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in each)
        return int(line.split()[1]) >> 10

    before = memory(insulad or 0)
    until(lambda: "flood" in guests.run("logs", "--tail", "1", "flood").out, "it floods", LONG)
    for _ in range(5):
        assert cli.ok("run", "--rm", "busybox", "echo", "well") == "well"
    assert memory(insulad or 0) < before + 100, "MiB"
    logs = [path for path in daemon.root.glob("instances/*/*log*") if path.is_file()]
    assert sum(path.stat().st_size for path in logs) < 200 << 20
    guests.ok("rm", "-f", "flood")


def test_one_that_does_not_start_programs(guests: Cli) -> None:
    begin(guests, "silent")
    with guests.start("exec", "silent", "true") as waiting:
        until(lambda: "exec" in str(guests.json("top", "silent")), "it waits", LONG)
        assert guests.json("ps")[0]["status"]["state"] == "running"
        guests.ok("rm", "-f", "silent")
        assert waiting.wait(LONG) in (125, 137)
    begin(guests, "liar")
    result = guests.run("exec", "liar", "true")
    assert result.status == 125 and result.err.count("\n") == 1 and "\x1b" not in result.err, result
    guests.ok("stop", "-t", "1", "liar")


def test_programs_of_one_that_was_paused_wait_for_its_identity(guests: Cli) -> None:
    """Of an agent that takes four seconds for it: the program says nothing of that time. The control: it does if the
    agent did not hold it."""
    longest = {}
    for mode in ("slow", "unheld"):
        begin(guests, mode)
        until(lambda mode=mode: len(told(guests, mode)) > 5, "it tells the time", LONG)  # type: ignore[misc]
        guests.ok("pause", mode, timeout=LONG)
        before = told(guests, mode)
        guests.ok("unpause", mode, timeout=LONG)
        until(lambda mode=mode: status(guests, mode)["state"] == "running", "it is ready", LONG)  # type: ignore[misc]
        more = len(before) + 5
        until(lambda mode=mode, more=more: len(told(guests, mode)) > more, "it goes on", LONG)  # type: ignore[misc]
        after = told(guests, mode)[len(before) - 1 :]
        longest[mode] = max(later - earlier for earlier, later in pairwise(after))
        guests.ok("rm", "-f", mode)
    assert longest["slow"] > 4 > longest["unheld"], longest


def told(cli: Cli, name: str) -> list[float]:
    return [float(line) for line in cli.ok("logs", name).splitlines()]
