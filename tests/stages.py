"""The command of `scripts/test all`: runs all suites and the linters side by side; prints failures and times.

    python -m tests.stages [pytest's options…]

The stages of a chain run one after the other. `LANES` chains run side by side, so that two cores are busy; a lane that
has ended its chain takes the next, so that all lanes end at about the same time. The suites share nothing but names
that begin with a prefix of each run (tests/support/machine.py), and no test depends on speed. Each line that a stage
prints begins with its name.

A few tests that failed are run once more at the end, when nothing runs beside them. One that passes then is no failure
of the run, but a defect all the same, of the test or of Insula under load: the report names it. The exit status is 1 if
a stage failed and the second run did not take that back.
"""

from __future__ import annotations

import os
import queue
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
LIMIT = 80 * 60
"""Seconds after which what still runs is killed, so that a run that hangs ends with a report."""

LANES = 4
"""More than cores: tests wait for events more often than for a core."""

NETWORKS = ("network_*", "test_guarantees*.py")
FABRIC = ("fabric", "hostile", "test_network_*.py")
RUNTIME = (
    "oci",
    "escape",
    "test_cgroup*.py",
    "test_exec_process*.py",
    "test_image_*.py",
    "test_runtime.py",
    "test_seccomp*.py",
)
MACHINES = {
    "machine": "machine/test_[hm]*.py",
    "machine2": "machine/test_[n-z]*.py",
    "machine3": "machine/test_[a-gi-l]*.py",
}
"""Parts of tests/system that are stages of their own, by name; so are `tenancy` and `instances`. All others are the
stage `system`. Tests of machines wait for deadlines most of the time, so they are three stages."""

RUN_ALONE = 6
"""Failed tests that are run once more. If more failed, that is no accident, and none is."""

TESTS_FAILED = 1
NOTHING_SELECTED = 5
"""pytest's exit statuses. That its options select no test is no failure."""

_FAILURE = re.compile(r"(FAILED|ERROR) \S+")
_FAILED_TEST = re.compile(r"(?:FAILED|ERROR) (\S+\.py::.+?)(?: - .*)?")
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


def pytest(name: str, paths: list[str], options: list[str], again: str = "") -> Stage:
    return Stage(name, [sys.executable, "-m", "pytest", *paths, *options], again=again)


def part(*patterns: str) -> list[str]:
    """The paths in tests/system with these names."""
    found = [path for pattern in patterns for path in sorted((CHECKOUT / "tests/system").glob(pattern))]
    return [str(path.relative_to(CHECKOUT)) for path in found]


def chains(options: list[str]) -> list[list[Stage]]:
    """All stages; the chains that take longest first, or a lane would be alone at the end.

    The machine of tests/modern is made from packages of the network; the peers and the provider are fetched.
    """
    guest = Stage(
        "guest", ["scripts/guest"], "tests/modern will be skipped: there is no virtual machine to run them in"
    )
    peers = Stage("peers", ["scripts/peers"], "tests/peer will be skipped: there is nobody to try insula-oci with")
    provider = Stage(
        "provider", ["scripts/provider"], "test_oidc.py will be skipped: there is no provider to log in at"
    )
    lint = Stage("lint", ["scripts/test", "lint"])
    kernel = Stage("kernel", ["scripts/kernel"], "tests/system/machine will be skipped: there is no kernel for guests")
    systems = Stage(
        "systems",
        ["sh", "-c", "scripts/systems && scripts/guest-agent"],
        "some of tests/system/machine will be skipped: their guests are not there",
    )
    networks, fabric, runtime = part(*NETWORKS), part(*FABRIC), part(*RUNTIME)
    tenancy, instances = part("tenancy"), part("instances")
    machine = {name: part(pattern) for name, pattern in MACHINES.items()}
    named = [*networks, *fabric, *runtime, *tenancy, *instances]
    for paths in machine.values():
        named += paths
    machines = [pytest(name, paths, options) for name, paths in machine.items()]
    others = ["tests/system", *(f"--ignore={path}" for path in named)]
    return [
        [kernel, systems, machines[0]],
        [guest, pytest("modern", ["tests/modern"], options, again=LOCKUP)],
        [pytest("system", others, options)],
        [pytest("network", networks, options)],
        [pytest("fabric", fabric, options)],
        [pytest("runtime", runtime, options)],
        [provider, pytest("tenancy", tenancy, options)],
        *([each] for each in machines[1:]),  # what they need has been fetched by then
        [pytest("instances", instances, options)],
        [pytest("unit", ["tests/unit"], options)],
        [lint],
        [peers, pytest("peer", ["tests/peer"], options)],
    ]


def alone(stages: list[Stage], options: list[str]) -> Stage | None:
    """The failed tests of `stages` as a stage of their own. None if nothing failed, if too much did, or if something
    failed that is no single test: a linter, a file that can't be imported, a stage that was killed."""
    failed = [stage for stage in stages if stage.failed or stage.status is None]
    matches = [_FAILED_TEST.fullmatch(failure) for stage in failed for failure in stage.failures]
    tests = list(dict.fromkeys(match[1] for match in matches if match))
    whole = all(stage.status == TESTS_FAILED for stage in failed) and all(matches)
    return pytest("alone", tests, options) if whole and 0 < len(tests) <= RUN_ALONE else None


def report(stages: list[Stage], wall: float) -> str:
    """Every failure once more, and a table: seconds that passed, seconds of processors, pytest's counts."""
    lines = [f"{stage.name:8} {stage.wall:6.0f} {stage.processor:9.0f}  {stage.result}" for stage in stages]
    total = f"{'in all':8} {wall:6.0f} {sum(stage.processor for stage in stages):9.0f}"
    failures = [failure for stage in stages for failure in stage.failures]
    return "\n".join([f"{'stage':8} {'wall s':>6} {'cpu s':>9}", *lines, total, *failures])


def main(options: list[str]) -> int:
    begun = time.monotonic()
    plan = chains(options)
    stages = [stage for chain in plan for stage in chain]
    waiting: queue.SimpleQueue[list[Stage]] = queue.SimpleQueue()
    for chain in plan:
        waiting.put(chain)
    expired = threading.Event()

    def lane() -> None:
        while not expired.is_set():
            try:
                chain = waiting.get_nowait()
            except queue.Empty:
                return
            for stage in chain:
                if not expired.is_set():
                    stage.run()

    def expire() -> None:
        expired.set()
        for stage in stages:
            stage.kill()

    timer = threading.Timer(LIMIT, expire)
    timer.daemon = True
    timer.start()
    lanes = LANES if len(os.sched_getaffinity(0)) > 1 else 1
    threads = [threading.Thread(target=lane) for _ in range(lanes)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # a signal: what runs must not go on without us
        expire()
        raise
    again = None if expired.is_set() else alone(stages, options)
    if again:
        stages.append(again)
        again.run()
    print(report(stages, time.monotonic() - begun), flush=True)
    if again and again.status == 0:
        print("what FAILED above has passed alone: a defect, but no failure of this run", flush=True)
        return 0
    return int(any(stage.failed or stage.status is None for stage in stages))


_printing = threading.Lock()


def _say(name: str, line: str) -> None:
    with _printing:
        print(f"{name:6} | {line}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
