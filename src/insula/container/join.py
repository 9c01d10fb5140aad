"""How a process joins a container that runs: what `exec` does, with setns(2).

setns with a pidfd joins all namespaces of a process at once. A PID namespace is joined only by children, so the
process that joins forks once more: the second is numbered inside, and CLONE_PARENT makes it a child of the
spawner, which can wait for it. Until execve it runs the host's Python among strangers, so it is made undumpable
first: no process inside may trace it or look through /proc/PID at its memory, files or program (CVE-2019-5736,
CVE-2024-21626).
"""

from __future__ import annotations

import os

from insula.container import wire
from insula.container.departure import Filter, departure
from insula.container.init import become_root
from insula.container.stdio import connect_stdio, open_terminal, take_terminal
from insula.container.steps import StepError, close_others, report, reset_signals, step
from insula.kernel import cgroups, linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any, NoReturn

ALL = (
    linux.CLONE_NEWUSER
    | linux.CLONE_NEWNS
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
    | linux.CLONE_NEWPID
)


def main(
    target: int,
    process: dict[str, Any],
    sync: _socket.socket,
    join: list[int],
    stdio: list[int],
    program: Filter | None,
) -> NoReturn:
    """Run in the child, for ever: join the namespaces of the pidfd `target`, fork into them, and exit."""
    try:
        reset_signals()
        close_others([target, sync.fileno(), *join, *stdio])
        step("hide from the container", lambda: linux.prctl(linux.PR_SET_DUMPABLE, 0))
        if (score := process.get("oomScoreAdj")) is not None:  # while it has the right to lower it for good
            step("set oom_score_adj", lambda: _write("/proc/self/oom_score_adj", str(score)))
        step("join the cgroup", lambda: cgroups.join(join))
        step("join the namespaces", lambda: linux.setns(target, ALL))
        pid, _ = linux.clone3(linux.CLONE_PARENT)
        if pid:
            wire.send(sync, {"event": "forked", "pid": pid})
            os._exit(0)
        _inside(process, sync, stdio, program)
    except StepError as error:
        report(sync, error)
    except OSError as error:
        report(sync, StepError("join the container", error))
    finally:
        os._exit(125)


def _inside(process: dict[str, Any], sync: _socket.socket, stdio: list[int], program: Filter | None) -> NoReturn:
    """Numbered inside from here on: take the user's ID, the streams, and become the program."""
    step("become root inside", become_root)
    step("hide from the container", lambda: linux.prctl(linux.PR_SET_DUMPABLE, 0))
    step("leave the host's keyring", lambda: linux.join_session_keyring("insula"))
    step("start a session", os.setsid)
    if process.get("terminal"):
        master, slave = open_terminal(process)
        wire.send(sync, {"event": "terminal"}, [master])
        os.close(master)
        step("open the terminal", lambda: take_terminal(slave))
    else:
        step("connect standard input and output", lambda: connect_stdio(stdio))
    departure(process, program)


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)
