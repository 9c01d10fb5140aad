"""The table of a load balancer: even shares, and few places that change."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from insula.network.maglev import PLACES, table

NAMES = st.lists(st.text("abcdef0123456789.: ", min_size=1, max_size=20), min_size=1, max_size=40, unique=True)


@given(NAMES)
def test_every_place_has_a_backend_and_shares_are_even(names: list[str]) -> None:
    shares = Counter(table(tuple(names)))
    assert sum(shares.values()) == PLACES and len(shares) == len(names)
    assert max(shares.values()) - min(shares.values()) <= 1


@given(NAMES)
def test_the_order_of_backends_does_not_matter(names: list[str]) -> None:
    found = [names[each] for each in table(tuple(names))]
    turned = names[::-1]
    assert [turned[each] for each in table(tuple(turned))] == found


def test_without_one_of_ten_only_few_other_places_change() -> None:
    names = tuple(f"10.0.0.{number} 80" for number in range(10))
    before = [names[each] for each in table(names)]
    for gone in names:
        rest = tuple(each for each in names if each != gone)
        after = [rest[each] for each in table(rest)]
        moved = sum(one != other for one, other in zip(before, after, strict=True) if one != gone)
        assert moved < PLACES * 0.25, moved
        assert gone not in after


def test_no_backends_have_no_places() -> None:
    assert table(()) == ()
