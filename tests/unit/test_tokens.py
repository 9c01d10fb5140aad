"""The text of tokens: what is a token, and what a program that looks for leaked secrets finds."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.identities.tokens import PATTERN, generate, matches, parse


def test_a_token_is_what_it_says() -> None:
    text, parsed = generate()
    assert re.fullmatch(PATTERN, text)
    assert parse(text) == parsed
    assert matches(parsed, parsed.digest)
    secret = text.removeprefix(f"insula_{parsed.id}_")[:43]  # it may have underscores
    assert parsed.digest not in text and secret not in parsed.digest


def test_no_two_are_the_same() -> None:
    assert len({generate()[0] for _ in range(1000)}) == 1000


@given(st.data())
def test_a_typing_mistake_is_seen_without_a_look_up(data: st.DataObject) -> None:
    """CRC-32 finds every change of a single character."""
    text, _ = generate()
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from(string.ascii_letters + string.digits + "_-"))
    if other != text[place]:
        assert parse(text[:place] + other + text[place + 1 :]) is None


@given(st.text(max_size=200))
def test_other_text_is_no_token(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("change", [lambda t: t + "\n", lambda t: " " + t, lambda t: t.upper(), lambda t: t * 2])
def test_nothing_is_corrected(change: object) -> None:
    assert parse(change(generate()[0])) is None  # type: ignore[operator]


def test_another_secret_and_an_unknown_token_do_not_match() -> None:
    (_, one), (_, other) = generate(), generate()
    assert not matches(one, other.digest)
    assert not matches(one, None)
