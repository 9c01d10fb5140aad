"""Names, sizes and durations as people write them, parsed strictly.

Sizes are bytes with binary suffixes (``64m`` is 64 MiB), CPUs are decimal fractions of one CPU,
durations are seconds. Anything else raises `Invalid` with a hint.
"""

from __future__ import annotations

import re

from insula.model.errors import Invalid

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)i?b?", re.IGNORECASE)
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)(?:bit)?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?")
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECONDS = {"ms": 0.001, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX = (1 << 63) - 1


def check_label(kind: str, name: str) -> str:
    """`name` if it is a DNS label (RFC 1123: 1 to 63 of a-z, 0-9 and inner hyphens), else `Invalid`."""
    if not isinstance(name, str) or not _LABEL.fullmatch(name):
        raise Invalid(
            f"{kind} name {shorten(name)} is not a DNS label",
            "use 1 to 63 characters of a-z, 0-9 and '-', with no '-' at either end",
        )
    return name


def parse_size(text: str) -> int:
    """Bytes from ``64m``, ``1.5g``, ``512KiB`` or plain digits."""
    match = _SIZE.fullmatch(text.strip())
    if not match or (value := int(float(match[1]) * _BINARY[match[2].lower()])) > _MAX:
        raise Invalid(f"size {shorten(text)} does not parse", "write bytes with k, m, g or t, as in 64m or 1.5g")
    return value


def parse_rate(text: str) -> int:
    """Bits a second from ``10m``, ``1gbit`` or plain digits (decimal suffixes, as tc(8) has them)."""
    match = _RATE.fullmatch(text.strip())
    if not match or (value := int(float(match[1]) * _DECIMAL[match[2].lower()])) > _MAX:
        raise Invalid(f"rate {shorten(text)} does not parse", "write bits a second with k, m or g, as in 10m or 1gbit")
    return value


def parse_cpus(text: str) -> float:
    """A number of CPUs such as ``0.5`` or ``2``, at least 0.01."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 65536:
        raise Invalid(f"CPU count {shorten(text)} does not parse", "write CPUs from 0.01 up, as in 0.5 or 2")
    return value


def parse_duration(text: str) -> float:
    """Seconds from ``10``, ``1.5s``, ``200ms``, ``5m`` or ``1h``."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise Invalid(f"duration {shorten(text)} does not parse", "write seconds, or use ms, s, m, h, as in 10s")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(value: int) -> str:
    """``1.5G`` for people; exact multiples have no fraction."""
    size = float(value)
    suffixes = "BKMGT"
    while abs(size) >= 1024 and len(suffixes) > 1:
        size /= 1024
        suffixes = suffixes[1:]
    return f"{size:.0f}{suffixes[0]}" if size == int(size) or size >= 100 else f"{size:.1f}{suffixes[0]}"


def shorten(value: object, limit: int = 60) -> str:
    """`value` quoted for an error message: escaped, so that it stays one line, and never long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 4] + "...'"
