"""The cost of a container's output, memory and descriptors to the processes that serve all containers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from insula.container.service import relay
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.machine import Run
from tests.support.wait import until
from tests.system.escape.cell import IMAGE, PYTHON
from tests.system.escape.conftest import CellFactory
from tests.system.test_security import pid_of

_TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def favoured(run_: Run) -> Iterator[Daemon]:
    """An insulad with few descriptors, and an oom_score_adj that is not 0, as systemd may give it."""
    daemon = Daemon(run_)
    daemon.wrapper = ("sh", "-c", 'ulimit -Sn 64 && echo 300 > /proc/self/oom_score_adj && exec "$@"', "sh")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


def written(pid: int, what: str = "wchar") -> int:
    """Bytes that a process has caused to be written (proc_pid_io(5)), or to be read: "rchar"."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines[what])


def relayed(pid: int) -> int:
    """Bytes of output that went through the monitor: it reads each once, from the pipe or from the log (splice(2) from
    one into the other is not counted)."""
    return written(pid, "rchar")


def seconds(pid: int) -> float:
    """CPU time (fields 14 and 15 of proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def test_a_log_bomb_has_a_rate(cli: Cli, daemon: Daemon) -> None:
    """Output as fast as possible (`cat /dev/zero`): it is charged to no tenant, and fills the disk of all."""
    monitor = daemon.pid("monitor")
    assert monitor is not None
    before = relayed(monitor)

    def start() -> None:
        cli.ok("run", "-d", "--name", "bomb", "busybox", "cat", "/dev/zero")

    check_rate(cli, monitor, start, lambda: relayed(monitor) - before)


def check_rate(cli: Cli, monitor: int, start: Callable[[], None], spent: Callable[[], float]) -> None:
    """The output uses its whole burst, goes on, and never exceeds the credit that it has earned by then."""
    born = time.monotonic()
    start()

    def earned() -> float:
        return relay.BURST + relay.RATE * (time.monotonic() - born)

    until(lambda: spent() >= relay.BURST, "the control: it prints fast at first", timeout=30)
    until(lambda: spent() >= 0.9 * earned(), "the burst is spent", timeout=60)
    spent_before, cpu_before, began = spent(), seconds(monitor), time.monotonic()
    while time.monotonic() < began + 3:
        assert "here" in cli.ok("run", "--rm", "busybox", "echo", "here")
    cpu, total = seconds(monitor) - cpu_before, spent()
    assert total > spent_before, "it goes on"
    assert total < 1.1 * earned(), "slowly"
    assert cpu / (time.monotonic() - began) < 0.5, "without the rate it would be a whole processor"


PACKETS = "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT)\nwhile True: os.write(1, b'x')"


def test_packets_of_a_byte_have_a_rate(cells: CellFactory, cli: Cli, daemon: Daemon) -> None:
    """pipe2(2), O_DIRECT: each byte is a packet, so each is a read, a record and a write of the monitor."""
    monitor = daemon.pid("monitor")
    assert monitor is not None
    cells(cli)  # loads the image
    before = written(monitor)
    record = 13  # its head; what is moved from a pipe is not counted as written

    def start() -> None:
        cli.ok("run", "-d", "--name", "packets", IMAGE, PYTHON, "-I", "-S", "-c", PACKETS)

    check_rate(cli, monitor, start, lambda: (written(monitor) - before) / record * relay.LEAST)


def test_more_output_than_the_burst_arrives_whole(cli: Cli) -> None:
    """It is held up and nothing of it is lost. That less is not held up: tests/unit/test_relay.py."""
    size = relay.BURST + relay.RATE // 2
    assert len(cli.raw("run", "--rm", "busybox", "head", "-c", str(size), "/dev/zero").stdout) == size


def test_the_last_words_of_a_bomb_are_kept(cli: Cli) -> None:
    """Output that was in the pipe at its end is in the log, whatever it had printed before."""
    script = f"head -c {relay.BURST + relay.RATE} /dev/zero; echo last words"
    cli.ok("run", "-d", "--name", "bomb", "busybox", "sh", "-c", script)
    cli.ok("wait", "bomb")
    assert cli.ok("logs", "--tail", "1", "bomb").endswith("last words")


def test_the_oom_score_of_insulad_is_not_inherited(favoured: Daemon) -> None:
    """A unit with OOMScoreAdjust=-500 keeps insulad alive; an instance with that score would outlive its victims."""
    cli = favoured.cli
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    monitor = favoured.pid("monitor")
    assert Path(f"/proc/{monitor}/oom_score_adj").read_text() == "300\n", "the control"
    assert Path(f"/proc/{pid_of(cli, 'web')}/oom_score_adj").read_text() == "0\n"
    assert cli.ok("exec", "web", "cat", "/proc/self/oom_score_adj") == "0"


def test_descriptors_are_limited(favoured: Daemon) -> None:
    """Each instance takes some in the monitor and the zygote: the soft limit is for programs that use select(2)."""
    for name in ("insulad", "monitor", "zygote"):
        limits = Path(f"/proc/{favoured.pid(name)}/limits").read_text().splitlines()
        [words] = [line.split() for line in limits if line.startswith("Max open files")]
        assert words[3] == words[4] and int(words[3]) > 64, name
