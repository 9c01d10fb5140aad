"""Numbers of 32 bits for classes and sets of ports, which stay the same as long as what they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2s
from typing import Final

UNKNOWN: Final = 0
"""The number of addresses outside that no rule mentions."""
GRANTED: Final = 0xFFFF_FFFF
"""A number of its own, by which a chain tells that a packet is allowed."""
_BITS: Final = 31


def numbered(texts: Iterable[str], kind: int) -> dict[str, int]:
    """Return a number for each text: a hash of it, with `kind` (0 or 1) as the highest bit, so that two kinds never
    have the same. Of two with the same hash, the first in the order of texts keeps it."""
    found: dict[str, int] = {}
    taken = {UNKNOWN, GRANTED}
    for text in sorted(texts):
        salt = 0
        while (number := _hash(text, salt, kind)) in taken:
            salt += 1
        taken.add(number)
        found[text] = number
    return found


def _hash(text: str, salt: int, kind: int) -> int:
    digest = blake2s(text.encode(), digest_size=4, salt=salt.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") >> 1 | kind << _BITS
