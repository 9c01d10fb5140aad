"""Waiting with a bound: for what happens soon, but not at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, timeout: float = 10.0, interval: float = 0.05) -> T:
    """The first true value of `condition`; AssertionError with `what` and its last value after `timeout` seconds.

    An AssertionError raised by `condition` counts as not yet true.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            value: T | AssertionError = condition()
            if value:
                return value  # type: ignore[return-value]  # an AssertionError is never returned by a condition
        except AssertionError as error:
            value = error
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout} s still not: {what}; last seen: {value!r}")
        time.sleep(interval)
