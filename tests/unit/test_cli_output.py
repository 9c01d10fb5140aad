"""What tenants named or printed reaches a terminal as text only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.cli.output import age, clean, table
from insula.cli.verbs.events import line
from insula.cli.verbs.logs import printable, stamp


@pytest.mark.parametrize(
    "evil", ["\x1b]0;title\x07", "a\nb", "\x9b31m", "\u202eoriginal", "\u2066x", "\r", "\x7f", "\udcff"]
)
def test_control_characters_are_shown_not_obeyed(evil: str) -> None:
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


def test_logs_on_a_terminal_keep_colours_only() -> None:
    assert printable(b"\x1b[1;31mred\x1b[0m\n") == b"\x1b[1;31mred\x1b[0m\n"
    assert printable(b"\x1b]0;owned\x07\x1b[2J") == b"\\x1b]0;owned\\x07\\x1b[2J"
    assert printable("é\t\r\n".encode()) == "é\t\r\n".encode()
    assert printable(b"\xc2\x9b2J") == b"\\xc2\\x9b2J"


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
    assert line({**event, "exit_status": 0, "error": None})[8:] == "  instance exited acme/web  exit_status=0"
    assert line({**event, "kind": "tenant", "name": "acme\x1b"})[8:] == "  tenant exited acme\\x1b"
