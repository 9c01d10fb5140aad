"""podman and docker run further programs in a container."""

from __future__ import annotations

import pytest

from tests.support.peers import IMAGE, Engine
from tests.support.wait import patiently, until

NAME = "room"


@pytest.fixture
def room(engine: Engine) -> Engine:
    """An engine with a container `room`."""
    engine.ok("run", "-d", "--name", NAME, "-e", "COLOUR=blue", IMAGE, "sleep", "1000")
    return engine


def test_output_and_exit_status(room: Engine) -> None:
    result = room.run("exec", NAME, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.status, result.out, result.err) == (7, "out\n", "err\n")


def test_input(room: Engine) -> None:
    assert room.ok("exec", "-i", NAME, "wc", "-c", stdin="x" * 200_000) == "200000"


def test_exec_is_in_the_container(room: Engine) -> None:
    assert room.ok("exec", NAME, "cat", "/proc/1/comm") == "sleep"
    assert room.ok("exec", NAME, "sh", "-c", "echo $COLOUR") == "blue"
    inside, outside = (room.ok("exec", NAME, "readlink", f"/proc/{pid}/ns/mnt") for pid in ("self", "1"))
    assert inside == outside


def test_options(room: Engine) -> None:
    script = "id -u; id -g; pwd; echo $COLOUR"
    options = ("-u", "1000:1000", "-w", "/tmp", "-e", "COLOUR=red")
    assert room.ok("exec", *options, NAME, "sh", "-c", script).split() == ["1000", "1000", "/tmp", "red"]


def test_the_container_s_limits_hold_inside(room: Engine) -> None:
    ours, its = (room.ok("exec", NAME, "cat", f"/proc/{pid}/cgroup") for pid in ("self", "1"))
    assert ours == its
    assert room.ok("exec", NAME, "grep", "-E", "CapBnd|Seccomp:", "/proc/self/status") == room.ok(
        "exec", NAME, "grep", "-E", "CapBnd|Seccomp:", "/proc/1/status"
    )


@pytest.mark.parametrize(("program", "status"), [("/nothing/there", 127), ("nothing-on-the-path", 127), ("/etc", 126)])
def test_a_program_that_cannot_run(room: Engine, program: str, status: int) -> None:
    result = room.run("exec", NAME, program)
    if room.name == "docker" and result.status == 126:
        status = 126  # docker 20.10 says so for all of them, with any runtime
    assert result.status == status, result
    assert program in result.out + result.err, result


def test_detached(room: Engine) -> None:
    room.ok("exec", "-d", NAME, "sh", "-c", "echo done > /tmp/mark; exec sleep 1000")
    until(lambda: room.run("exec", NAME, "cat", "/tmp/mark").out == "done\n", "the detached program has run")


def test_many_at_a_time(room: Engine) -> None:
    processes = [room.start("exec", NAME, "sh", "-c", f"sleep 0.2; exit {number}") for number in range(1, 6)]
    assert [process.wait(patiently(30)) for process in processes] == [1, 2, 3, 4, 5]
    for process in processes:
        process.communicate()


def test_in_a_stopped_container(room: Engine) -> None:
    room.ok("kill", NAME)
    room.ok("wait", NAME)
    assert room.run("exec", NAME, "true").status != 0


def test_an_exec_dies_with_its_container(room: Engine) -> None:
    process = room.start("exec", NAME, "sleep", "1000")
    until(lambda: room.ok("exec", NAME, "ps").count("sleep") == 2, "both sleep")
    room.ok("kill", NAME)
    assert process.wait(patiently(30)) == 137
    process.communicate()
