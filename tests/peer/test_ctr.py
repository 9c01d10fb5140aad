"""containerd's `ctr` drives the runtime through io.containerd.runc.v2, with the config that containerd writes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.peer.conftest import Bench
from tests.support.cli import Result, Terminal
from tests.support.peers import Containerd
from tests.support.wait import until

NAME = "box"


class Box:
    """ctr, and containers over the directory with busybox."""

    def __init__(self, ctr: Containerd, bench: Bench) -> None:
        self.ctr = ctr
        self._root = (*ctr.options, f"--cgroup=/{ctr.parent}/{NAME}", "--env=PATH=/bin", "--rootfs")
        self._after = (str(bench.rootfs), NAME)

    def run(self, *command: str, options: tuple[str, ...] = ()) -> Result:
        return self.ctr.run("run", "--rm", *options, *self._root, *self._after, *command)

    def start(self, *command: str, options: tuple[str, ...] = ()) -> None:
        self.ctr.ok("run", "-d", *options, *self._root, *self._after, *command)

    def terminal(self, *command: str, rows: int, columns: int) -> Terminal:
        arguments = ("run", "--rm", "-t", *self._root, *self._after, *command)
        return self.ctr.terminal(*arguments, rows=rows, columns=columns)

    def exec(self, *command: str, options: tuple[str, ...] = ()) -> Result:
        return self.ctr.run("task", "exec", "--exec-id=second", *options, NAME, *command)

    def status(self) -> str:
        rows = {row.split()[0]: row.split()[2] for row in self.ctr.ok("task", "ls").splitlines()[1:]}
        return rows[NAME]


@pytest.fixture
def box(ctr: Containerd, bench: Bench) -> Box:
    return Box(ctr, bench)


def test_run_gives_output_and_exit_status(box: Box) -> None:
    result = box.run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.status, result.out) == (7, "out\n")
    assert result.err.startswith("err\n")


def test_a_missing_program(box: Box) -> None:
    result = box.run("/nothing/there")
    assert result.status == 1
    assert "/nothing/there" in result.err
    assert "no such file" in result.err.lower()


def test_a_terminal(box: Box) -> None:
    with box.terminal("sh", rows=33, columns=101) as terminal:
        terminal.expect("# ")
        terminal.type("until stty size 2>/dev/null | grep .; do sleep 0.05; done; tty\n")
        terminal.expect("33 101")
        terminal.expect("/dev/")
        terminal.type("exit 5\n")
        assert terminal.wait() == 5


def test_exec(box: Box) -> None:
    """ctr on a busy machine shows no output of one in two hundred processes that end at once, with runc too."""
    box.start("sleep", "1000")
    results: list[Result] = []

    def has_output() -> bool:
        results.append(box.exec("sh", "-c", "cat /proc/1/comm; exit 6"))
        return results[-1].out != ""

    until(has_output, "ctr shows the output")
    assert results[-1].out == "sleep\n"
    assert {result.status for result in results} == {6}


def test_exec_in_a_terminal(box: Box) -> None:
    box.start("sleep", "1000")
    command = ("task", "exec", "--exec-id=second", "-t", NAME, "sh", "-c", "tty; sleep 0.5; exit 6")
    with box.ctr.terminal(*command) as terminal:
        terminal.expect("/dev/")
        assert terminal.wait() == 6


def test_exec_of_a_missing_program(box: Box) -> None:
    box.start("sleep", "1000")
    result = box.exec("/nothing/there")
    assert result.status == 1
    assert "/nothing/there" in result.err


def test_kill(box: Box) -> None:
    box.start("sh", "-c", "trap '' TERM; while :; do sleep 0.05; done")
    assert box.status() == "RUNNING"
    box.ctr.ok("task", "kill", "--signal", "SIGKILL", NAME)
    until(lambda: box.status() == "STOPPED", "it is stopped")
    result = box.ctr.run("task", "rm", NAME)
    assert (result.status, result.err) == (128 + signal.SIGKILL, "") or result.status == 0, result
    box.ctr.ok("container", "rm", NAME)


def test_kill_all(box: Box) -> None:
    box.start("sh", "-c", "sleep 1000 & sleep 1000 & wait")
    box.ctr.ok("task", "kill", "--all", "--signal", "SIGKILL", NAME)
    until(lambda: box.status() == "STOPPED", "it is stopped")


def test_pause_and_resume(box: Box) -> None:
    box.start("sleep", "1000")
    box.ctr.ok("task", "pause", NAME)
    assert box.status() == "PAUSED"
    box.ctr.ok("task", "resume", NAME)
    assert box.status() == "RUNNING"


def test_processes_and_metrics(box: Box) -> None:
    box.start("sh", "-c", "sleep 1000 & wait")
    until(lambda: len(box.ctr.ok("task", "ps", NAME).splitlines()) == 3, "a line for each process")
    assert "memory" in box.ctr.ok("task", "metrics", NAME)


def test_restricted(box: Box) -> None:
    options = ("--read-only", "--cap-drop=CAP_CHOWN", "--memory-limit=50331648", "--seccomp")
    script = "echo x > /file; chown 7 /dev/shm; grep Seccomp: /proc/self/status"
    result = box.run("sh", "-c", script, options=options)
    assert "Read-only file system" in result.err
    assert "Operation not permitted" in result.err
    assert result.out.split() == ["Seccomp:", "2"]


def test_mounts(box: Box, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("outside\n")
    mount = f"--mount=type=bind,src={tmp_path},dst=/tmp,options=rbind:ro"
    result = box.run("sh", "-c", "cat /tmp/file; echo x > /tmp/file", options=(mount,))
    assert result.out == "outside\n"
    assert "Read-only file system" in result.err


def test_a_namespace_by_its_path(box: Box) -> None:
    path = f"/proc/{box.ctr.host.pid}/ns/net"
    result = box.run("readlink", "/proc/self/ns/net", options=(f"--with-ns=network:{path}",))
    assert result.out.strip() == str(Path(path).readlink())
