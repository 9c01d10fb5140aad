"""Descriptors above those that select(2) can wait for."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable

import pytest

from insula.kernel import descriptors
from insula.model.errors import Unavailable


def in_a_child(act: Callable[[], object]) -> bool:
    """Whether `act` ends without an exception, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(repr(error))
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def test_it_is_the_same_file_under_a_high_number() -> None:
    reader, writer = os.pipe()
    moved = descriptors.move_above_select_limit(writer)
    assert moved >= descriptors.FD_SETSIZE
    assert not os.get_inheritable(moved)
    os.write(moved, b"x")
    os.close(moved)
    assert os.read(reader, 2) == b"x"
    assert os.read(reader, 1) == b"", "no other copy is open"
    os.close(reader)


def test_without_a_free_high_number_it_stays() -> None:
    def body() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
        reader, _ = os.pipe()
        assert descriptors.move_above_select_limit(reader) == reader

    assert in_a_child(body)


def test_too_few_low_numbers_are_an_error() -> None:
    def body() -> None:
        descriptors.require_selectable("the library")
        low = [os.open("/dev/null", os.O_RDONLY)]
        while low[-1] < descriptors.FD_SETSIZE:
            low.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(Unavailable, match="the library"):
            descriptors.require_selectable("the library")
        for _ in range(16):
            os.close(low.pop(-20))
        descriptors.require_selectable("the library")

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= descriptors.FD_SETSIZE:
        pytest.skip(f"RLIMIT_NOFILE is {hard}")
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        assert in_a_child(body)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, soft)
