"""A machine that stood still: no program of it runs before it has the time again, and one that does not answer delays
nobody."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until

LONG = 300.0
TELL = "while :; do date +%s; usleep 20000; done"
"""A program that prints the time that it believes in."""
STOOD = 6.0


def status(cli: Cli) -> dict[str, Any]:
    return next(dict(view["status"]) for view in cli.json("ps", "-a") if view["instance"]["name"] == "vm")


def qemu(cli: Cli) -> int:
    shim = status(cli)["pid"]
    return int(Path(f"/proc/{shim}/task/{shim}/children").read_text().split()[0])


def behind(cli: Cli) -> list[float]:
    """For each line of its log by how many seconds the guest's time was behind the host's when it came."""
    found = []
    for line in cli.ok("logs", "-t", "vm").splitlines():
        stamp, told = line.split(" ")
        found.append(datetime.fromisoformat(stamp).timestamp() - int(told))
    return found


def test_programs_go_on_when_the_machine_has_the_time(cli: Cli, daemon: Daemon) -> None:
    """What a program prints after a pause is the time of then, also if insulad is killed meanwhile."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", "-c", TELL, timeout=LONG)
    until(lambda: len(behind(cli)) > 5, "it tells the time", LONG)
    for kill in (False, True):
        cli.ok("pause", "vm", timeout=LONG)
        told = len(behind(cli))
        time.sleep(STOOD)
        if kill:
            daemon.kill("insulad")
            daemon.start()
            assert status(cli)["state"] == "paused"
        assert len(behind(cli)) == told
        cli.ok("unpause", "vm", timeout=LONG)
        assert status(cli)["state"] == "running"
        until(lambda told=told: len(behind(cli)) > told + 20, "it goes on", LONG)  # type: ignore[misc]
        assert max(behind(cli)[told + 1 :]) < STOOD - 2, "the first line may have been under way"
    cli.ok("rm", "-f", "vm")


def test_one_whose_emulator_does_not_answer_delays_nobody(cli: Cli) -> None:
    """It is stopped: lists, statistics and other instances do not wait for it. That is shown as long as it lasts, it
    is not ended for it, and it can be ended at any time."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "1000", timeout=LONG)
    cli.ok("exec", "vm", "true")
    pid = status(cli)["pid"]
    os.kill(qemu(cli), signal.SIGSTOP)
    with cli.start("exec", "vm", "true") as waiting:
        assert cli.ok("run", "--rm", "busybox", "echo", "well") == "well"
        for words in (("ps", "-a"), ("stats", "--no-stream"), ("explain", "vm"), ("top", "vm"), ("inspect", "vm")):
            assert cli.json(*words), words
        assert status(cli)["pid"] == pid and status(cli)["state"] == "running"
        assert waiting.poll() is None, "the control: who needs the guest waits"
        until(lambda: "running (unresponsive)" in cli.ok("ps"), "it is shown", LONG)
        os.kill(qemu(cli), signal.SIGCONT)
        until(lambda: "unresponsive" not in cli.ok("ps"), "it answers again", LONG)
        assert waiting.wait(LONG) == 0
    os.kill(qemu(cli), signal.SIGSTOP)
    with cli.start("exec", "vm", "true") as waiting:
        cli.ok("pause", "vm", timeout=LONG)
        with cli.start("unpause", "vm") as unpausing:  # it waits for the guest, too
            until(lambda: status(cli)["state"] == "starting", "it is thawed", LONG)
            assert status(cli)["pid"] == pid
            cli.ok("rm", "-f", "vm")
            unpausing.wait(LONG)
        assert waiting.wait(LONG) in (125, 137)
