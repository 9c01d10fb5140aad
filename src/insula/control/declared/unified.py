"""Unified diffs (diff(1), -u) of the lines of documents, in linear time and of bounded size.

difflib takes quadratic time or more, and the lines are a tenant's. So it compares only what is between the lines in
common at both ends, if that is short; else the diff has all the old lines and then all the new ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import takewhile

CONTEXT = 3
_SHORT = 60  # lines that difflib compares
_LONGEST = 300  # characters of a line
_MOST = 16384  # characters of a diff


def unified(before: Sequence[str], after: Sequence[str], old: str, new: str) -> list[str]:
    """Return the lines of a diff, without line ends; none if nothing differs. What is too long is cut off."""
    if before == after:
        return []
    start = _common(before, after)
    end = _common(before[start:][::-1], after[start:][::-1])
    head, tail = before[max(0, start - CONTEXT) : start], before[len(before) - end :][:CONTEXT]
    removed, added = before[start : len(before) - end], after[start : len(after) - end]
    compared = _changed if len(removed) + len(added) <= _SHORT else _all_of
    changed = [*compared(removed, added)]
    first = start - len(head) + 1
    sizes = len(head) + len(tail) + len(removed), len(head) + len(tail) + len(added)
    whole = [f"--- {old}", f"+++ {new}", f"@@ -{_range(first, sizes[0])} +{_range(first, sizes[1])} @@"]
    whole += [*(" " + line for line in head), *changed, *(" " + line for line in tail)]
    return _cut(whole)


def _all_of(removed: Sequence[str], added: Sequence[str]) -> Iterator[str]:
    yield from ("-" + line for line in removed)
    yield from ("+" + line for line in added)


def _changed(removed: Sequence[str], added: Sequence[str]) -> Iterator[str]:
    for tag, a, b, c, d in difflib.SequenceMatcher(None, removed, added, autojunk=False).get_opcodes():
        yield from (" " + line for line in removed[a:b]) if tag == "equal" else _all_of(removed[a:b], added[c:d])


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many lines at the beginning are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _range(first: int, size: int) -> str:
    return f"{first if size else 0},{size}"


def _cut(lines: Sequence[str]) -> list[str]:
    found: list[str] = []
    size = 0
    for line in lines:
        short = line if len(line) <= _LONGEST else line[:_LONGEST] + " [cut off]"
        size += len(short)
        if size > _MOST:
            return [*found, "[cut off]"]
        found.append(short)
    return found
