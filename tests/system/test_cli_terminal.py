"""`-it` in a real terminal: raw mode, window size, Ctrl-C, detach keys, and the terminal as it was afterwards."""

from __future__ import annotations

import termios

import pytest

from tests.support.cli import Cli
from tests.support.wait import until

COOKED = termios.ICANON | termios.ECHO | termios.ISIG
PROMPT = r"/ [#$] "


def test_a_shell(cli: Cli) -> None:
    with cli.terminal("run", "--rm", "-it", "busybox", "sh") as terminal:
        terminal.expect(PROMPT)
        assert not terminal.flags() & COOKED, "our side passes every byte on"
        terminal.type("tty; test -t 0 && test -t 1 && test -t 2 && echo three\r")
        terminal.expect("/dev/(pts/0|console)")
        terminal.expect("\nthree")
        terminal.type("exit 7\r")
        assert terminal.wait() == 7
        assert terminal.flags() & COOKED == COOKED, "and is as before"


def test_the_terminal_has_the_size_of_the_window_and_follows_it(cli: Cli) -> None:
    with cli.terminal("run", "--rm", "-it", "busybox", "sh", rows=33, columns=111) as terminal:
        terminal.expect(PROMPT)
        terminal.type("stty size\r")
        terminal.expect(r"\n33 111\r")
        terminal.resize(44, 122)
        terminal.type("stty size\r")
        terminal.expect(r"\n44 122\r")
        terminal.type("exit\r")
        assert terminal.wait() == 0


STTY = ("busybox", "sh", "-c", "stty size; stty size </dev/tty")


@pytest.mark.parametrize("options", [("--rm", "-it"), ("--rm", "-t"), ("--rm", "-it", "--init")])
def test_the_first_program_sees_the_size(cli: Cli, options: tuple[str, ...]) -> None:
    for _ in range(3):  # the second and third may be spares that were made ahead
        with cli.terminal("run", *options, *STTY, rows=40, columns=120) as terminal:
            terminal.expect(r"^40 120\r+\n40 120\r")
            assert terminal.wait() == 0


def test_the_first_program_of_exec_sees_the_size(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "sized", "busybox", "sleep", "600")
    for flags in ("-it", "-t"):
        for rows, columns in ((40, 120), (7, 65)):
            with cli.terminal("exec", flags, "sized", "stty", "size", rows=rows, columns=columns) as terminal:
                terminal.expect(rf"^{rows} {columns}\r")
                assert terminal.wait() == 0


def test_attach_sets_the_size(cli: Cli) -> None:
    """An instance made without a terminal of the caller has no size; attach sets it before the first key is sent."""
    script = "stty size; echo begun; while read line; do stty size; done"
    cli.ok("run", "-dit", "--name", "later", "busybox", "sh", "-c", script)
    until(lambda: "begun" in cli.ok("logs", "later"), "it runs")
    assert "stty: standard input" in cli.ok("logs", "later"), "the positive control: it began without a size"
    with cli.terminal("attach", "later", rows=41, columns=121) as terminal:
        terminal.type("\r")
        terminal.expect(r"\n41 121\r")
        terminal.type("\x10\x11")
        assert terminal.wait() == 0


def test_wrong_detach_keys_change_nothing(cli: Cli) -> None:
    assert "ctrl-pp" in cli.fails("run", "--name", "never", "--detach-keys", "ctrl-pp", "busybox", "true", status=2)
    assert cli.json("ps", "-a") == []


def test_control_c_interrupts_the_program_inside_only(cli: Cli) -> None:
    with cli.terminal("run", "--rm", "-it", "--name", "busy", "busybox", "sh") as terminal:
        terminal.expect(PROMPT)
        terminal.type("sleep 600\r")
        until(lambda: any(p["command"].startswith("sleep") for p in cli.json("top", "busy")), "it sleeps")
        terminal.type("\x03")
        terminal.expect(PROMPT)
        terminal.type("echo still here\r")
        terminal.expect(r"\nstill here")
        terminal.expect(PROMPT)
        terminal.type("\x04")  # Ctrl-D: the shell's end of input
        terminal.wait()


def test_control_c_three_times_detaches_from_a_program_that_ignores_it(cli: Cli) -> None:
    """The instance tells of each: signals that come faster than they are taken become one (signal(7))."""
    script = "trap 'echo again' INT; echo ready; while :; do sleep 0.05; done"
    with cli.terminal("run", "--name", "stubborn", "busybox", "sh", "-c", script) as terminal:
        terminal.expect("ready")
        for _ in range(2):
            terminal.type("\x03")
            terminal.expect("again")
            assert [view["status"]["state"] for view in cli.json("ps")] == ["running"]
        terminal.type("\x03")
        terminal.expect("detached")
        assert terminal.wait() == 130
    assert [view["status"]["state"] for view in cli.json("ps")] == ["running"]


def test_control_c_repeated_detaches_from_a_program_that_does_not_get_it(cli: Cli) -> None:
    """PID 1 without a handler never hears SIGINT (pid_namespaces(7))."""
    with cli.terminal("run", "--name", "deaf", "busybox", "sleep", "600") as terminal:
        until(lambda: cli.ok("ps", "-q") == "deaf", "it runs")

        def detached() -> bool:
            terminal.type("\x03")
            return bool(terminal.expect("detached", timeout=0.1))

        until(detached, "it lets go")
        assert terminal.wait() == 130
    assert [view["status"]["state"] for view in cli.json("ps")] == ["running"]


def test_detach_and_attach(cli: Cli) -> None:
    with cli.terminal("run", "-it", "--name", "shell", "busybox", "sh") as terminal:
        terminal.expect(PROMPT)
        terminal.type("kept=yes\r")
        terminal.expect(PROMPT)
        terminal.type("\x10\x11")  # Ctrl-P Ctrl-Q
        assert terminal.wait() == 0
        assert terminal.flags() & COOKED == COOKED
    assert [view["status"]["state"] for view in cli.json("ps")] == ["running"]
    with cli.terminal("attach", "shell") as terminal:
        terminal.type("echo kept=$kept\r")
        terminal.expect(r"\nkept=yes")
        terminal.type("exit 3\r")
        assert terminal.wait() == 3


def test_other_detach_keys(cli: Cli) -> None:
    with cli.terminal("run", "-it", "--name", "keys", "--detach-keys", "ctrl-x,q", "busybox", "sh") as terminal:
        terminal.expect(PROMPT)
        terminal.type("\x10\x11echo no\x18")
        terminal.type("q")
        assert terminal.wait() == 0
    assert [view["status"]["state"] for view in cli.json("ps")] == ["running"]


def test_exec_in_a_terminal(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    with cli.terminal("exec", "-it", "web", "sh", rows=30, columns=90) as terminal:
        terminal.expect(PROMPT)
        terminal.type("stty size; exit 4\r")
        terminal.expect(r"\n30 90")
        assert terminal.wait() == 4


def test_a_killed_command_line_leaves_the_shell_running(cli: Cli) -> None:
    with cli.terminal("run", "-it", "--name", "orphan", "busybox", "sh") as terminal:
        terminal.expect(PROMPT)
        terminal.close()
    assert [view["status"]["state"] for view in cli.json("ps")] == ["running"]


def test_a_terminal_without_one_on_stdin_is_refused(cli: Cli) -> None:
    assert "terminal" in cli.fails("run", "--rm", "-it", "busybox", "sh", status=125)
    assert cli.json("ps", "-a") == []
