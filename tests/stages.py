"""The command of `scripts/test all`: runs all suites side by side; prints failures and times at the end.

    python -m tests.stages [pytest's options…]

The stages of a lane run one after the other, the lanes side by side, so that two cores are busy: the suites share
nothing but names that begin with a prefix of each run (tests/support/machine.py), and no test depends on speed. Each
line that a stage prints begins with its name. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.guest import LOCKUP

CHECKOUT = Path(__file__).parents[1]
LIMIT = 70 * 60
"""Seconds after which what still runs is killed, so that a run that hangs ends with a report."""

NOTHING_SELECTED = 5
"""pytest's exit status where its options select no test: no failure."""

_FAILURE = re.compile(r"(FAILED|ERROR) \S+")
_RESULT = re.compile(r"(?:=+ )?(\d+ .*) in [\d.]+s\b.*")


@dataclass
class Stage:
    """A program that runs by itself. `without` is said if it fails and that is no failure of the whole run. If it has
    said `again` and fails, it is run once more."""

    name: str
    command: list[str]
    without: str = ""
    again: str = ""
    status: int | None = None
    wall: float = 0.0
    processor: float = 0.0
    result: str = ""
    failures: list[str] = field(default_factory=list)
    _pid: int = 0
    _said_again: bool = False

    @property
    def failed(self) -> bool:
        return self.status not in (0, NOTHING_SELECTED) and not self.without

    @property
    def running(self) -> bool:
        return self._pid != 0

    def run(self) -> None:
        self._run()
        if self._said_again and (self.status or 0) > 0:
            _say(self.name, f"==> once more: {self.again}")
            self.failures, self.result = [], ""
            self._run()
            self.result += f", after one of {self.again}"

    def _run(self) -> None:
        begun = time.monotonic()
        _say(self.name, f"==> {' '.join(self.command)}")
        process = subprocess.Popen(
            self.command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._pid = process.pid
        reader = threading.Thread(target=self._read, args=[process], daemon=True)
        reader.start()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self._pid = 0  # before another process can have it
        _, status, usage = os.wait4(process.pid, 0)  # of all its descendants that were waited for
        self.status = process.returncode = os.waitstatus_to_exitcode(status)
        self.wall += time.monotonic() - begun
        self.processor += usage.ru_utime + usage.ru_stime
        reader.join(5)  # what a test has left running may hold the pipe open
        if self.status and self.without:
            _say(self.name, self.without)
        elif self.failed and not self.failures:
            self.failures = [f"FAILED {self.name}: exit status {self.status}"]

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            _say(self.name, line)
            self._said_again |= bool(self.again) and self.again in line
            if _FAILURE.match(line):
                self.failures.append(line)
            elif match := _RESULT.fullmatch(line):
                self.result = match[1]

    def kill(self) -> None:
        """If it runs. It reports how it ended."""
        if self.running:
            os.kill(self._pid, signal.SIGKILL)


def pytest(suite: str, options: list[str], again: str = "") -> Stage:
    """The suite below a directory; the stage has the name of the last one."""
    command = [sys.executable, "-m", "pytest", f"tests/{suite}", *options]
    return Stage(Path(suite).name, command, again=again)


def lanes(options: list[str]) -> list[list[Stage]]:
    """Their stages. The machine of tests/modern is made from packages of the network, the peers are fetched."""
    guest = Stage(
        "guest", ["scripts/guest"], "tests/modern will be skipped: there is no virtual machine to run them in"
    )
    peers = Stage("peers", ["scripts/peers"], "tests/peer will be skipped: there is nobody to try insula-oci with")
    provider = Stage(
        "provider", ["scripts/provider"], "test_oidc.py will be skipped: there is no provider to log in at"
    )
    return [
        [pytest("system", ["--ignore=tests/system/tenancy", *options])],
        [guest, pytest("modern", options, again=LOCKUP)],
        [pytest("unit", options), peers, pytest("peer", options), provider, pytest("system/tenancy", options)],
    ]


def report(stages: list[Stage], wall: float) -> str:
    """Every failure once more, and a table: seconds that passed, seconds of processors, pytest's counts."""
    lines = [f"{stage.name:8} {stage.wall:6.0f} {stage.processor:9.0f}  {stage.result}" for stage in stages]
    total = f"{'in all':8} {wall:6.0f} {sum(stage.processor for stage in stages):9.0f}"
    failures = [failure for stage in stages for failure in stage.failures]
    return "\n".join([f"{'stage':8} {'wall s':>6} {'cpu s':>9}", *lines, total, *failures])


def main(options: list[str]) -> int:
    begun = time.monotonic()
    plan = lanes(options)
    stages = [stage for lane in plan for stage in lane]
    if len(os.sched_getaffinity(0)) == 1:
        plan = [stages]
    expired = threading.Event()

    def go(lane: list[Stage]) -> None:
        for stage in lane:
            if not expired.is_set():
                stage.run()

    def expire() -> None:
        expired.set()
        for stage in stages:
            stage.kill()

    timer = threading.Timer(LIMIT, expire)
    timer.daemon = True
    timer.start()
    threads = [threading.Thread(target=go, args=[lane]) for lane in plan]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # a signal: what runs must not go on without us
        expire()
        raise
    print(report(stages, time.monotonic() - begun), flush=True)
    return int(any(stage.failed or stage.status is None for stage in stages))


_printing = threading.Lock()


def _say(name: str, line: str) -> None:
    with _printing:
        print(f"{name:6} | {line}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
