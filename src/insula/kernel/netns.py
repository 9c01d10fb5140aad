"""Run functions in another network namespace (setns(2), network_namespaces(7)).

setns(2) moves one thread. The calling thread enters the namespace and returns. The main thread never moves, because
/proc/self shows its namespace as that of the process: a new thread runs the function instead.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from insula.kernel import syscalls

OWN: Final = "/proc/thread-self/ns/net"
"""The calling thread's network namespace."""
T = TypeVar("T")


def call_in(netns: int, function: Callable[[], T]) -> T:
    """Call `function` in the namespace behind the descriptor, and return its result."""
    return _call_after(lambda: syscalls.setns(netns, syscalls.CLONE_NEWNET), function)


def call_in_new(function: Callable[[], T]) -> T:
    """Call `function` in a new namespace, and return its result. The namespace ends when nothing refers to it."""
    return _call_after(lambda: syscalls.unshare(syscalls.CLONE_NEWNET), function)


def _call_after(enter: Callable[[], None], function: Callable[[], T]) -> T:
    if threading.current_thread() is threading.main_thread():
        return _in_thread(lambda: _call_after(enter, function))
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter()
        try:
            return function()
        finally:
            syscalls.setns(home, syscalls.CLONE_NEWNET)
    finally:
        os.close(home)


def _in_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
