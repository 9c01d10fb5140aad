"""How published ports are written and checked: ``8080:80``, ``127.0.0.1:8443:443/tcp``, ``[::1]:53:53/udp``."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from insula.model.errors import Invalid
from insula.model.rules import MAX_PORT
from insula.model.units import shorten

_HINT = "write PORT:PORT, as in 8080:80, 127.0.0.1:8443:443/tcp, [::1]:53:53/udp or 20000-20999:20000-20999"


def check_ports(port: int, target: int, count: int) -> None:
    """Raise Invalid if there are ports above 65535."""
    if port + count - 1 > MAX_PORT or target + count - 1 > MAX_PORT:
        raise Invalid(f"{count} ports from {port} up end above {MAX_PORT}", "publish fewer")


def check_address(text: str | None) -> str | None:
    """Return an address in canonical form; None for 0.0.0.0 and [::], which are every address. Invalid."""
    if text is None:
        return None
    try:
        address = ip_address(text)
    except ValueError:
        raise Invalid(f"{shorten(text)} is no IP address", _HINT) from None
    if address.is_unspecified:
        return None
    if address.is_multicast or address.is_link_local or "%" in text:
        raise Invalid(f"ports of {address} can't be published", "use an address of the host, or leave it out")
    return str(address)


def parse(text: str) -> dict[str, Any]:
    """Parse ``[ADDRESS:]PORT[-LAST]:PORT[-LAST][/PROTOCOL]``. An IPv6 address stands in brackets.

    Return the fields of a `PublishedPort`; this module does not import it, since each command loads it. Invalid.
    """
    ports, slash, protocol = text.partition("/")
    address: str | None = None
    if ports.startswith("["):
        address, closed, ports = ports[1:].partition("]:")
        if not closed:
            raise Invalid(f"{shorten(text)} can't be published", _HINT)
    elif ports.count(":") == 2:
        address, _, ports = ports.partition(":")
    outside, colon, inside = ports.partition(":")
    if not colon or (slash and protocol not in ("tcp", "udp")):
        raise Invalid(f"{shorten(text)} can't be published", _HINT)
    (port, last), (target, end) = _range(outside, text), _range(inside, text)
    if last - port != end - target:
        raise Invalid(f"{shorten(text)} has {last - port + 1} ports outside and {end - target + 1} inside", _HINT)
    return {
        "port": port,
        "target": target,
        "count": last - port + 1,
        "protocol": protocol or "tcp",
        "address": check_address(address),
    }


def show(port: int, target: int, count: int, protocol: str, address: str | None) -> str:
    """Return them as they are written: ``8080:80/tcp``, or with an address ``192.0.2.1:8080:80/tcp``."""
    where = "" if address is None else f"[{address}]:" if ":" in address else f"{address}:"
    return f"{where}{_span(port, count)}:{_span(target, count)}/{protocol}"


def _range(text: str, whole: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    numbers = [first, last if dash else first]
    if not all(each.isascii() and each.isdigit() and len(each) < 6 for each in numbers):
        raise Invalid(f"{shorten(whole)} can't be published", _HINT)
    low, high = (int(each) for each in numbers)
    if not 1 <= low <= high <= MAX_PORT:
        raise Invalid(f"{shorten(text)} are no ports", f"use 1 to {MAX_PORT}, the lower one first")
    return low, high


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"
