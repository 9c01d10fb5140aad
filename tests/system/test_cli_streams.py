"""run, exec, logs, attach and wait: output, input and exit statuses arrive as from a process on this host."""

from __future__ import annotations

import hashlib
import os
import signal

import pytest

from tests.support.cli import Cli
from tests.support.wait import patiently, until


def test_run_prints_the_output(cli: Cli) -> None:
    result = cli.run("run", "--rm", "busybox", "echo", "hi")
    assert (result.status, result.out, result.err) == (0, "hi\n", "")


def test_streams_stay_apart(cli: Cli) -> None:
    result = cli.run("run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.status, result.out, result.err) == (3, "out\n", "err\n")


@pytest.mark.parametrize("status", [0, 1, 2, 42, 125, 126, 127, 255])
def test_exit_statuses(cli: Cli, status: int) -> None:
    assert cli.run("run", "--rm", "busybox", "sh", "-c", f"exit {status}").status == status


def test_death_by_signal(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "victim", "busybox", "sleep", "600")
    cli.ok("kill", "victim")
    assert cli.ok("wait", "victim") == "137"
    [view] = cli.json("inspect", "victim")
    assert view["status"]["exit"]["signal"] == signal.SIGKILL


def test_a_missing_program(cli: Cli) -> None:
    assert "no-such" in cli.fails("run", "--rm", "busybox", "no-such", status=127)
    assert "/etc" in cli.fails("run", "--rm", "busybox", "/etc", status=126)
    assert cli.json("ps", "-a") == []


def test_input(cli: Cli) -> None:
    assert cli.run("run", "--rm", "-i", "busybox", "cat", stdin="typed\n").ok() == "typed\n"
    assert cli.run("run", "--rm", "busybox", "cat", stdin="not typed\n").ok() == ""


def test_megabytes_pass_unchanged_both_ways(cli: Cli) -> None:
    data = os.urandom(8 << 20)
    done = cli.raw("run", "--rm", "-i", "busybox", "sh", "-c", "tee /dev/stderr", stdin=data)
    assert done.returncode == 0
    expected = hashlib.sha256(data).digest()
    assert hashlib.sha256(done.stdout).digest() == expected
    assert hashlib.sha256(done.stderr).digest() == expected


def test_a_signal_to_the_command_line_is_passed_on(cli: Cli) -> None:
    script = "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    with cli.start("run", "--rm", "busybox", "sh", "-c", script) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        client.terminate()
        assert client.stdout.readline() == "got it\n"
        assert client.wait(patiently(10)) == 9


# -- exec --------------------------------------------------------------------------------------------------------


@pytest.fixture
def web(cli: Cli) -> Cli:
    """With an instance `web` that only sleeps."""
    cli.ok("run", "-d", "--name", "web", "--env", "FROM_RUN=1", "busybox", "sleep", "600")
    return cli


def test_exec(web: Cli) -> None:
    result = web.run("exec", "web", "sh", "-c", "echo $FROM_RUN; hostname; echo err >&2; exit 5")
    assert (result.status, result.out, result.err) == (5, "1\nweb\n", "err\n")
    assert web.run("exec", "-i", "web", "cat", stdin="typed").ok() == "typed"
    assert "no-such" in web.fails("exec", "web", "no-such", status=127)
    assert web.run("exec", "web", "sh", "-c", "kill -TERM $$").status == 143


def test_exec_joins_the_instance(web: Cli) -> None:
    web.ok("exec", "web", "sh", "-c", "echo here > /tmp/file")
    assert web.ok("exec", "web", "cat", "/tmp/file") == "here"
    for kind in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts"):
        first, second = (web.ok("exec", "web", "readlink", f"/proc/{pid}/ns/{kind}") for pid in ("1", "self"))
        assert first == second


def test_exec_with_options(web: Cli) -> None:
    options = ("-e", "A=b c", "-w", "/tmp", "-u", "1000:1001")
    out = web.ok("exec", *options, "web", "sh", "-c", "echo $A; pwd; id -u; id -g")
    assert out.splitlines() == ["b c", "/tmp", "1000", "1001"]


def test_exec_ends_with_its_instance(web: Cli) -> None:
    with web.start("exec", "web", "sleep", "600") as client:
        until(lambda: len(web.json("top", "web")) == 2, "the second process runs")
        web.ok("kill", "web")
        assert client.wait(patiently(10)) == 137


# -- logs --------------------------------------------------------------------------------------------------------


def test_logs_keep_both_streams(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "talker", "busybox", "sh", "-c", "echo one; echo two >&2; echo three; exit 4")
    assert cli.ok("wait", "talker") == "4"
    result = cli.run("logs", "talker")
    assert result.out.splitlines() == ["one", "three"]
    assert result.err.splitlines() == ["two"]


def test_logs_tail(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "talker", "busybox", "seq", "1", "9")
    cli.ok("wait", "talker")
    assert cli.ok("logs", "--tail", "2", "talker").split() == ["8", "9"]


def test_logs_follow_until_the_end(cli: Cli) -> None:
    script = "for i in 1 2 3 4 5; do echo $i; sleep 0.1; done"
    cli.ok("run", "-d", "--name", "counter", "busybox", "sh", "-c", script)
    assert cli.ok("logs", "-f", "counter").split() == ["1", "2", "3", "4", "5"]


def test_logs_since(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "late", "busybox", "sh", "-c", "echo early; sleep 1.5; echo late")
    cli.ok("wait", "late")
    assert cli.ok("logs", "--since", "1s", "late") in ("late", "")
    assert cli.ok("logs", "--since", "1h", "late").split() == ["early", "late"]


def test_logs_rotate_and_keep_the_end(cli: Cli) -> None:
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
    options = ("--log-size", "64k", "--log-files", "2")
    cli.ok("run", "-d", "--name", "chatty", *options, "busybox", "sh", "-c", script)
    cli.ok("wait", "chatty")
    lines = cli.ok("logs", "chatty").splitlines()[1:]  # the first may have lost its beginning
    first = int(lines[0].split()[1])
    assert first > 0, "old lines were dropped"
    assert lines == [f"line {number}" for number in range(first, 20000)]


# -- attach and wait ---------------------------------------------------------------------------------------------


def test_attach_shows_output_and_the_exit_status(cli: Cli) -> None:
    script = "while [ ! -e /go ]; do echo before; sleep 0.05; done; echo after; exit 6"
    cli.ok("run", "-d", "--name", "slow", "busybox", "sh", "-c", script)
    with cli.start("attach", "slow") as client:
        assert client.stdout and client.stdout.readline() == "before\n", "it is attached"
        cli.run("exec", "slow", "touch", "/go")  # PID 1 may take it along when it ends
        out, _ = client.communicate(timeout=patiently(10))
    assert client.returncode == 6 and out.replace("before\n", "") == "after\n"


def test_attach_sends_input(cli: Cli) -> None:
    cli.ok("run", "-d", "-i", "--name", "reader", "busybox", "sh", "-c", "read line; echo got $line")
    result = cli.run("attach", "reader", stdin="hello\n")
    assert result.ok() == "got hello\n"


def test_wait_for_several(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "a", "busybox", "sh", "-c", "sleep 0.2; exit 1")
    cli.ok("run", "-d", "--name", "b", "busybox", "sh", "-c", "exit 2")
    assert cli.ok("wait", "a", "b").split() == ["1", "2"]


def test_stop_sends_the_stop_signal_then_sigkill(cli: Cli) -> None:
    polite = "trap 'exit 11' TERM; echo ready; while :; do sleep 0.05; done"
    special, stubborn = polite.replace("TERM", "USR1"), polite.replace("exit 11", "")
    cli.ok("run", "-d", "--name", "polite", "busybox", "sh", "-c", polite)
    cli.ok("run", "-d", "--name", "stubborn", "busybox", "sh", "-c", stubborn)
    cli.ok("run", "-d", "--name", "special", "--stop-signal", "USR1", "busybox", "sh", "-c", special)
    for name in ("polite", "stubborn", "special"):
        until(lambda name=name: cli.ok("logs", name) == "ready", "its handler is set")  # type: ignore[misc]
    cli.ok("stop", "--timeout", "600", "polite", "special")
    cli.ok("stop", "--timeout", "0.5", "stubborn")
    assert cli.ok("wait", "polite", "special", "stubborn").split() == ["11", "11", "137"]


def test_stopped_instances_start_again_with_their_files(cli: Cli) -> None:
    script = "echo run >> /count; cat /count; sleep 600"
    cli.ok("run", "-d", "--name", "again", "busybox", "sh", "-c", script)
    until(lambda: cli.ok("logs", "again") == "run", "the first run has written")
    address = cli.ok("exec", "again", "hostname", "-i")
    cli.ok("stop", "--timeout", "0.1", "again")
    assert [view["status"]["state"] for view in cli.json("ps", "-a")] == ["exited"]
    cli.ok("start", "again")
    until(lambda: cli.ok("logs", "again").split() == ["run", "run", "run"], "the second run sees the first one's file")
    assert cli.ok("exec", "again", "hostname", "-i") == address
