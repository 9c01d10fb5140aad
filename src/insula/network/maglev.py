"""Consistent hashing of a load balancer's places to its backends (Maglev, NSDI 2016, section 3.4).

Connections are hashed to one of `PLACES` places, and each place has a backend. Every backend has a permutation of all
places of its own, and the backends take turns: each takes the first place of its permutation that is still free. So all
have nearly the same number of places, and when one goes, its places are shared among the others, of whose places only
few change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Final

PLACES: Final = 1021
"""A prime, so that each step through the places visits all of them."""


@lru_cache(maxsize=256)
def table(backends: tuple[str, ...]) -> Sequence[int]:
    """Return the index of the backend of each place; none if there are no backends. It depends on their names, not on
    their order."""
    if not backends:
        return ()
    order = sorted(range(len(backends)), key=lambda each: backends[each])
    walks = {each: _walk(backends[each]) for each in order}
    found, left = [-1] * PLACES, PLACES
    while True:
        for each in order:
            at, step = walks[each]
            while found[at] >= 0:
                at = (at + step) % PLACES
            found[at] = each
            walks[each] = (at + step) % PLACES, step
            left -= 1
            if not left:
                return found


def _walk(name: str) -> tuple[int, int]:
    """Return the first place of a backend's permutation, and the step to the next."""
    number = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    return number % PLACES, number // PLACES % (PLACES - 1) + 1
