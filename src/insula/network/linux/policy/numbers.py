"""Numbers of 32 bits for classes and sets of ports, which stay the same as long as what they stand for."""

from __future__ import annotations

from collections.abc import Container, Iterable
from hashlib import blake2s
from typing import Final

UNKNOWN: Final = 0
"""The number of addresses outside that no rule mentions."""
GRANTED: Final = 0xFFFF_FFFF
"""A number of its own, by which a chain tells that a packet is allowed."""
CLASS: Final = 0x7FFF_FF7F
"""The bits of a class's number; the others are set in that of a set of ports."""


def class_numbers(texts: Iterable[str], taken: Container[int] = ()) -> dict[str, int]:
    """Return a number for the text of each class, none of those that are taken."""
    return _numbered(texts, 0, taken)


def port_set_numbers(texts: Iterable[str], taken: Container[int] = ()) -> dict[str, int]:
    """Return a number for the text of each set of ports, none of those that are taken. No class has the same, in either
    order of its bytes."""
    return _numbered(texts, ~CLASS & 0xFFFF_FFFF, taken)


def swapped(number: int) -> int:
    """Return a number with the order of its bytes reversed, as nft(8) does for some look-ups (elements.py)."""
    return int.from_bytes(number.to_bytes(4, "big"), "little")


def _numbered(texts: Iterable[str], always: int, others: Container[int] = ()) -> dict[str, int]:
    """Return a hash of each text. Of two with the same, the first in the order of texts keeps it."""
    found: dict[str, int] = {}
    taken = {UNKNOWN, GRANTED}
    for text in sorted(texts):
        salt = 0
        number = _hash(text, salt) & CLASS | always
        while number in taken or number in others or swapped(number) in others:
            salt += 1
            number = _hash(text, salt) & CLASS | always
        taken |= {number, swapped(number)}
        found[text] = number
    return found


def _hash(text: str, salt: int) -> int:
    digest = blake2s(text.encode(), digest_size=4, salt=salt.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big")
