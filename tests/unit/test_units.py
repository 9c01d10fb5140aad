"""Sizes, durations, rates and numbers of CPUs, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.model.errors import Invalid
from insula.model.units import format_size, parse_cpus, parse_duration, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("10", 10.0),
        ("1.5", 1.5),
        ("10s", 10.0),
        ("200ms", 0.2),
        ("5m", 300.0),
        ("1m30s", 90.0),
        ("1h", 3600.0),
        ("1h5ms", 3600.005),
        ("1.5h", 5400.0),
        ("2d", 172800.0),
        ("1d2h3m4s5ms", 93784.005),
        (" 1m30s ", 90.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "s",
        "m30",
        "30s1m",
        "1m1m",
        "1m30",
        "1m 30s",
        "-1s",
        "+1",
        "1e3",
        "soon",
        "1w",
        ".5s",
        "1.s",
        "∞",
        "1_0",
        "9" * 400,
        "１s",
    ],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(Invalid, match="is not a duration"):
        parse_duration(text)


_PARTS = st.tuples(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))


@given(_PARTS, st.integers(1, 31))
def test_a_duration_is_the_sum_of_its_parts(parts: tuple[int, ...], written: int) -> None:
    """Any choice of the units, in order."""
    units = [("d", 86400.0), ("h", 3600.0), ("m", 60.0), ("s", 1.0), ("ms", 0.001)]
    chosen = [(n, *unit) for bit, (n, unit) in enumerate(zip(parts, units, strict=True)) if written >> bit & 1]
    text = "".join(f"{n}{name}" for n, name, _ in chosen)
    assert parse_duration(text) == pytest.approx(sum(n * seconds for n, _, seconds in chosen))


@given(st.text(max_size=12))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for parse in (parse_duration, parse_size, parse_rate, parse_cpus):
        try:
            assert parse(text) >= 0
        except Invalid as error:
            assert "\n" not in error.message
            assert error.hint


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("64m", 64 << 20), ("64M", 64 << 20), ("64MiB", 64 << 20), ("1.5g", 3 << 29), ("1t", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 1 << 50))
def test_a_size_that_is_shown_is_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize("text", ["", "lots", "-1", "1x", "9" * 400, "nan", "1 m m"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(Invalid, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "0.001", "-1", "nan", "inf", "1e9", "two"])
def test_what_is_no_number_of_cpus(text: str) -> None:
    with pytest.raises(Invalid, match="is not a number of CPUs"):
        parse_cpus(text)
