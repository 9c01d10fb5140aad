"""The underlay, the network between the hosts, as this host sees it: its own address, and those of the other hosts.

A host accepts packets of the overlay (overlay.py) from the other hosts of the cloud only, and drops those of an
instance to the VXLAN port of a host (rules.py). Whoever can send packets with a host's source address on the underlay
can forge frames of tenants: VXLAN has no authentication. `Underlay.device` narrows that to one device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.nftables import NftablesSocket, add_elements, delete_elements
from insula.model.errors import Invalid, Unavailable
from insula.model.objects import Network
from insula.model.units import shorten

OVERHEAD: Final = {4: 50, 6: 70}
"""Bytes that VXLAN adds to a tenant's packet: Ethernet, VXLAN, UDP and IP headers, by the underlay's IP version."""
_DEVICE: Final = re.compile(r"[\w.@:+-]{1,15}")


@dataclass(frozen=True)
class Underlay:
    """This host's address on the underlay, and the UDP port of all hosts. Invalid if they are malformed.

    With `device` packets of the overlay are accepted from that device only; without it any device may deliver them. The
    port is ours on all addresses of the host, because the kernel's VXLAN socket is bound to all of them: the VXLAN
    networks of other programs need another.
    """

    address: str
    device: str | None = None
    port: int = 4789  # assigned to VXLAN by IANA

    def __post_init__(self) -> None:
        try:
            right = str(ip_address(self.address)) == self.address
        except ValueError:
            right = False
        if not right:
            what = f"underlay address {shorten(self.address)} is not an IP address in its usual form"
            raise Invalid(what, "write one as in 192.0.2.1 or fd00::1")
        if not 0 < self.port < 1 << 16:
            raise Invalid(f"{self.port} is no UDP port", "use one of 1 to 65535, as 4789")
        if self.device is not None and not _DEVICE.fullmatch(self.device):
            raise Invalid(f"{shorten(self.device)} is no device's name", "`ip link` lists devices, as in eth0")

    @property
    def version(self) -> int:
        return 6 if ":" in self.address else 4

    @property
    def members(self) -> str:
        """The name of the set with the addresses of the cloud's other hosts, in the host's table."""
        return f"members{self.version}"


_CHAINS = """\
chain untracked_in {{
        type filter hook prerouting priority raw; policy accept;
        {ip} daddr {address} udp dport {port} notrack
    }}
    chain untracked_out {{
        type filter hook output priority raw; policy accept;
        {ip} saddr {address} udp dport {port} notrack
    }}
    chain from_hosts {{
        type filter hook input priority -5; policy accept;
        udp dport {port} {ip} saddr != @{members} drop
        {device}
    }}"""


def chains(underlay: Underlay) -> str:
    """Return chains for the host's table: packets of the overlay are accepted from the set of members only.

    They are not tracked: the host's table of connections would have one for each connection of an instance.
    """
    ip = "ip6" if underlay.version == 6 else "ip"
    device = f'udp dport {underlay.port} iifname != "{underlay.device}" drop' if underlay.device else ""
    return _CHAINS.format(ip=ip, address=underlay.address, port=underlay.port, members=underlay.members, device=device)


class Members:
    """The other hosts of the cloud. `rtnl` and `nftables` are sockets in the host's namespace, `table` has its rules.

    After a restart of insulad they are those that are installed, until `set` is called.
    """

    def __init__(self, underlay: Underlay, table: str, rtnl: Rtnl, nftables: NftablesSocket) -> None:
        self.underlay = underlay
        self._table = table
        self.rtnl = rtnl
        self._nftables = nftables
        self.addresses = self._installed()

    def close(self) -> None:
        self.rtnl.close()
        self._nftables.close()

    def set(self, hosts: Iterable[str]) -> None:
        """Accept packets from these underlay addresses, and no others. Invalid; then nothing is changed."""
        self.addresses = frozenset(self._parsed(host) for host in hosts) - {self.underlay.address}
        self.repair()

    def repair(self) -> None:
        """Make the set in the rules equal to `addresses`."""
        wanted, have = {ip_address(host).packed for host in self.addresses}, set(self._keys())
        place = ("inet", self._table, self.underlay.members)
        self._nftables.transact(
            *add_elements(*place, sorted(wanted - have)), *delete_elements(*place, sorted(have - wanted))
        )

    def drift(self) -> Iterator[str]:
        """Yield differences of the set in the rules from `addresses`, as text."""
        for host in sorted(self.addresses ^ self._installed()):
            difference = "missing in" if host in self.addresses else "added to"
            yield f"host {host} is {difference} set {self.underlay.members}"

    def check(self, network: Network) -> None:
        """Check that the network's packets fit into those of the underlay. Invalid, Unavailable if this host lacks its
        underlay address."""
        device, most = self.room()
        if network.mtu > most:
            what = f"network {network.name} has an MTU of {network.mtu}, but {device} has room for {most} with VXLAN"
            raise Invalid(what, f"make the network with --mtu {most}, or raise the MTU of the underlay on all hosts")

    def room(self) -> tuple[str, int]:
        """Return the underlay device, and the largest packet of a tenant that it has room for. Unavailable if this host
        lacks its underlay address."""
        here = {a.index for a in self.rtnl.addresses() if a.address.partition("/")[0] == self.underlay.address}
        link = next((link for link in self.rtnl.links() if link.index in here), None)
        if link is None:
            what = f"no device of this host has the underlay address {self.underlay.address}"
            raise Unavailable(what, "add the address to a device, or set another underlay")
        return link.name, link.mtu - OVERHEAD[self.underlay.version]

    def _keys(self) -> list[bytes]:
        return self._nftables.keys("inet", self._table, self.underlay.members)

    def _installed(self) -> frozenset[str]:
        return frozenset(str(ip_address(key)) for key in self._keys())

    def _parsed(self, host: str) -> str:
        try:
            address = ip_address(host)
        except ValueError:
            raise Invalid(f"host {shorten(host)} is not an IP address", "write one as in 192.0.2.1") from None
        if address.version != self.underlay.version:
            what = f"host {address} has another IP version than this host's underlay address {self.underlay.address}"
            raise Invalid(what, "give all hosts underlay addresses of one version")
        return str(address)
