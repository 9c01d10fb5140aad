"""Parse names, sizes and durations strictly.

Sizes are bytes with binary suffixes (``64m`` is 64 MiB), CPUs are decimal fractions of one CPU, and durations are
seconds, written with units (``1m30s``) or without. Anything else raises `Invalid` with a hint.
"""

from __future__ import annotations

from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re

_SIZE = r"(?i:([0-9]+(?:\.[0-9]+)?)([kmgt]?)i?b?)"
_RATE = r"(?i:([0-9]+(?:\.[0-9]+)?)([kmgt]?)(?:bit)?)"
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_DURATION = _NUMBER + "|(?=.)" + "".join(f"(?:{_NUMBER}{unit})?" for unit in ("d", "h", "m", "s", "ms"))
_REAL_TIME = r"(?a:SIGRT(MIN\+|MAX-)([0-9]{1,2}))"
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECONDS = (1.0, 86400.0, 3600.0, 60.0, 1.0, 0.001)  # of the groups of _DURATION
_MAX_DURATION = 1e10  # seconds: three hundred years
_MAX = (1 << 63) - 1024  # the greatest float below 2^63


def _match(pattern: str, text: str) -> re.Match[str] | None:
    """Call re.fullmatch(), imported only when it is needed: the command line starts 6 ms faster without it."""
    import re

    return re.fullmatch(pattern, text)


def check_label(kind: str, name: str) -> str:
    """Return `name` if it is a DNS label (RFC 1123: 1 to 63 of a-z, 0-9 and inner hyphens), else raise `Invalid`."""
    from insula.model.rules import LABEL  # most verbs of the command line check nothing

    if not isinstance(name, str) or not _match(LABEL, name):
        raise Invalid(
            f"{kind} name {shorten(name)} is not a DNS label",
            "use 1 to 63 characters of a-z, 0-9 and '-', with no '-' at either end",
        )
    return name


def parse_size(text: str) -> int:
    """Parse bytes, written as ``64m``, ``1.5g``, ``512KiB`` or plain digits."""
    match = _match(_SIZE, text.strip())
    if not match or (value := float(match[1]) * _BINARY[match[2].lower()]) > _MAX:
        raise Invalid(f"{shorten(text)} is not a size", "write bytes, or use k, m, g or t, as in 64m or 1.5g")
    return int(value)


def parse_rate(text: str) -> int:
    """Parse bits a second, written as ``10m``, ``1gbit`` or plain digits (decimal suffixes, as in tc(8))."""
    match = _match(_RATE, text.strip())
    if not match or (value := float(match[1]) * _DECIMAL[match[2].lower()]) > _MAX:
        raise Invalid(f"{shorten(text)} is not a rate", "write bits a second with k, m or g, as in 10m or 1gbit")
    return int(value)


def parse_cpus(text: str) -> float:
    """Parse a number of CPUs such as ``0.5`` or ``2``, at least 0.01."""
    from insula.model.rules import MAX_CPUS, MIN_CPUS

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not MIN_CPUS <= value <= MAX_CPUS:
        raise Invalid(f"{shorten(text)} is not a number of CPUs", f"write {MIN_CPUS} to {MAX_CPUS}, as in 0.5 or 2")
    return value


def parse_duration(text: str) -> float:
    """Parse seconds, written as ``10``, ``1.5s``, ``200ms``, ``1h30m`` or ``2d``: each unit once, the longest first."""
    match = _match(_DURATION, text.strip())
    value = sum(float(n) * unit for n, unit in zip(match.groups(), _SECONDS, strict=True) if n) if match else -1.0
    if not 0 <= value <= _MAX_DURATION:
        raise Invalid(
            f"{shorten(text)} is not a duration", "write seconds, or use d, h, m, s and ms, as in 10s or 1m30s"
        )
    return value


def parse_signal(text: str) -> int:
    """Parse a signal: ``SIGTERM``, ``term``, ``15``, ``SIGRTMIN+3`` or ``rtmax-1``, all names of signal(7) in any case.

    Returns its number. Invalid.
    """
    import signal

    name = text.upper()
    if name.isascii() and name.isdigit() and len(name) <= 4 and int(name) in signal.valid_signals():
        return int(name)
    name = f"SIG{name.removeprefix('SIG')}"
    if match := _match(_REAL_TIME, name):
        base = signal.SIGRTMIN if match[1] == "MIN+" else signal.SIGRTMAX
        number = base + int(match[2]) if match[1] == "MIN+" else base - int(match[2])
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return number
    found = getattr(signal, "SIGSYS" if name == "SIGUNUSED" else name, None) if name[3:].isalnum() else None
    if not isinstance(found, int):
        raise Invalid(f"there is no signal {shorten(text)}", "signal(7) lists them, as in SIGTERM, 15 or SIGRTMIN+3")
    return int(found)


def format_size(value: int) -> str:
    """Format bytes for people, as ``1.5G``; exact multiples have no fraction."""
    size = float(value)
    suffixes = "BKMGT"
    while abs(size) >= 1024 and len(suffixes) > 1:
        size /= 1024
        suffixes = suffixes[1:]
    return f"{size:.0f}{suffixes[0]}" if size == int(size) or size >= 100 else f"{size:.1f}{suffixes[0]}"


def format_rate(bits: int) -> str:
    """Format bits a second for people, as ``1.5gbit``: with three decimals, rounded down."""
    for unit, name in ((10**9, "gbit"), (10**6, "mbit"), (10**3, "kbit")):
        if bits >= unit:
            return f"{bits * 1000 // unit / 1000:.10g}{name}"
    return f"{bits}bit"


def shorten(value: object, limit: int = 60) -> str:
    """Quote `value` for an error message: escaped, so that it stays on one line, and shortened."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 4] + "...'"
