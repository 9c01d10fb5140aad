"""The pool of external addresses: which one is chosen, and what is refused."""

from __future__ import annotations

import pytest

from insula.model.errors import Conflict, InsulaError, Invalid
from insula.network import pool

RANGES = ["203.0.113.64/30", "198.51.100.7/32", "2001:db8:5::/126"]


def test_the_lowest_free_address_of_the_version_is_chosen() -> None:
    assert pool.choose(RANGES, (), 4) == "203.0.113.65"
    assert pool.choose(RANGES, {"203.0.113.65"}, 4) == "203.0.113.66"
    assert pool.choose(RANGES, {"203.0.113.65", "203.0.113.66"}, 4) == "198.51.100.7"
    assert pool.choose(RANGES, (), 6) == "2001:db8:5::1"
    assert pool.choose(["::1:0/112"], (), 6) == "::1:1", "also where a number is a small one"
    assert pool.choose(["203.0.113.64/31"], (), 4) == "203.0.113.64", "RFC 3021"
    with pytest.raises(Conflict, match="all IPv4 addresses of the pool are in use"):
        pool.choose(RANGES, {"203.0.113.65", "203.0.113.66", "198.51.100.7"}, 4)
    with pytest.raises(Invalid, match="the pool has no IPv6 addresses"):
        pool.choose(RANGES[:2], (), 6)


def test_an_address_of_the_pool_can_be_asked_for() -> None:
    assert pool.check(RANGES, (), "203.0.113.66") == "203.0.113.66"
    assert pool.check(RANGES, (), "2001:DB8:5:0::3") == "2001:db8:5::3"


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ("203.0.113.64", Invalid, "is not in the pool"),
        ("203.0.113.67", Invalid, "is not in the pool"),
        ("203.0.113.68", Invalid, "is not in the pool"),
        ("2001:db8:5::", Invalid, "is not in the pool"),
        ("2001:db8:5::1%eth0", Invalid, "is not in the pool"),
        ("::ffff:203.0.113.65", Invalid, "is not in the pool"),
        ("203.0.113.65", Conflict, "is taken"),
        ("one", Invalid, "is no IP address"),
    ],
)
def test_others_are_refused(wanted: str, error: type[InsulaError], message: str) -> None:
    with pytest.raises(error, match=message):
        pool.check(RANGES, {"203.0.113.65"}, wanted)
