"""Where a request comes from, as far as many requests are counted together."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network

from insula.api.peer import Peer
from insula.api.tls.record import ClientRecord

_BITS = {4: 24, 6: 64}  # what one customer has, or one link


def network_of(client: ClientRecord | None, peer: Peer | None) -> str:
    """Return the source of a request: the network of an address, 24 bits of IPv4 or 64 of IPv6, or a user of the host.
    An IPv4 address that is mapped to IPv6 (RFC 4291, 2.5.5.2) is an IPv4 one."""
    if client is None:
        return f"uid {peer.uid}" if peer is not None else "nobody"
    return network_of_address(client.address)


def network_of_address(text: str) -> str:
    """Return the network that counts as one source for an address of IPv4 or IPv6."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(ip_network((address, _BITS[address.version]), strict=False))
