"""Whether the rules permit a connection or a lease, apart from which leases there are."""

from __future__ import annotations

from insula.network.names.public import is_public
from insula.network.names.rules import ClientRules, EgressRules, destinations


def may_lease(rules: EgressRules, client: ClientRules, address: str) -> bool:
    """Whether an address can be leased to a client: it is public, not of the tenant's own ranges, and the client has an
    address of that version of IP."""
    if not any((":" in each) == (":" in address) for each in client.addresses):
        return False
    return is_public(address, rules.own)


def permits(rules: EgressRules, client: str, address: str, port: int, name: str) -> bool:
    """Whether a client may connect to a name at an address and TCP port, if the address is leased for the name."""
    found = rules.clients.get(client)
    if found is None or not may_lease(rules, found, address):
        return False
    wanted = destinations(found.matching(name), found, address, rules.operator)
    return any(each.protocol == "tcp" and each.port in (None, port) for each in wanted)
