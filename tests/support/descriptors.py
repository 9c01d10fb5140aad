"""Checks which descriptors of this process an operation leaves open.

A process that has run thousands of tests closes some at any moment, when what held them is collected. So they are
compared one by one, never counted: one that has gone is no fault, nor is another file behind the same number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

Descriptor = tuple[int, str, int, int]
"""Number, what it leads to as /proc tells it, device and inode."""


def descriptors() -> frozenset[Descriptor]:
    """All that are open now."""
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            status = os.fstat(number)
            found.add((number, os.readlink(f"/proc/self/fd/{number}"), status.st_dev, status.st_ino))
        except OSError:  # the one that the list was read through
            continue
    return frozenset(found)


def opened_since(before: frozenset[Descriptor]) -> list[Descriptor]:
    """Descriptors that were not open then."""
    return sorted(descriptors() - before)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """AssertionError if one is open at the end that was not at the beginning, whatever comes of the block."""
    before = descriptors()
    try:
        yield
    finally:
        left = opened_since(before)
        assert not left, f"descriptors are left: {left}"
