"""The sets of leases in the tenant's table, and their elements as the kernel has them.

`leases4` and `leases6` have instance, destination, protocol and port; `lease_protocols4` and `lease_protocols6` have
no port and mean all of the protocol; `checked4` and `checked6` have instance, destination and TCP port of connections
that go through the proxy. The comment of an element has the names that it was leased for.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, NamedTuple

from insula.network.names.rules import Destination

KINDS: Final = ("leases", "lease_protocols", "checked")
SETS: Final = tuple(f"{kind}{version}" for kind in KINDS for version in (4, 6))
PROTOCOLS: Final = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}
_NUMBERS: Final = {number: name for name, number in PROTOCOLS.items()}
MAX_COMMENT: Final = 240  # bytes; the kernel keeps 256 with headers (NFT_USERDATA_MAXLEN)


class LeaseElement(NamedTuple):
    """An element: what of an address is leased to the address of a client."""

    source: str
    address: str
    destination: Destination

    @property
    def set(self) -> str:
        """The name of its set."""
        version = 6 if ":" in self.source else 4
        if self.destination.checked:
            return f"checked{version}"
        return f"lease_protocols{version}" if self.destination.port is None else f"leases{version}"

    @property
    def key(self) -> bytes:
        """The kernel's key: each part is padded to four bytes."""
        family = AF_INET6 if ":" in self.source else AF_INET
        key = inet_pton(family, self.source) + inet_pton(family, self.address)
        protocol, port, checked = self.destination
        if not checked:
            key += bytes((PROTOCOLS[protocol], 0, 0, 0))
        return key if port is None else key + port.to_bytes(2, "big") + bytes(2)


def element_of(set_: str, key: bytes) -> LeaseElement | None:
    """Return the element with this key in a set; None if its protocol is unknown."""
    kind, six = set_[:-1], set_.endswith("6")
    family, length = (AF_INET6, 16) if six else (AF_INET, 4)
    source, address, rest = key[:length], key[length : 2 * length], key[2 * length :]
    if kind == "checked":
        destination = Destination("tcp", int.from_bytes(rest[:2], "big"), True)
    elif rest[0] not in _NUMBERS:
        return None
    else:
        port = int.from_bytes(rest[4:6], "big") if kind == "leases" else None
        destination = Destination(_NUMBERS[rest[0]], port, False)
    return LeaseElement(inet_ntop(family, source), inet_ntop(family, address), destination)


def comment_of(names: list[str]) -> str:
    """Return as many names as fit into a comment."""
    text = ""
    for name in names:
        longer = f"{text} {name}" if text else name
        if len(longer) > MAX_COMMENT:
            break
        text = longer
    return text
