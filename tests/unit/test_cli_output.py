"""What tenants named or printed reaches a terminal as text only."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.cli.output import age, clean, table
from insula.cli.verbs.events import line
from insula.cli.verbs.logs import moment, printable, stamp
from insula.cli.verbs.verify import print_matrix


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
    exited = {**event, "exit_status": 0, "error": None, "oom": False}
    assert line(exited)[8:] == "  instance exited acme/web  exit_status=0"
    assert line({**event, "kind": "tenant", "name": "acme\x1b"})[8:] == "  tenant exited acme\\x1b"


def test_since_is_an_age_or_a_time() -> None:
    assert moment("2026-01-31T12:00:00Z") == 1769860800
    assert moment("2026-01-31T12:00:00.5+01:00") == 1769857200.5
    assert abs(time.time() - 600 - moment("10m")) < 5


def matrix(*names: str) -> list[dict[str, object]]:
    """Everybody reaches everybody else, and the gateway; the host reaches nobody."""
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
