"""What the instances of a tenant may reach by name, as insulad tells it to lessor and gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import msgspec

from insula.network.names.patterns import DomainPattern
from insula.network.names.public import within

Protocol = Literal["tcp", "udp", "icmp", "icmpv6"]
CHECKED = (80, 443)
"""TCP ports whose connections go through the proxy: HTTP and HTTPS."""
MAX_PORTS = 64
"""Ports that one rule can list: each is an element for each address."""
OWN_DOMAIN = "internal"


class NameRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Connections to the hosts of a name. Without `ports`, all ports of the protocol."""

    pattern: str
    protocol: Protocol
    ports: tuple[int, ...] = ()

    @cached_property
    def parsed(self) -> DomainPattern:
        """The pattern, which was validated when the policy was made."""
        below = self.pattern.startswith("*.")
        return DomainPattern(self.pattern[2:] if below else self.pattern, below)


class DestinationRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A range of addresses, without those in `without`, and a range of ports there. Without a protocol all protocols,
    without ports all ports."""

    cidr: str
    protocol: Protocol | None = None
    ports: tuple[int, int] | None = None
    without: tuple[str, ...] = ()

    def covers(self, address: str, protocol: str, port: int | None) -> bool:
        """Whether the range lets a connection to this port pass."""
        if self.protocol not in (None, protocol):
            return False
        if self.ports is not None and (port is None or not self.ports[0] <= port <= self.ports[1]):
            return False
        return self.contains(address)

    def contains(self, address: str) -> bool:
        """Whether an address is in the range."""
        return within(address, [self.cidr]) and not within(address, self.without)


class ClientRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rules of one instance, which has `addresses`. In `open` is what other rules let it reach, without a name."""

    addresses: tuple[str, ...]
    rules: tuple[NameRule, ...]
    open: tuple[DestinationRange, ...] = ()

    def matching(self, name: str) -> list[NameRule]:
        """Return the rules that a normalised name matches."""
        return [rule for rule in self.rules if rule.parsed.matches(name)]


class OperatorRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the operator says about some destinations; "pass" leaves it to the tenant's rules."""

    action: Literal["accept", "deny", "pass"]
    range: DestinationRange


class EgressRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The rules of a tenant, by the names of its instances.

    `servers` are the upstream name servers (address and port), `own_servers` is the tenant's dnsmasq. `own` are the
    tenant's subnets and other ranges that names outside must never lead to. Of the ranges in `operator`, the first that
    contains a destination decides whether connections through the proxy reach it; others are judged by the rules of the
    tenant's namespace.
    """

    clients: dict[str, ClientRules] = {}
    servers: tuple[tuple[str, int], ...] = ()
    own_servers: tuple[tuple[str, int], ...] = ()
    own: tuple[str, ...] = ()
    operator: tuple[OperatorRange, ...] = ()

    @cached_property
    def by_address(self) -> dict[str, str]:
        """The instance that has an address."""
        return {address: name for name, client in self.clients.items() for address in client.addresses}


class Destination(NamedTuple):
    """What an element of a set lets pass. Without a port, all of the protocol; `checked` by the proxy."""

    protocol: str
    port: int | None
    checked: bool


def destinations(
    rules: Sequence[NameRule], client: ClientRules, address: str, operator: Sequence[OperatorRange] = ()
) -> set[Destination]:
    """Return what these rules of a client let pass to an address.

    Ports 80 and 443 are checked, unless another rule or the operator opens them for the address anyway.
    """

    def found() -> Iterator[Destination]:
        for rule in rules:
            if rule.protocol in ("icmp", "icmpv6"):
                if (rule.protocol == "icmpv6") == (":" in address):
                    yield Destination(rule.protocol, None, False)
                continue
            ports = rule.ports or (None,)
            for port in ports:
                if not (rule.protocol == "tcp" and port in CHECKED):
                    yield Destination(rule.protocol, port, False)
            for port in CHECKED if rule.protocol == "tcp" else ():
                action = next((each.action for each in operator if each.range.covers(address, "tcp", port)), "pass")
                if action != "deny" and (port in ports or not rule.ports):
                    anyway = action == "accept" or any(each.covers(address, "tcp", port) for each in client.open)
                    yield Destination("tcp", port, not anyway)

    return set(found())


def is_own(name: str) -> bool:
    """Whether a normalised name is the tenant's own, which its dnsmasq answers and never forwards."""
    return "." not in name or name.endswith(f".{OWN_DOMAIN}")
