"""Waits with a time limit for events that happen soon.

How long soon may take depends on the machine, and on what else it does: `INSULA_TEST_PATIENCE` is a factor for every
such bound of the tests, greater where the processor is emulated. A test that passes never waits for a bound.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = float(os.environ.get("INSULA_TEST_PATIENCE", "4"))


def patiently(seconds: float) -> float:
    """A bound for this machine."""
    return seconds * PATIENCE


def until(condition: Callable[[], T], what: str, timeout: float = 10.0, interval: float = 0.05) -> T:
    """The first true value of `condition`; AssertionError with `what` and its last value after `timeout` seconds.

    An AssertionError raised by `condition` counts as not yet true; so do the errors of a file or a process that is not
    there (ENOENT, ESRCH), which may come, or be another one the next time. Between two looks passes `interval`, and no
    less than a look has taken: half of a slow processor, at least, is for what is waited for.
    """
    timeout = patiently(timeout)
    deadline = time.monotonic() + timeout
    while True:
        begun = time.monotonic()
        try:
            value: T | Exception = condition()
            if value:
                return value  # type: ignore[return-value]  # an exception is never returned by a condition
        except (AssertionError, FileNotFoundError, ProcessLookupError) as error:
            value = error
        ended = time.monotonic()
        if ended > deadline:
            raise AssertionError(f"after {timeout:g} s still not: {what}; last seen: {value!r}")
        time.sleep(max(interval, ended - begun))


async def eventually(condition: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    """`until`, while the event loop goes on."""
    deadline = time.monotonic() + patiently(timeout)
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout} s still not: {what}")
        await asyncio.sleep(0.01)
