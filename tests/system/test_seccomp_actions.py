"""Every action of a seccomp profile, and its listener, on the real kernel, as a program sees it."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from insula.container import wire
from insula.container.create import notify
from insula.container.create.exec_process import Filter, exec_process
from insula.container.create.steps import StepError
from insula.kernel import syscall_numbers, syscalls
from insula.kernel.seccomp import compiler
from insula.kernel.seccomp.load import load
from tests.forked import Killed, forked
from tests.support.agent import ANSWER, agent
from tests.support.wait import patiently

T = TypeVar("T")
NATIVE = syscall_numbers.native()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def call(name: str, *args: int) -> int:
    """The errno of a raw system call, 0 if it succeeds."""
    number = syscall_numbers.numbers(name, NATIVE)[0].value
    return ctypes.get_errno() if _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in args)) < 0 else 0


def filtered(action: dict[str, Any], function: Callable[[], T], *flags: str) -> T:
    """Run `function` in a child in which personality(2) meets `action`, and return its result."""
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "flags": list(flags),
        "syscalls": [{"names": ["personality"], **action}],
    }
    program, loaded = compiler.compile(profile), compiler.parse(profile).flags

    def child() -> T:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        load(program, loaded)
        return function()

    return forked(child)


def personality() -> int:
    return call("personality", 0xFFFFFFFF)


def test_without_a_filter_the_call_succeeds() -> None:
    assert forked(personality) == 0


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        ({"action": "SCMP_ACT_ALLOW"}, 0),
        ({"action": "SCMP_ACT_LOG"}, 0),
        ({"action": "SCMP_ACT_ERRNO"}, errno.EPERM),
        ({"action": "SCMP_ACT_ERRNO", "errnoRet": 95}, 95),
        ({"action": "SCMP_ACT_ERRNO", "errnoRet": 4095}, 4095),
        ({"action": "SCMP_ACT_TRACE"}, errno.ENOSYS),  # nobody traces
    ],
)
def test_answers(action: dict[str, Any], answer: int) -> None:
    assert filtered(action, personality) == answer


def test_an_errno_of_nothing_skips_the_call() -> None:
    """ERRNO with 0 is success without the call: the personality that was to be set is not (uname(2) shows it)."""

    def child() -> tuple[int, str]:
        per_linux32 = 8
        return call("personality", per_linux32), os.uname().machine

    native = os.uname().machine
    assert filtered({"action": "SCMP_ACT_ERRNO", "errnoRet": 0}, child) == (0, native)
    if native == "x86_64":
        assert filtered({"action": "SCMP_ACT_ALLOW"}, child) == (0, "i686")


@pytest.mark.parametrize("flag", ["LOG", "TSYNC", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"])
def test_flags_are_taken_by_the_kernel(flag: str) -> None:
    assert filtered({"action": "SCMP_ACT_ERRNO"}, personality, f"SECCOMP_FILTER_FLAG_{flag}") == errno.EPERM


def test_trap_is_a_signal_that_can_be_handled() -> None:
    def child() -> list[int]:
        seen: list[int] = []
        signal.signal(signal.SIGSYS, lambda number, _: seen.append(number))
        personality()
        return seen

    assert filtered({"action": "SCMP_ACT_TRAP"}, child) == [signal.SIGSYS]
    with pytest.raises(Killed) as caught:
        filtered({"action": "SCMP_ACT_TRAP"}, personality)
    assert caught.value.signum == signal.SIGSYS


@pytest.mark.parametrize(
    ("action", "survives"),
    [("SCMP_ACT_KILL", True), ("SCMP_ACT_KILL_THREAD", True), ("SCMP_ACT_KILL_PROCESS", False)],
)
def test_the_thread_or_the_process_is_killed(action: str, survives: bool) -> None:
    def one_thread_calls() -> int:
        threading.Thread(target=personality, daemon=True).start()
        deadline = time.monotonic() + patiently(10)
        while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        return len(os.listdir("/proc/self/task"))

    if survives:
        assert filtered({"action": action}, one_thread_calls) == 1
    else:
        with pytest.raises(Killed) as caught:
            filtered({"action": action}, one_thread_calls)
        assert caught.value.signum == signal.SIGSYS
    with pytest.raises(Killed):  # the only thread is the process
        filtered({"action": action}, personality)


# -- the listener ------------------------------------------------------------------------------------------------------

STATE = {"ociVersion": "1.2.0", "id": "c1", "status": "creating", "pid": 0, "bundle": "/b", "annotations": {"a": "é"}}


def depart(profile: dict[str, Any], script: str, restricted: bool) -> tuple[str, wire.Message | None]:
    """Be the parent of a process that departs: its output, and the error that it told."""
    program = Filter(compiler.compile(profile), compiler.parse(profile).flags)
    ours, theirs = wire.pair()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os.dup2(writable, 1)
            process = {"args": ["/bin/sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "noNewPrivileges": restricted}
            exec_process(process, program, listener=lambda fd: notify.offer(theirs.fileno(), fd))
        except StepError as error:
            wire.send(theirs, {"event": "error", **error.message})
        finally:
            os._exit(125)
    theirs.close()
    os.close(writable)
    told: wire.Message | None = None
    pidfd = os.pidfd_open(pid)
    try:
        while received := wire.receive(ours):
            told = received[0]
            if told["event"] == "listener":
                notify.pass_on(pidfd, told["fd"], profile, {**STATE, "pid": pid}, pid)
                told = None
                wire.send(ours, {"event": "listening"})
        with os.fdopen(readable) as output:
            printed = output.read()
    finally:
        ours.close()  # if nobody took the listener, the child ends here
        os.waitpid(pid, 0)
        os.close(pidfd)
    return printed, told


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_an_agent_may_close_the_connection_after_the_message(tmp_path: Path, size: int) -> None:
    """It has the listener then. Tried often, because it closes at another moment each time."""
    profile = {"listenerPath": str(tmp_path / "agent.sock"), "listenerMetadata": "x" * size}
    tries = 100 if size == 0 else 5
    heard: list[int] = []

    def answer(listener: socket.socket) -> None:
        for _ in range(tries):
            connection, _ = listener.accept()
            with connection:
                read, fds, _, _ = socket.recv_fds(connection, 1 << 20, 1)
                while not read.endswith(b"}}"):
                    read += connection.recv(1 << 20)
                heard.append(len(read))
                os.close(fds[0])

    pidfd = os.pidfd_open(os.getpid())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(profile["listenerPath"])
        listener.listen()
        thread = threading.Thread(target=answer, args=(listener,), daemon=True)
        thread.start()
        for _ in range(tries):
            notify.pass_on(pidfd, pidfd, profile, STATE, 1)
        thread.join(patiently(20))
    os.close(pidfd)
    assert len(heard) == tries and min(heard) > size


def notifying(path: Path, names: tuple[str, ...] = ("mkdir", "mkdirat"), **more: Any) -> dict[str, Any]:
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": str(path),
        "syscalls": [{"names": list(names), "action": "SCMP_ACT_NOTIFY"}],
        **more,
    }


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("more", [{}, {"listenerMetadata": "é" * 100_000}])
def test_an_agent_of_the_host_decides(tmp_path: Path, restricted: bool, more: dict[str, Any]) -> None:
    path = tmp_path / "agent.sock"
    with agent(path) as listening:
        profile = notifying(path, flags=["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"], **more)
        printed, told = depart(profile, f"mkdir {tmp_path}/made 2>&1; ls -l /proc/$$/fd", restricted)
    assert told is None
    assert os.strerror(ANSWER) in printed  # only the agent would say so
    assert "seccomp" not in printed  # the program itself has no listener
    assert set(listening.asked) <= {
        way.value for n in ("mkdir", "mkdirat") for way in syscall_numbers.numbers(n, NATIVE)
    }
    assert not (tmp_path / "made").exists()
    pid = listening.received["pid"]
    assert listening.received == {
        "ociVersion": "1.2.0",
        "fds": ["seccompFd"],
        "pid": pid,
        **({"metadata": more["listenerMetadata"]} if more else {}),
        "state": {**STATE, "pid": pid},
    }


def test_calls_before_execve_reach_the_agent(tmp_path: Path) -> None:
    """Without no_new_privs the filter comes before the last right is dropped: the agent is asked about that."""
    path = tmp_path / "agent.sock"
    with agent(path) as listening:
        printed, told = depart(notifying(path, ("capset",)), "echo here", False)
    assert printed == ""
    assert told is not None
    assert (told["step"], told["errno"]) == ("drop_capabilities", ANSWER)
    assert listening.asked == [syscall_numbers.numbers("capset", NATIVE)[0].value]


def test_without_an_agent_there_is_no_program(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="listenerPath"):
        depart(notifying(tmp_path / "nobody.sock"), "echo here", True)
    (tmp_path / "deaf.sock").touch()
    with pytest.raises(OSError, match="listenerPath"):
        depart(notifying(tmp_path / "deaf.sock"), "echo here", True)


def test_a_filter_that_notifies_needs_an_agent() -> None:
    profile = notifying(Path("/nowhere"))
    program = Filter(compiler.compile(profile), compiler.parse(profile).flags)

    def child() -> str:
        try:
            exec_process({"args": ["/bin/true"], "noNewPrivileges": True}, program)
        except StepError as error:
            return str(error.message["error"])

    assert forked(child) == "no process receives its notifications"
