"""Streams, terminals and logs: the same bytes from a container and from a machine."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time

from tests.support.wait import patiently, until
from tests.system.instances.conftest import LONG, Kind


def test_streams_stay_apart(kind: Kind, sleeper: str) -> None:
    script = "echo out; echo err >&2; cat; exit 3"
    for result in (
        kind.run("--rm", "-i", "busybox", "sh", "-c", script, stdin="given"),
        kind.cli.run("exec", "-i", sleeper, "sh", "-c", script, stdin="given"),
    ):
        assert (result.status, result.out, result.err) == (3, "out\ngiven", "err\n")


def test_without_input_there_is_its_end(kind: Kind, sleeper: str) -> None:
    assert kind.run("--rm", "busybox", "cat", stdin="not given").ok() == ""
    assert kind.cli.run("exec", sleeper, "cat", stdin="not given").ok() == ""


def test_a_megabyte_of_any_bytes_both_ways(kind: Kind, sleeper: str) -> None:
    data = os.urandom(1 << 20)
    expected = hashlib.sha256(data).digest()
    for words in (kind.words("--rm", "-i", "busybox"), ("exec", "-i", sleeper)):
        done = kind.cli.raw(*words, "sh", "-c", "tee /dev/stderr", stdin=data, timeout=LONG)
        assert done.returncode == 0
        assert [hashlib.sha256(each).digest() for each in (done.stdout, done.stderr)] == [expected, expected]


def test_an_input_that_the_program_does_not_read(kind: Kind, sleeper: str) -> None:
    """It ends all the same, with more input than all buffers hold."""
    done = kind.cli.raw("exec", "-i", sleeper, "sh", "-c", "head -c 4; exit 5", stdin=b"abcd" * (1 << 19), timeout=LONG)
    assert (done.returncode, done.stdout) == (5, b"abcd")


def test_output_of_what_the_program_leaves_behind(kind: Kind) -> None:
    """A child that has the output open does not keep the instance from ending."""
    assert kind.run("--rm", "busybox", "sh", "-c", "echo one; (sleep 600; echo two) & exit 6").out == "one\n"


def test_a_signal_to_the_command_line_is_passed_on(kind: Kind) -> None:
    script = "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    with kind.cli.start(*kind.words("--rm", "busybox", "sh", "-c", script)) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        client.send_signal(signal.SIGTERM)
        assert client.stdout.readline() == "got it\n"
        assert client.wait(patiently(LONG)) == 9


# -- terminals ---------------------------------------------------------------------------------------------------------


def test_a_terminal(kind: Kind) -> None:
    """It has the size of the window; a key interrupts the program in it, and no more."""
    shown = "tty; stty size; test -t 0 && test -t 1 && test -t 2 && echo three; ls -x /dev/pts"
    script = f"trap 'echo interrupted; exit 7' INT; {shown}; while :; do sleep 0.1; done"
    with kind.terminal("--rm", "-it", "busybox", "sh", "-c", script, rows=33, columns=111) as terminal:
        terminal.expect(r"^/dev/pts/0\r\n33 111\r\nthree\r\n0 +ptmx\r\n", LONG)
        terminal.type("\x03")
        terminal.expect(r"\^Cinterrupted\r\n", LONG)
        assert terminal.wait(LONG) == 7


def test_detach_keys_and_attach(kind: Kind, name: str) -> None:
    with kind.terminal("-it", "--name", name, "busybox", "sh") as terminal:
        terminal.expect("# ", LONG)
        terminal.type("kept=yes\r")
        terminal.expect("# ", LONG)
        terminal.type("\x10\x11")
        assert terminal.wait(LONG) == 0
    assert kind.status(name)["state"] == "running"
    with kind.cli.terminal("attach", name, rows=41, columns=121) as terminal:
        terminal.type("echo kept=$kept $(stty size)\r")
        terminal.expect(r"\nkept=yes 41 121", LONG)
        terminal.type("exit 3\r")
        assert terminal.wait(LONG) == 3
    assert kind.cli.ok("wait", name) == "3"


def test_exec_in_a_terminal(kind: Kind, sleeper: str) -> None:
    with kind.cli.terminal(
        "exec", "-it", sleeper, "sh", "-c", "stty size; tty; exit 4", rows=7, columns=65
    ) as terminal:
        terminal.expect(r"^7 65\r\n/dev/pts/\d\r\n", LONG)
        assert terminal.wait(LONG) == 4


# -- logs --------------------------------------------------------------------------------------------------------------


def test_logs(kind: Kind, name: str) -> None:
    script = "echo one; echo two >&2; printf 'three\\nno end'; exit 4"
    kind.begin(name, "busybox", "sh", "-c", script)
    assert kind.cli.ok("wait", name) == "4"
    result = kind.cli.run("logs", name)
    assert (result.out, result.err) == ("one\nthree\nno end", "two\n")
    assert kind.cli.run("logs", "--tail", "1", name).out == "no end"
    first = kind.cli.run("logs", "-t", name).out.splitlines()[0]
    stamp, text = first.split(" ")
    assert text == "one" and stamp.startswith(time.strftime("%Y-", time.gmtime()))


def test_logs_are_followed_and_since(kind: Kind, name: str) -> None:
    script = "echo early; until test -e /go; do sleep 0.1; done; echo late; exec sleep 600"
    kind.begin(name, "busybox", "sh", "-c", script)
    following = kind.cli.start("logs", "-f", name)
    try:
        assert following.stdout is not None and following.stdout.readline() == "early\n"
        time.sleep(1)
        kind.cli.ok("exec", name, "touch", "/go")
        assert following.stdout.readline() == "late\n"
        assert kind.cli.ok("logs", "--since", "1h", name).split() == ["early", "late"]
        until(lambda: kind.cli.ok("logs", "--since", "1s", name) in ("late", ""), "the early one is old", LONG)
        kind.cli.ok("rm", "-f", name)
        assert following.communicate(timeout=patiently(LONG)) == ("", "")
    finally:
        following.kill()
        following.wait()


def test_logs_rotate_and_keep_the_end(kind: Kind, name: str) -> None:
    script = "i=0; while [ $i -lt 9000 ]; do echo line $i; i=$((i+1)); done"
    kind.begin(name, "--log-size", "64k", "--log-files", "2", "busybox", "sh", "-c", script)
    kind.cli.ok("wait", name, timeout=LONG)
    lines = kind.cli.ok("logs", name).splitlines()[1:]  # the first may have lost its beginning
    first = int(lines[0].split()[1])
    assert first > 0 and lines == [f"line {number}" for number in range(first, 9000)]


def test_a_slow_reader_holds_up_nobody_else(kind: Kind, sleeper: str) -> None:
    """A client that does not read, and a program that writes without end: others have their streams."""
    words = kind.cli.command("exec", sleeper, "sh", "-c", "yes | head -c 20000000")
    with subprocess.Popen(words, env=kind.cli.environment(), stdout=subprocess.PIPE) as slow:
        try:
            assert slow.stdout is not None and slow.stdout.read(2) == b"y\n"
            for _ in range(3):
                assert kind.cli.ok("exec", sleeper, "echo", "well", timeout=LONG) == "well"
        finally:
            slow.kill()
    until(lambda: kind.cli.ok("exec", sleeper, "echo", "after") == "after", "and afterwards", LONG)
