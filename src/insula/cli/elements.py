"""Elements of nftables sets and maps that concern one instance, from a listing of `nft list ruleset`."""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SHOWN = 3
"""Elements of a set that are shown; of more only the number is: a load balancer's table has 1,021."""

_TABLE = re.compile(r"table (\S+ \S+) \{")
_SET = re.compile(r"(set|map) (\S+) \{")
_ELEMENTS = re.compile(r"elements = \{ ")
_EXTRAS = re.compile(r" (counter|limit|expires|timeout|comment|ct count)\b[^:]*")


def concerning(listing: str, words: Iterable[str]) -> list[str]:
    """A line for each element that has one of `words` (a device, MAC or IP address) as a whole part; "N elements" for
    each set that has many."""
    whole = re.compile(rf"(?<![\w.:])(?:{'|'.join(map(re.escape, words))})(?![\w:]|\.\d)")
    found: dict[str, list[str]] = {}
    for place, element in _elements(listing):
        if whole.search(element):
            found.setdefault(place, []).append(element)
    return [line for place, elements in found.items() for line in _lines(place, elements)]


def _lines(place: str, elements: list[str]) -> Iterator[str]:
    if len(elements) > SHOWN:
        yield f"{place:34} {len(elements):,} elements"
    else:
        yield from (f"{place:34} {element}" for element in elements)


def _elements(listing: str) -> Iterator[tuple[str, str]]:
    """The place, as "inet insula paths", and text of each element, without its counters, limits and times."""
    table = place = ""
    inside = False
    for raw in listing.splitlines():
        line = raw.strip()
        if match := _TABLE.fullmatch(line):
            table = match[1]
        elif match := _SET.fullmatch(line):
            place = f"{table} {match[2]}"
        elif inside or _ELEMENTS.match(line):
            inside = not line.endswith("}")
            for element in _ELEMENTS.sub("", line).rstrip("}, ").split(", "):
                yield place, _EXTRAS.sub("", element.strip())
