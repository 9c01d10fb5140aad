"""The value of a header field in every packet class, as ranges of values with the set of classes that have them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple


class Hit(NamedTuple):
    """The classes for which a condition certainly holds, and those for which it may hold."""

    must: int
    may: int


class Symbolic:
    """A field of `length` bytes. Each class is in one of `parts` (lowest value, highest value, classes), or in
    `unknown`, where the field may have any value. A range stands for one value in it, which the class leaves open.
    The classes in `several` are in more than one part: the field may have any of these values.
    Packets of the other classes don't have the field, so no condition on it holds for them.

    Values are numbers in the order of the bytes in memory. Instances don't change.
    """

    __slots__ = ("_at", "_ranges", "_starts", "length", "parts", "several", "unknown")

    def __init__(
        self, length: int, parts: Iterable[tuple[int, int, int]] = (), unknown: int = 0, several: int = 0
    ) -> None:
        self.length = length
        merged: dict[tuple[int, int], int] = {}
        for low, high, bits in parts:
            if bits:
                key = low, high
                merged[key] = merged[key] | bits if key in merged else bits
        self.parts = [(low, high, bits) for (low, high), bits in merged.items()]
        if len(self.parts) > 1:
            self.parts.sort()
        self.unknown = unknown
        self.several = several
        self._at: dict[int, int] | None = None

    def _index(self) -> dict[int, int]:
        """Return the classes of single values; made when it is needed first."""
        self._ranges = [part for part in self.parts if part[0] != part[1]]
        self._at = {low: bits for low, high, bits in self.parts if low == high}
        self._starts = [*self._at]
        return self._at

    def single(self) -> dict[int, int] | None:
        """Return the classes of each value, if all are single and no class has several; else None. Then `within` a
        range of one value are these classes, and may be the unknown ones."""
        at = self._index() if self._at is None else self._at
        return None if self._ranges or self.several else at

    @classmethod
    def constant(cls, length: int, value: int, bits: int) -> Symbolic:
        return cls(length, [(value, value, bits)])

    @property
    def present(self) -> int:
        """The classes that have the field."""
        found = self.unknown
        for _, _, bits in self.parts:
            found |= bits
        return found

    def within(self, low: int, high: int) -> Hit:
        """Return the classes whose value is in this range."""
        at = self._index() if self._at is None else self._at
        must = at.get(low, 0) if low == high else 0
        if low == high and not self._ranges and not self.several:
            return Hit(must, must | self.unknown)
        if low != high:
            for value in self._starts[bisect_left(self._starts, low) :]:
                if value > high:
                    break
                must |= at[value]
        may = must | self.unknown
        for first, last, bits in self._ranges:
            if first > high:
                break
            if last >= low:
                may |= bits
                if low <= first and last <= high:
                    must |= bits
        if must & self.several:
            must &= ~(self.several if low == high else self.unknown & self.several)
            for first, last, bits in self.parts if low < high else ():
                if first < low or last > high:
                    must &= ~(bits & self.several)
        return Hit(must, may)

    def slice(self, start: int, length: int) -> Symbolic:
        """Return the field that consists of some bytes of this one."""
        if start == 0 and length == self.length:
            return self
        after, top = 8 * (self.length - start - length), 1 << 8 * length
        parts, unknown = [], self.unknown
        for low, high, bits in self.parts:
            first, last = low >> after, high >> after
            if first // top == last // top:
                parts.append((first % top, last % top, bits))
            else:
                unknown |= bits
        return Symbolic(length, parts, unknown, self.several)

    def masked(self, mask: int, xor: int) -> Symbolic:
        """Return the field with every value `value & mask ^ xor`."""
        everything = (1 << 8 * self.length) - 1
        hole = everything ^ mask
        whole = hole & (hole + 1) == 0  # a prefix: order is kept
        parts, unknown = [], self.unknown
        for low, high, bits in self.parts:
            if low == high:
                value = low & mask ^ xor
                parts.append((value, value, bits))
            elif whole and xor == 0:
                parts.append((low & mask, high & mask, bits))
            else:
                unknown |= bits
        return Symbolic(self.length, parts, unknown, self.several)

    def swapped(self, size: int) -> Symbolic:
        """Return the field with the bytes of each group of `size` in the opposite order."""
        parts, unknown = [], self.unknown
        for low, high, bits in self.parts:
            if low != high:
                unknown |= bits
                continue
            data = low.to_bytes(self.length, "big")
            turned = b"".join(data[at : at + size][::-1] for at in range(0, self.length, size))
            value = int.from_bytes(turned, "big")
            parts.append((value, value, bits))
        return Symbolic(self.length, parts, unknown, self.several)

    def assigned(self, hit: Hit, value: Symbolic) -> Symbolic:
        """Return the field after an assignment of `value` to the classes of `hit`; where it is uncertain whether it
        took place, the field may have either value."""
        parts = [(low, high, bits & ~hit.must) for low, high, bits in self.parts]
        parts += [(low, high, bits & hit.may) for low, high, bits in value.parts]
        several = self.several & ~hit.must | value.several & hit.may | hit.may & ~hit.must
        return Symbolic(self.length, parts, self.unknown & ~hit.must | value.unknown & hit.may, several)

    def only(self, bits: int) -> list[tuple[int, int, int]]:
        """Return the parts that have some of these classes, reduced to them."""
        return [(low, high, found) for low, high, have in self.parts if (found := have & bits)]
