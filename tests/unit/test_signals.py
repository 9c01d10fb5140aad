"""Signals as people and images write them: all names of signal(7), in any case, and nothing else."""

from __future__ import annotations

import signal
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.instances.specs import signal_name
from insula.model.errors import Invalid
from insula.model.units import parse_signal

SHELL = subprocess.run(["bash", "-c", "kill -l"], capture_output=True, text=True, check=True).stdout.split()
NAMES = {name: int(number.rstrip(")")) for number, name in zip(SHELL[::2], SHELL[1::2], strict=True)}
SYNONYMS = {
    "SIGIOT": 6,
    "SIGCLD": 17,
    "SIGPOLL": 29,
    "SIGSTKFLT": 16,
    "SIGUNUSED": 31,
    "SIGRTMIN+0": 34,
    "SIGRTMAX-0": 64,
}


def test_every_name_of_the_shell_in_any_case_with_and_without_prefix() -> None:
    assert len(NAMES) == 62 and NAMES["SIGRTMAX-14"] == 50  # bash writes half of them from the top
    for name, number in (NAMES | SYNONYMS).items():
        for text in (name, name.lower(), name.removeprefix("SIG"), name.removeprefix("SIG").title(), str(number)):
            assert parse_signal(text) == number, text


def test_every_real_time_signal_by_both_ends() -> None:
    low, high = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
    for number in range(low, high + 1):
        assert parse_signal(f"SIGRTMIN+{number - low}") == parse_signal(f"rtmax-{high - number}") == number


@pytest.mark.parametrize("number", sorted(signal.valid_signals()))
def test_the_canonical_name_means_the_same(number: int) -> None:
    assert parse_signal(signal_name(number)) == number
    assert signal_name(number).startswith("SIG")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-9",
        "+9",
        "32",
        "33",
        "65",
        "99999999999",
        "SIG",
        "SIG9",
        "SIGSIGTERM",
        "FOO",
        "NOSUCH",
        "_DFL",
        "SIG_IGN",
        "RTMIN+31",
        "RTMIN+99",
        "RTMIN+-1",
        "RTMIN-1",
        "RTMAX+1",
        "RTMAX-31",
        "RTMIN+",
        "RTMIN+3 ",
        "RTMIN+²",
        "²",
        "15 ",
    ],
)
def test_invalid_signals_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="there is no signal") as e:
        parse_signal(text)
    assert e.value.hint


@given(st.text(max_size=12))
def test_any_text_is_a_signal_or_refused(text: str) -> None:
    try:
        assert parse_signal(text) in signal.valid_signals()
    except Invalid as e:
        assert "\n" not in str(e)
