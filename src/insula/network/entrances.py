"""External addresses and ports that lead to an instance, by published ports, floating addresses and balancers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from insula.network.fabric import Entries
from insula.network.intent import OutsideIntent


class Entrance(NamedTuple):
    """An external `address` and `port`. `inner` is the address that the host sends such packets to the tenant with."""

    words: str
    address: str
    inner: str
    port: int


def entrances(outside: OutsideIntent, entries: Entries, target: str, protocol: str, port: int) -> Iterator[Entrance]:
    """Return what leads from the outside to a port of `target`, an address of an instance."""
    for forward in outside.forwards:
        published, number = forward.published, port - forward.published.target
        if published.protocol == protocol and target in forward.addresses and 0 <= number < published.count:
            external = published.port + number
            words = f"port {external} of {_place(published.address)} is published, and leads to it"
            yield from _entrances(entries, published.address, target, external, words)
    for floating in outside.floating:
        if floating.target == target:
            words = f"the floating address {floating.address} leads to it"
            yield Entrance(words, floating.address, floating.address, port)
    for balancer in outside.balancers:
        for listener in balancer.listeners:
            if listener.network is None and listener.protocol == protocol and (target, port) in balancer.backends:
                words = f"a load balancer at port {listener.port} of {_place(listener.address)} leads to it"
                yield from _entrances(entries, listener.address, target, listener.port, words)


def _place(address: str | None) -> str:
    return address or "the host"


def _entrances(entries: Entries, address: str | None, target: str, port: int, words: str) -> Iterator[Entrance]:
    if address is not None:
        if (":" in address) == (":" in target):
            yield Entrance(words, address, entries.transits.get(address, address), port)
        return
    hosts, own = ([each for each in some if (":" in each) == (":" in target)] for some in (entries.hosts, entries.own))
    if hosts and own:
        yield Entrance(words, hosts[0], own[0], port)
