"""Lists of processors as in cpuset(7), and scheduling attributes of `process`."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.kernel import scheduling


def written(numbers: set[int]) -> str:
    """The list with ranges where numbers follow each other."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in ranges)


@given(st.sets(st.integers(0, 65535), min_size=1, max_size=50))
def test_a_list_is_read_as_it_is_written(numbers: set[int]) -> None:
    assert scheduling.parse_list(written(numbers)) == numbers


@pytest.mark.parametrize(("text", "numbers"), [("0", {0}), ("0-2,7", {0, 1, 2, 7}), (" 1 , 3-3 ", {1, 3})])
def test_lists(text: str, numbers: set[int]) -> None:
    assert scheduling.parse_list(text) == numbers


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "-", "1-", "-1", "2-1", "a", "0x1", "1-2-3", "65536", "9" * 4000, "²", "١"]
)
def test_invalid_lists_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"processors|range"):
        scheduling.parse_list(text)


@given(st.text(max_size=30))
def test_anything_is_read_or_refused(text: str) -> None:
    try:
        assert all(0 <= number < 1 << 16 for number in scheduling.parse_list(text))
    except ValueError as error:
        assert str(error).isprintable()


def test_an_unchanged_attribute_needs_no_right() -> None:
    """Set to what it is: even where the policy could not be changed, nothing is asked of the kernel."""
    policy = int.from_bytes(scheduling.get_scheduler()[4:8], "little")
    assert policy == os.sched_getscheduler(0)
    scheduling.set_for_child({}, os.getpid())
    name = next(name for name, number in scheduling.POLICIES.items() if number == policy)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    scheduling.set_for_child({"scheduler": {"policy": name, "nice": nice}}, os.getpid())
    assert os.getpriority(os.PRIO_PROCESS, 0) == nice
