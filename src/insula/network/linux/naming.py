"""Names, interface indices and addresses of the fabric's devices, derived from the index numbers of the model.

A device's name has at most 15 characters (IFNAMSIZ). The interface indices in a tenant's namespace are chosen here, so
that a netlink message can refer to a device that is created by an earlier message of the same batch.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final

from insula.model.errors import Invalid
from insula.model.units import shorten

UPLINK: Final = "uplink"  # in the tenant's namespace
RATES: Final = "rates"  # where what instances with ceilings send waits: see `linux.guarantees.ports`
EGRESS: Final = "egress"  # the beginning of the names of devices there: see `linux.egress`
MTU: Final = 1500  # of the uplinks
_GUARANTEED: Final = 1 << 15  # the first address of a range that is no uplink's
MAX_PORTS: Final = 1023  # of a bridge (BR_MAX_PORTS in net/bridge/br_private.h, without number 0)
PEERING: Final = "peer"  # the beginning of the names of devices there that lead to other tenants
PEERING_VXLAN: Final = f"{PEERING}vx"  # of those that lead to other tenants on other hosts
# the first interface indices of bridges, VXLAN devices of networks and of peerings, and ports
_NETWORKS, _VXLANS, _PEERINGS, _PORTS = 1_000_000_000, 1_500_000_000, 1_750_000_000, 2_000_000_000
_PREFIX = re.compile(r"[a-z][a-z0-9-]{0,30}")


def bridge(network: int) -> str:
    return f"br{network}"


def port(index: int) -> str:
    return f"p{index}"


def vxlan(network: int) -> str:
    return f"vx{network}"


def peering(index: int) -> str:
    return f"{PEERING}{index}"


def peering_vxlan(index: int) -> str:
    return f"{PEERING_VXLAN}{index}"


def egress(number: int) -> str:
    return f"{EGRESS}{number}"


def bridge_index(network: int) -> int:
    return _NETWORKS + network


def is_bridge_index(index: int) -> bool:
    return _NETWORKS <= index < _VXLANS


def vxlan_index(network: int) -> int:
    return _VXLANS + network


def peering_vxlan_index(index: int) -> int:
    return _PEERINGS + index


def port_index(index: int) -> int:
    return _PORTS + index


def number(name: str, head: str) -> int | None:
    """Return the index in a device's name that begins with `head`; None for other names."""
    digits = name.removeprefix(head)
    return int(digits) if digits != name and digits.isascii() and digits.isdigit() else None


@dataclass(frozen=True)
class Naming:
    """The prefix of names, and the ranges of the uplinks' addresses.

    Each uplink has two addresses, of which the even one is the host's (RFC 3021, RFC 6164).
    """

    prefix: str
    range4: IPv4Network
    range6: IPv6Network

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise Invalid(f"prefix {shorten(self.prefix)} can't name devices", "use a-z, 0-9 and '-', as in insula")

    @property
    def uplinks(self) -> str:
        """The common prefix of the uplinks' names in the host's namespace."""
        stem = self.prefix
        if len(stem) > 7:
            stem = f"{stem[:2]}{zlib.crc32(stem.encode()) & 0xFFFFF:05x}"
        return f"{stem}-u"

    def uplink(self, tenant: int) -> str:
        return f"{self.uplinks}{tenant}"

    def addresses(self, tenant: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """Return ((host's, tenant's) IPv4, (host's, tenant's) IPv6) addresses of a tenant's uplink."""
        for key, range_ in (("range4", self.range4), ("range6", self.range6)):
            if 2 * tenant + 1 >= range_.num_addresses:
                raise Invalid(
                    f"tenant number {tenant} has no uplink address in {range_}", f"set network.{key} in insulad.toml"
                )
        four, six = self.range4, self.range6
        return (str(four[2 * tenant]), str(four[2 * tenant + 1])), (str(six[2 * tenant]), str(six[2 * tenant + 1]))

    def guaranteed_addresses(self, number: int) -> tuple[str, str]:
        """Return the IPv4 and IPv6 address that packets of an instance with a floor have on the uplink, by the number
        of its guarantee. They follow those of all tenants' uplinks."""
        first = _GUARANTEED + number
        if first >= min(self.range4.num_addresses, self.range6.num_addresses):
            raise Invalid(f"guarantee {number} has no address in {self.range4}", "set network.range4 in insulad.toml")
        return str(self.range4[first]), str(self.range6[first])

    def namespace(self, tenant: str) -> Path:
        return Path("/run/netns") / f"{self.prefix}-{tenant}"
