"""Sizes, durations, rates and numbers of CPUs, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.model.errors import Invalid
from insula.model.units import check_label, format_size, parse_cpus, parse_duration, parse_rate, parse_size, shorten


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
def test_invalid_durations_are_refused(text: str) -> None:
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
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "0.001", "-1", "nan", "inf", "1e9", "two"])
def test_invalid_numbers_of_cpus_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="is not a number of CPUs"):
        parse_cpus(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("0", 0), ("8000", 8000), ("10m", 10**7), ("10M", 10**7), ("1gbit", 10**9), ("1.5k", 1500), ("2t", 2 * 10**12)],
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-1", "1x", "9" * 400, "nan", "10mb"])
def test_invalid_rates_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="is not a rate"):
        parse_rate(text)


@pytest.mark.parametrize(("text", "cpus"), [("0.01", 0.01), ("0.5", 0.5), ("2", 2.0), ("65536", 65536.0)])
def test_numbers_of_cpus(text: str, cpus: float) -> None:
    assert parse_cpus(text) == cpus


def test_the_largest_of_each() -> None:
    """Sizes and rates are numbers of 63 bits to the kernel and to the store."""
    for parse in (parse_size, parse_rate):
        largest = (1 << 63) - 1024
        assert parse(str(largest)) == largest
        with pytest.raises(Invalid):
            parse(str(1 << 63))
    assert parse_duration("10000000000") == 1e10
    for parse_it, beyond in ((parse_duration, "10000000001"), (parse_cpus, "65536.5"), (parse_cpus, "0.0099")):
        with pytest.raises(Invalid):
            parse_it(beyond)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0B"), (1, "1B"), (1023, "1023B"), (1024, "1K"), (1536, "1.5K"), (100 << 10, "100K"), (102298, "99.9K")),
        *((64 << 20, "64M"), (1 << 30, "1G"), (3 << 29, "1.5G"), (1 << 40, "1T"), (1 << 50, "1024T"), (-2048, "-2K")),
        *((100 * 1024 + 512, "100K"), ((1 << 20) - 1, "1024K")),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.text(max_size=100) | st.integers() | st.binary(max_size=80), st.integers(10, 80))
def test_a_value_in_a_message_is_one_line_and_never_long(value: object, limit: int) -> None:
    text = shorten(value, limit)
    assert "\n" not in text and text.isprintable()
    assert (text == repr(value)) == (len(repr(value)) <= limit)
    assert len(text) == min(limit, len(repr(value)))
    assert text == repr(value) or (text.endswith("...'") and repr(value).startswith(text[:-4]))


@pytest.mark.parametrize("name", ["a", "0", "a-b", "x" * 63, "a--b", "1a"])
def test_labels(name: str) -> None:
    assert check_label("tenant", name) == name


@pytest.mark.parametrize("name", ["", "-", "-a", "a-", "A", "a.b", "a_b", "x" * 64, "a\n", "é", None, 7])
def test_invalid_labels_are_refused(name: object) -> None:
    with pytest.raises(Invalid, match="tenant name"):
        check_label("tenant", name)  # type: ignore[arg-type]
