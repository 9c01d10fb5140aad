"""`[network]` of insulad.toml: the settings of tenants' networks on this host, and the checks of their values."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

import msgspec

from insula.model.errors import Invalid
from insula.model.rules import MAX_BANDWIDTH
from insula.model.units import parse_duration, parse_rate, shorten

_MAX_RESOLVERS = 8
_MAX_RANGES = 64
_POOL = "as in 203.0.113.64/26"
_LEAST_VERIFY = 1.0  # seconds
_LEAST_LINK = 1_000_000  # bits a second
_UPLINK_BITS = 1  # each tenant has two addresses of each range


class NetworkSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[network]`: ranges of the uplinks' addresses, and the upstream name servers. None: the host's. `link` is the
    bandwidth of this host in each direction, as in "10gbit"; "auto" has it measured. `floating` are the ranges of the
    pool of external addresses, which are routed to this host, or are in one of its own networks. `verify` is how often
    the installed state of all tenants is proven, as in "1m", or "off"; `repair` is whether what is found is installed
    again at once."""

    range4: str = "100.64.0.0/10"
    range6: str = "fd69:6e73:756c:6100::/64"
    resolvers: list[str] | None = None
    link: str = "auto"
    floating: list[str] = []
    verify: str = "off"
    repair: bool = False

    @property
    def link_bits(self) -> int | None:
        return None if self.link == "auto" else parse_rate(self.link)

    @property
    def verify_seconds(self) -> float | None:
        return None if self.verify == "off" else parse_duration(self.verify)


def check_network(network: NetworkSettings, wrong: Callable[..., Invalid]) -> None:
    """Check the values. Raises what `wrong` returns for a key, a value, what is wrong and a hint."""
    _check_range("range4", network.range4, IPv4Network, wrong)
    _check_range("range6", network.range6, IPv6Network, wrong)
    if len(network.resolvers or ()) > _MAX_RESOLVERS:
        raise wrong("network.resolvers", network.resolvers, "are too many", f"name at most {_MAX_RESOLVERS}")
    for text in network.resolvers or ():
        _check_resolver(text, wrong)
    _check_link(network, wrong)
    _check_floating(network, wrong)
    _check_verify(network, wrong)


def _check_verify(network: NetworkSettings, wrong: Any) -> None:
    try:
        seconds = network.verify_seconds
    except Invalid as error:
        raise wrong("network.verify", network.verify, "is no duration", error.hint or "as in 1m, or off") from None
    if seconds is not None and seconds < _LEAST_VERIFY:
        raise wrong("network.verify", network.verify, "is too short", f"use {_LEAST_VERIFY:.0f} s or more, or off")


def _check_link(network: NetworkSettings, wrong: Any) -> None:
    try:
        bits = network.link_bits
    except Invalid as error:
        raise wrong("network.link", network.link, "is no rate", error.hint or "as in 10gbit") from None
    if bits is not None and not _LEAST_LINK <= bits <= MAX_BANDWIDTH:
        raise wrong("network.link", network.link, "is out of bounds", "1mbit to 400gbit")


def _check_floating(network: NetworkSettings, wrong: Any) -> None:
    if len(network.floating) > _MAX_RANGES:
        raise wrong("network.floating", network.floating, "are too many", f"name at most {_MAX_RANGES}")
    uplinks = [ip_network(network.range4), ip_network(network.range6)]
    found: list[IPv4Network | IPv6Network] = []
    for text in network.floating:
        try:
            one = ip_network(text)
        except ValueError as error:
            raise wrong("network.floating", text, f"is no network: {shorten(str(error), 100)}", _POOL) from None
        if one.prefixlen < 8 or one.is_multicast or one.is_loopback or one.is_link_local or one.is_unspecified:
            raise wrong("network.floating", text, "can't hold external addresses", _POOL)
        if any(one.version == each.version and one.overlaps(each) for each in (*uplinks, *found)):
            raise wrong("network.floating", text, "overlaps another range, or the uplinks", _POOL)
        found.append(one)


def _check_range(key: str, text: str, kind: type[IPv4Network] | type[IPv6Network], wrong: Any) -> None:
    usual = getattr(NetworkSettings(), key)
    key = f"network.{key}"
    try:
        network = kind(text)
    except ValueError as error:
        raise wrong(key, text, f"is no network: {shorten(str(error), 100)}", f"as in {usual}") from None
    if network.max_prefixlen - network.prefixlen < _UPLINK_BITS:
        raise wrong(key, text, "has no room for a tenant", "each needs two addresses")
    if network.prefixlen == 0 or network.is_multicast or network.is_loopback or network.is_link_local:
        raise wrong(key, text, "can't hold addresses of hosts", f"as in {usual}")


def _check_resolver(text: str, wrong: Any) -> None:
    try:
        address = ip_address(text)
    except ValueError:
        raise wrong("network.resolvers", text, "is no IP address", "as in 192.0.2.53") from None
    if address.is_loopback or address.is_multicast or address.is_unspecified or "%" in text:
        raise wrong("network.resolvers", text, "can't be asked by tenants", "name a server on the network")
    if not isinstance(address, IPv4Address) and address.is_link_local:
        raise wrong("network.resolvers", text, "can't be asked by tenants", "name a server on the network")
