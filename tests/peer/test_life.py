"""podman and docker take containers through their lives: run, stop, kill, pause, restart, remove."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.peers import IMAGE, Engine
from tests.support.wait import until

NAME = "life"


def detached(engine: Engine, script: str, *options: str) -> None:
    """A container `life` that runs a shell script."""
    engine.ok("run", "-d", "--name", NAME, *options, IMAGE, "sh", "-c", script)


def state(engine: Engine, field: str = "Status") -> str:
    return engine.ok("inspect", "--format", f"{{{{.State.{field}}}}}", NAME)


def test_run_gives_output_and_exit_status(engine: Engine) -> None:
    result = engine.run("run", "--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.status, result.out, result.err) == (7, "out\n", "err\n")


def test_input_reaches_the_program(engine: Engine) -> None:
    assert engine.run("run", "--rm", "-i", IMAGE, "wc", "-c", stdin="x" * 200_000).out == "200000\n"


def test_detached_logs_wait_and_remove(engine: Engine) -> None:
    detached(engine, "echo one; echo two >&2; exit 3")
    assert engine.ok("wait", NAME) == "3"
    result = engine.run("logs", NAME)
    assert (result.out, result.err) == ("one\n", "two\n")
    assert state(engine, "ExitCode") == "3"
    engine.ok("rm", NAME)
    assert NAME not in engine.ok("ps", "-a")


@pytest.mark.parametrize(("program", "status"), [("/nothing/there", 127), ("nothing-on-the-path", 127), ("/etc", 126)])
def test_a_program_that_cannot_run(engine: Engine, program: str, status: int) -> None:
    result = engine.run("run", "--rm", IMAGE, program)
    assert result.status == status, result
    assert program in result.err, result


def test_a_program_of_an_unknown_format(engine: Engine, tmp_path: Path, runtime: str) -> None:
    """Only execve(2) can tell, so it is `start` that fails."""
    if runtime == "runc":
        pytest.skip("runc does not tell its caller")
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF is not enough")
    program.chmod(0o755)
    result = engine.run("run", "--rm", f"-v={program}:/program", IMAGE, "/program")
    assert result.status == (126 if engine.name == "podman" else 125), result
    assert "exec format error" in result.err, result


def test_a_created_container_waits_for_start(engine: Engine) -> None:
    engine.ok("create", "--name", NAME, IMAGE, "sh", "-c", "echo ran")
    assert state(engine) == "created"
    assert engine.ok("start", "-a", NAME) == "ran"


def test_stop_lets_the_program_end(engine: Engine) -> None:
    detached(engine, "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    until(lambda: "ready" in engine.ok("logs", NAME), "the trap is set")
    engine.ok("stop", "-t", "20", NAME)
    assert state(engine, "ExitCode") == "5"
    assert engine.ok("logs", NAME) == "ready\nbye"


def test_stop_kills_a_program_that_ignores_the_signal(engine: Engine) -> None:
    detached(engine, "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    until(lambda: "ready" in engine.ok("logs", NAME), "the trap is set")
    engine.ok("stop", "-t", "1", NAME)
    assert state(engine, "ExitCode") == str(128 + signal.SIGKILL)


def test_kill_with_a_signal(engine: Engine) -> None:
    detached(engine, "trap 'exit 9' USR1; echo ready; while :; do sleep 0.05; done")
    until(lambda: "ready" in engine.ok("logs", NAME), "the trap is set")
    engine.ok("kill", "-s", "USR1", NAME)
    assert engine.ok("wait", NAME) == "9"


def test_kill(engine: Engine) -> None:
    detached(engine, "sleep 1000")
    engine.ok("kill", NAME)
    assert engine.ok("wait", NAME) == str(128 + signal.SIGKILL)


def test_pause_stops_the_processes(engine: Engine) -> None:
    detached(engine, "while :; do echo tick; sleep 0.05; done")
    until(lambda: "tick" in engine.ok("logs", NAME), "it ticks")
    engine.ok("pause", NAME)
    assert state(engine) == "paused"

    def counted() -> int:
        return engine.ok("logs", NAME).count("tick")

    until(lambda: counted() == counted(), "what was on its way is logged")
    ticks = counted()
    assert counted() == ticks
    engine.ok("unpause", NAME)
    assert state(engine) == "running"
    until(lambda: engine.ok("logs", NAME).count("tick") > ticks, "it ticks again")


def test_restart(engine: Engine) -> None:
    detached(engine, "echo begun; exec sleep 1000")
    until(lambda: engine.ok("logs", NAME) == "begun", "it runs")
    first = state(engine, "Pid")
    engine.ok("restart", "-t", "0", NAME)
    assert state(engine) == "running"
    assert state(engine, "Pid") != first
    until(lambda: engine.ok("logs", NAME) == "begun\nbegun", "it runs again")


def test_remove_by_force(engine: Engine) -> None:
    detached(engine, "sleep 1000 & sleep 1000 & wait", "--stop-timeout=0")
    engine.ok("rm", "-f", NAME)
    assert engine.run("inspect", NAME).status != 0


def test_a_child_does_not_outlive_the_container(engine: Engine) -> None:
    """With the first process of a PID namespace all others go."""
    result = engine.run("run", "--rm", IMAGE, "sh", "-c", "sleep 1000 & echo started")
    assert (result.status, result.out) == (0, "started\n")
