"""How published ports are written and checked: ``8080:80``, ``127.0.0.1:8443:443/tcp``, ``[::1]:53:53/udp``."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec

from insula.model.errors import Invalid
from insula.model.objects import PublishedPort
from insula.model.rules import MAX_PORT
from insula.model.units import shorten

_HINT = "write PORT:PORT, as in 8080:80, 127.0.0.1:8443:443/tcp, [::1]:53:53/udp or 20000-20999:20000-20999"


def check(published: PublishedPort) -> PublishedPort:
    """Return it with its address in canonical form. Invalid if it has ports above 65535, or no usable address."""
    if published.last > MAX_PORT or published.target + published.count - 1 > MAX_PORT:
        raise Invalid(f"{published.count} ports from {published.port} up end above {MAX_PORT}", "publish fewer")
    if published.address is None:
        return published
    try:
        address = ip_address(published.address)
    except ValueError:
        raise Invalid(f"{shorten(published.address)} is no IP address", _HINT) from None
    if address.is_unspecified:
        return msgspec.structs.replace(published, address=None)
    if address.is_multicast or address.is_link_local or (address.version == 6 and "%" in published.address):
        raise Invalid(f"ports of {address} can't be published", "use an address of the host, or leave it out")
    return msgspec.structs.replace(published, address=str(address))


def parse(text: str) -> PublishedPort:
    """Parse ``[ADDRESS:]PORT[-LAST]:PORT[-LAST][/PROTOCOL]``. An IPv6 address stands in brackets. Invalid."""
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
    wanted = PublishedPort(
        port=port,
        target=target,
        count=last - port + 1,
        protocol="udp" if protocol == "udp" else "tcp",
        address=address,
    )
    return check(wanted)


def show(published: PublishedPort) -> str:
    """Return it as it is written: ``8080:80/tcp``, or with an address ``192.0.2.1:8080:80/tcp``."""
    end = published.target + published.count - 1
    outside, inside = _span(published.port, published.last), _span(published.target, end)
    where = "" if published.address is None else f"{published.address}:"
    if ":" in where[:-1]:
        where = f"[{published.address}]:"
    return f"{where}{outside}:{inside}/{published.protocol}"


def _range(text: str, whole: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    numbers = [first, last if dash else first]
    if not all(each.isascii() and each.isdigit() and len(each) < 6 for each in numbers):
        raise Invalid(f"{shorten(whole)} can't be published", _HINT)
    low, high = (int(each) for each in numbers)
    if not 1 <= low <= high <= MAX_PORT:
        raise Invalid(f"{shorten(text)} are no ports", f"use 1 to {MAX_PORT}, the lower one first")
    return low, high


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
