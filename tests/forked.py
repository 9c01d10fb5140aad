"""Run a function in a forked child, for tests of what a process cannot undo: capabilities, filters, namespaces."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import TypeVar

from tests.support.wait import patiently

T = TypeVar("T")


class Killed(Exception):
    """The child was killed by the signal `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def forked(function: Callable[[], T], *, timeout: int = 20) -> T:
    """Run `function` in a child process and return its result; its exceptions are raised here. It is killed after
    `timeout`."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(round(patiently(timeout)))
        try:
            answer: tuple[bool, object] = (True, function())
        except BaseException as error:
            error.add_note("in the child: " + traceback.format_exc())
            answer = (False, error)
        with os.fdopen(writable, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        raise Killed(os.WTERMSIG(status))
    returned, value = pickle.loads(data)
    if not returned:
        raise value
    return value  # type: ignore[no-any-return]


def errno_of(function: Callable[[], object]) -> int:
    """The errno of the OSError that `function` raises, 0 if it succeeds."""
    try:
        function()
    except OSError as error:
        return error.errno or -1
    return 0
