"""Ranges of addresses as numbers, as texts, and in CIDR notation."""

from __future__ import annotations

import functools
import socket
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from insula.network.interpreter.space import BITS, NumberRange


@functools.lru_cache(maxsize=4096)
def range_of(cidr: str) -> NumberRange:
    """Return the addresses of a range in CIDR notation."""
    network: IPv4Network | IPv6Network = ip_network(cidr)
    return NumberRange(int(network[0]), int(network[-1]))


def number_of(address: str) -> int:
    """Return an address as a number. ipaddress takes ten times as long."""
    return int.from_bytes(socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address), "big")


def overlap(one: NumberRange, other: NumberRange) -> bool:
    """Whether two ranges have an address in common."""
    return one.low <= other.high and other.low <= one.high


def contains(outer: NumberRange, inner: NumberRange) -> bool:
    """Whether all addresses of one range are in another."""
    return outer.low <= inner.low and inner.high <= outer.high


@functools.lru_cache(maxsize=8192)
def address_text(version: int, address: int) -> str:
    """Return an address as text."""
    return str(ip_address(address.to_bytes(BITS[version] // 8, "big")))
