"""The addresses of one tenant that the elements of its maps are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from insula.network.intent import TenantIntent


@dataclass(frozen=True)
class OutsideAddresses:
    """`uplink` is the name of the tenant's uplink on the host, `own` the addresses of its other end, by IP version.

    `hosts` are the host's own addresses, without loopback ones, and `transits` the tenant's transit addresses by the
    host's address.
    """

    uplink: str
    own: Mapping[int, str]
    hosts: Sequence[str]
    transits: Mapping[str, str]


def needs_transit(intent: TenantIntent) -> set[str]:
    """Return the addresses of the host that the tenant's ports and balancers name, and which need transit addresses.

    A floating address is routed to the tenant, and an internal one never leaves it.
    """
    floating = {each.address for each in intent.outside.floating}
    named = {each.published.address for each in intent.outside.forwards}
    listeners = [each for balancer in intent.outside.balancers for each in balancer.listeners]
    named |= {each.address for each in listeners if each.network is None}
    return {address for address in named if address is not None} - floating


def uses_loopback(intent: TenantIntent) -> set[int]:
    """Return the IP versions of which the host's loopback addresses lead to the tenant."""
    listeners = [each for balancer in intent.outside.balancers for each in balancer.listeners if not each.network]
    named = [each.published.address for each in intent.outside.forwards] + [each.address for each in listeners]
    found = set()
    for address in named:
        if address is None:
            found |= {4, 6}
        elif ip_address(address).is_loopback:
            found.add(version(address))
    return found


def outside_of(intent: TenantIntent, addresses: Sequence[str]) -> list[str]:
    """Return the addresses that are in none of the tenant's networks, where they mean something else."""
    subnets = [ip_network(each) for network in intent.networks for each in (network.subnet, network.subnet6) if each]
    return [each for each in addresses if not any(ip_address(each) in subnet for subnet in subnets)]


def version(address: str) -> int:
    """Return the IP version of an address or subnet."""
    return 6 if ":" in address else 4
