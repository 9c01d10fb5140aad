"""podman and docker pass a terminal over the console socket: it has the window's size, and keys become signals."""

from __future__ import annotations

import pytest

from tests.support.peers import IMAGE, Engine
from tests.support.wait import until

NAME = "terminal"


def test_run_in_a_terminal(engine: Engine) -> None:
    command = ("run", "--rm", "-it", IMAGE, "sh", "-c", "tty; read line; echo got $line; exit 4")
    with engine.terminal(*command) as terminal:
        terminal.expect("/dev/")
        terminal.type("hello\n")
        terminal.expect("got hello")
        assert terminal.wait() == 4


def test_the_window_s_size(engine: Engine) -> None:
    command = ("run", "--rm", "-it", IMAGE, "sh")
    with engine.terminal(*command, rows=33, columns=101) as terminal:
        terminal.expect("# ")

        def has(rows: int, columns: int) -> bool:
            terminal.type('echo "<$(stty size 2>/dev/null)>"\n')
            return terminal.expect(r"<(\d* ?\d*)>\r\n")[1] == f"{rows} {columns}"

        until(lambda: has(33, 101), "the size is the window's")

        def has_after_a_change() -> bool:  # a change before the engine's client listens to it is lost
            terminal.resize(43, 120)
            terminal.resize(44, 121)
            return has(44, 121)

        until(has_after_a_change, "the size is the window's new one")
        terminal.type("exit 5\n")
        assert terminal.wait() == 5


def test_ctrl_c_interrupts_the_program(engine: Engine) -> None:
    command = ("run", "--rm", "-it", IMAGE, "sh")
    with engine.terminal(*command) as terminal:
        terminal.expect("# ")
        terminal.type("sleep 1000; echo status $?\n")
        terminal.expect("echo status")
        until(lambda: engine.ok("ps", "-q"), "it runs")
        terminal.type("\x03")
        terminal.type("echo on we go\n")
        terminal.expect(r"\non we go")
        terminal.type("exit\n")
        terminal.wait()


@pytest.mark.parametrize("options", [("-t",), ("-it",)])
def test_exec_in_a_terminal(engine: Engine, options: tuple[str, ...]) -> None:
    engine.ok("run", "-d", "--name", NAME, IMAGE, "sleep", "1000")
    script = "until stty size 2>/dev/null | grep .; do sleep 0.05; done; exit 6"  # docker gives a size a moment later
    with engine.terminal("exec", *options, NAME, "sh", "-c", script) as terminal:
        terminal.expect(r"\d+ \d+")
        assert terminal.wait() == 6
    assert engine.run("exec", NAME, "test", "-t", "1").status == 1


def test_a_detached_terminal_is_logged(engine: Engine) -> None:
    engine.ok("run", "-d", "-t", "--name", NAME, IMAGE, "sh", "-c", "tty; echo end")
    assert engine.ok("wait", NAME) == "0"
    assert "/dev/" in engine.ok("logs", NAME)
    assert "end" in engine.ok("logs", NAME)
