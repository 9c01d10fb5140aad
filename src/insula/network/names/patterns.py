"""The names of egress rules: ``api.example.com``, or ``*.example.com`` for every name below example.com.

`*.example.com` covers any depth, and not example.com itself (as in Cilium's `**.`, and unlike certificates, where it is
one label). Queries of DNS and server names of TLS and HTTP are matched by the same function. Names outside ASCII are
written in Unicode or in their ASCII form (RFC 5891); the ASCII form is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address
from typing import NamedTuple

from insula.model.errors import Invalid
from insula.model.units import shorten

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_HINT = "write a DNS name as in api.example.com, or *.example.com for all names below example.com"
_AMBIGUOUS = re.compile("[ßς\u200c\u200d]")
"""Characters whose ASCII form differs between IDNA 2003, which Python has, and IDNA 2008 (UTS 46, 7)."""
_FEWEST_LABELS = 2  # of a wildcard's base: "*.com" would be the whole internet


class DomainPattern(NamedTuple):
    """A name in lower case without a dot at the end, and whether the names below it are meant instead of itself."""

    name: str
    below: bool

    def __str__(self) -> str:
        return f"*.{self.name}" if self.below else self.name

    def matches(self, name: str) -> bool:
        """Whether a normalised name is one of the pattern's."""
        return name.endswith(f".{self.name}") if self.below else name == self.name


def parse_pattern(text: str) -> DomainPattern:
    """Parse and normalise a pattern. `Invalid` if it is no name, an address, or a wildcard of a top-level domain."""
    below = text.startswith("*.")
    name = text[2:] if below else text
    if "*" in name:
        raise Invalid(f"{shorten(text)} has a * inside", _HINT)
    if (found := normalise(name)) is None:
        raise Invalid(f"{shorten(text)} is not a DNS name", _HINT)
    if _is_address(found):
        raise Invalid(f"{shorten(text)} is an address", "write addresses as CIDR, as in 203.0.113.7/32")
    labels = found.split(".")
    if below and len(labels) < _FEWEST_LABELS:
        raise Invalid(f"{shorten(text)} is every name of a top-level domain", _HINT)
    if labels[-1] == "internal" or (len(labels) == 1 and not below):
        raise Invalid(f"{shorten(text)} is a name of the tenant's own", "select own instances by their labels")
    return DomainPattern(found, below)


def normalise(name: str) -> str | None:
    """Return a name in lower-case ASCII without a dot at the end; None if it is not a host's name.

    Underscores are allowed (RFC 8552).
    """
    if not name.isascii():
        if len(name) > 255 or _AMBIGUOUS.search(name):
            return None
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            return None
    name = name.lower().removesuffix(".")
    if not 0 < len(name) <= 253 or not all(map(_LABEL.fullmatch, name.split("."))):
        return None
    return name


def matching(patterns: Iterable[DomainPattern], name: str) -> list[DomainPattern]:
    """Return the patterns that match a normalised name."""
    return [pattern for pattern in patterns if pattern.matches(name)]


def _is_address(name: str) -> bool:
    """Whether a name is an IPv4 address, also in the odd forms of inet_aton(3): its last label is a number."""
    try:
        ip_address(name)
    except ValueError:
        return re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]) is not None
    return True
