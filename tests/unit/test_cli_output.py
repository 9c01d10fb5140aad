"""Names and output of tenants reach a terminal as text only."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.cli.output import age, clean, table
from insula.cli.verbs.events import line
from insula.cli.verbs.logs import Printable, moment, stamp
from insula.cli.verbs.verify import print_matrix


@pytest.mark.parametrize(
    "evil", ["\x1b]0;title\x07", "a\nb", "\x9b31m", "\u202eoriginal", "\u2066x", "\r", "\x7f", "\udcff"]
)
def test_control_characters_are_escaped(evil: str) -> None:
    assert clean(evil) != evil
    assert clean(evil).isprintable()


@given(st.text())
def test_clean_is_always_one_printable_line(text: str) -> None:
    assert clean(text).isprintable()
    assert len(clean(text).splitlines()) <= 1
    if text.isascii() and text.isprintable():
        assert clean(text) == text


def test_names_in_other_scripts_stay() -> None:
    assert clean("Ωmega käse 空") == "Ωmega käse 空"


def test_a_table_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table(["NAME", "X"], [["evil\nname", None], ["b", 1]])
    assert capsys.readouterr().out == "NAME        X\nevil\\nname  -\nb           1\n"


def shown(*pieces: bytes) -> bytes:
    output = Printable()
    return b"".join(output.feed(piece) for piece in pieces) + output.feed(b"", final=True)


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        (b"\x1b[1;31mred\x1b[0m\n", b"\x1b[1;31mred\x1b[0m\n"),
        (b"\x1b]0;owned\x07\x1b[2J", b"\\x1b]0;owned\\x07\\x1b[2J"),
        ("é\t\r\n空".encode(), "é\t\r\n空".encode()),
        (b"\xc2\x9b2J", b"\\xc2\\x9b2J"),
        (b"A\xc2\x9d2;title\xc2\x9c", b"A\\xc2\\x9d2;title\\xc2\\x9c"),
        (b"\x9b31m\x9d\x80\x9f", b"\\x9b31m\\x9d\\x80\\x9f"),
        (b"caf\xe9", b"caf\\xe9"),
        (b"\xc2", b"\\xc2"),
        (b"\xe2\x82", b"\\xe2\\x82"),
        (b"\xc0\x9b\xed\xa0\x80", b"\\xc0\\x9b\\xed\\xa0\\x80"),
        (b"\x1b", b"\\x1b"),
        (b"\x1b[", b"\\x1b["),
        (b"\x1b[" + b"1;" * 200 + b"m", b"\x1b[" + b"1;" * 200 + b"m"),
        (b"\x00\x08\x7f", b"\\x00\\x08\\x7f"),
    ],
)
def test_logs_on_a_terminal_keep_colours_only(raw: bytes, safe: bytes) -> None:
    assert shown(raw) == safe


_HOSTILE = st.lists(
    st.sampled_from(
        [
            b"\xc2",
            b"\x9b",
            b"\x9d",
            b"\x1b",
            b"[",
            b"1",
            b";",
            b"m",
            b"2J",
            b"a",
            b"\xe2\x82\xac",
            b"\xe2",
            b"\x82",
            b"\n",
            b"\xf0\x9f",
        ]
    )
    | st.binary(max_size=3),
    max_size=12,
).map(b"".join)


@given(_HOSTILE, st.data())
def test_output_may_be_cut_anywhere(raw: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    if b"\x1b[" not in raw or len(raw) < 100:
        assert shown(*pieces) == shown(raw)


@given(st.lists(st.tuples(st.booleans(), _HOSTILE), max_size=6))
def test_no_control_sequence_is_printed_however_output_is_interleaved(pieces: list[tuple[bool, bytes]]) -> None:
    """Standard output and error are on one terminal: a half of one and a half of the other must not make a whole."""
    streams = Printable(), Printable()
    out = b"".join(streams[error].feed(piece) for error, piece in pieces)
    out += b"".join(stream.feed(b"", final=True) for stream in streams)
    left = re.sub(r"\x1b\[[0-9;:]*m", "", out.decode())  # it is UTF-8
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", left)


def test_timestamps_stand_at_the_beginning_of_lines_only() -> None:
    stamped, at_start = stamp(b"one\ntw", 0.5, True)
    assert stamped == b"1970-01-01T00:00:00.500000Z one\n1970-01-01T00:00:00.500000Z tw"
    assert not at_start
    assert stamp(b"o\r\n", 1, at_start) == (b"o\r\n", True)


def test_age() -> None:
    assert [age(0, now) for now in (0, 59, 60, 3599, 3600, 86400 * 3)] == ["0s", "59s", "1m", "59m", "1h", "3d"]
    assert age(None) == "-"


def test_events_are_lines() -> None:
    event = {"time": 0.0, "revision": 7, "kind": "instance", "action": "exited", "tenant": "acme", "name": "web"}
    exited = {**event, "exit_status": 0, "error": None, "oom": False}
    assert line(exited)[8:] == "  instance exited acme/web  exit_status=0"
    assert line({**event, "kind": "tenant", "name": "acme\x1b"})[8:] == "  tenant exited acme\\x1b"


def test_since_is_an_age_or_a_time() -> None:
    assert moment("2026-01-31T12:00:00Z") == 1769860800
    assert moment("2026-01-31T12:00:00.5+01:00") == 1769857200.5
    assert abs(time.time() - 600 - moment("10m")) < 5


def matrix(*names: str) -> list[dict[str, object]]:
    """All instances reach each other and the gateway; the host reaches none."""
    cell = {"installed": True, "probed": True, "expected": True, "address": "a", "control": True, "detail": None}
    no = {**cell, "installed": False, "probed": False, "expected": False}
    pairs = [(source, target) for source in names for target in ("gateway", *reversed(names)) if source != target]
    found = [{**cell, "source": source, "target": target} for source, target in pairs]
    return [*found, *({**no, "source": "host", "target": name} for name in names)]


def test_the_matrix_has_its_columns_in_the_order_of_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_matrix(matrix("a/web", "b/web"))
    assert capsys.readouterr().out.splitlines()[:4] == [
        "FROM \\ TO  a/web  b/web  gateway",
        "a/web      ·      yes    yes",
        "b/web      yes    ·      yes",
        "host       no     no     ·",
    ]


def test_a_wide_matrix_has_numbers_for_columns(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"tenant/instance-{number:02}" for number in range(9)]
    print_matrix(matrix(*names))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["FROM", "\\", "TO", *map(str, range(1, 11))]
    assert lines[2].split() == ["2", names[1], "yes", "·", *["yes"] * 8]
    assert lines[10].split() == ["host", *["no"] * 9, "·"]
    assert "10  gateway" in lines
    assert max(map(len, lines)) <= 120
