"""`logs` and attach: over restarts, on terminals, and with any bytes."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import cgroups
from tests.support.cli import Cli
from tests.support.wait import patiently, until


def followed(process: subprocess.Popen[str]) -> str:
    """The output of `logs -f`, once it has ended by itself."""
    out, err = process.communicate(timeout=patiently(30))
    assert (process.returncode, err) == (0, "")
    return out


def test_follow_goes_on_over_restarts_by_policy_and_then_ends(cli: Cli) -> None:
    script = "echo run; sleep 0.3; exit 3"
    cli.ok("run", "-d", "--name", "again", "--restart", "on-failure:2", "busybox", "sh", "-c", script)
    assert followed(cli.start("logs", "-f", "again")) == "run\n" * 3
    assert "exited (3)" in cli.ok("ps", "-a")


def test_follow_goes_on_over_a_restart_by_hand_and_ends_at_a_stop(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "again", "busybox", "sh", "-c", "echo run; exec sleep 600")
    process = cli.start("logs", "-f", "again")
    until(lambda: cli.ok("logs", "again") == "run", "it has begun")
    cli.ok("restart", "-t", "0", "again")
    until(lambda: cli.ok("logs", "again").split() == ["run"] * 2, "it runs again")
    assert process.poll() is None
    cli.ok("stop", "-t", "0", "again")
    assert followed(process) == "run\n" * 2


def test_follow_ends_with_one_that_is_removed(cli: Cli) -> None:
    for options in (["--rm"], ["--restart", "always"]):
        cli.ok("run", "-d", "--name", "gone", *options, "busybox", "sh", "-c", "echo run; exec sleep 600")
        process = cli.start("logs", "-f", "gone")
        until(lambda: cli.ok("logs", "gone") == "run", "it has begun")
        cli.ok("rm", "-f", "gone")
        assert followed(process) in ("run\n", ""), "it may have been removed before it was read"


def test_the_answer_begins_before_there_is_output(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "silent", "busybox", "sleep", "600")
    for answer in ("*/*", "text/event-stream"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(patiently(10))
            sock.connect(str(cli.socket))
            path = f"/v1/tenants/{cli.tenant}/instances/silent/logs?follow=true"
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: insula\r\nAccept: {answer}\r\n\r\n".encode())
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_attach_ends_where_the_process_does(cli: Cli) -> None:
    script = "read line; echo $line; exit 4"
    cli.ok("run", "-di", "--name", "again", "--restart", "on-failure:1", "busybox", "sh", "-c", script)
    result = cli.run("attach", "again", stdin="one\n")
    assert (result.status, result.out) == (4, "one\n")


def test_controls_that_are_cut_in_two_do_not_reach_the_terminal(cli: Cli) -> None:
    script = r"printf 'A\302'; sleep 0.3; printf '\2352;title\234B\2331mC\033'; sleep 0.3; printf '[2JD\n'"
    cli.ok("run", "--name", "evil", "busybox", "sh", "-c", script)
    raw = cli.raw("logs", "evil").stdout
    assert raw == b"A\xc2\x9d2;title\x9cB\x9b1mC\x1b[2JD\n", "the positive control"
    with cli.terminal("logs", "evil") as terminal:
        terminal.expect(r"A\\xc2\\x9d2;title\\x9cB\\x9b1mC\\x1b\[2JD\r\n")
        assert terminal.wait() == 0


def test_a_name_that_is_not_utf_8_can_be_looked_at(cli: Cli) -> None:
    r"""prctl(2), PR_SET_NAME: /proc/PID/comm, status and stat hold these bytes."""
    script = r"printf '\377\233bad' > /proc/1/comm; echo named; while :; do sleep 600; done"
    cli.ok("run", "-d", "--name", "odd", "busybox", "sh", "-c", script)
    until(lambda: cli.ok("logs", "odd") == "named", "it has its name")
    pid = cli.json("inspect", "odd")[0]["status"]["pid"]
    assert b"\xff\x9bbad" in Path(f"/proc/{pid}/status").read_bytes(), "the positive control"
    assert cli.json("explain", "odd")["security"]["no_new_privs"] == "yes"
    assert "odd" in cli.ok("explain", "odd")
    assert cli.json("top", "odd")
    assert cli.json("whois", str(pid))["instance"] == "odd"
    odd = (
        r"printf '#!/bin/sh\necho ran; sleep 600' > /tmp/$(printf '\377'); chmod 755 /tmp/*; exec /tmp/$(printf '\377')"
    )
    cli.ok("exec", "-d", "odd", "sh", "-c", odd)
    until(lambda: any("\ufffd" in process["command"] for process in cli.json("top", "odd")), "arguments of any bytes")


def test_an_error_with_a_name_that_is_not_utf_8_is_one_line(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "plain", "busybox", "sleep", "600")
    result = subprocess.run(
        [*cli.command("exec", "plain"), b"/no/such\xff"], env=cli.environment(), capture_output=True, check=False
    )
    assert result.returncode in (125, 127)
    assert result.stderr.count(b"\n") == 1
    assert b"defect" not in result.stderr


@pytest.fixture
def odd_group() -> Iterator[bytes]:
    """A control group with a process of ours whose name is not UTF-8; containers with --nesting may make such."""
    tree = cgroups.hierarchy()
    top = tree.unified or tree.controllers["pids"]
    path = os.fsencode(f"{top}/insula-test-{os.getpid()}") + b"-\xff"
    os.mkdir(path)
    try:
        yield path
    finally:
        os.rmdir(path)


def test_a_group_whose_name_is_not_utf_8(odd_group: bytes) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        Path(os.fsdecode(odd_group), "cgroup.procs").write_text(str(process.pid))
        found = cgroups.of_process(process.pid)
        assert process.stdin
        process.stdin.close()
        process.wait()
    assert found is not None
    assert os.fsencode(found).endswith(b"-\xff")
