"""A socket for rtnetlink(7), which reads and changes links, addresses, routes and neighbours of a network namespace."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct

from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink import messages as rt
from insula.kernel.netlink.messages import Address, Link, Neighbour, Route, Rule
from insula.kernel.netlink.socket import NetlinkError, NetlinkSocket

_EVERY_LINK = rt.LINK.pack(0, 0, 0, 0, 0) + rtattr.attributes((rt.IFLA_EXT_MASK, rtattr.u32(rt.SKIP_STATISTICS)))
_SIOCGIFINDEX, _SIOCETHTOOL, _ETHTOOL_GLINK = 0x8933, 0x8946, 0x0A


class Rtnl(NetlinkSocket):
    """An rtnetlink socket in the network namespace of the calling thread. Its methods may be called from any thread."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)

    def sync_carrier(self, name: str) -> bool:
        """Make the kernel process a pending carrier change of the link now; returns whether it has a carrier.

        The kernel handles such changes in a queue that runs at most once a second (net/core/link_watch.c). Until then a
        device that has come up may drop packets, and a bridge may not forward them. ETHTOOL_GLINK flushes the queue.
        """
        value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_GLINK, 0), 8)
        request = struct.pack("16sP", name.encode(), ctypes.addressof(value)).ljust(40, b"\0")
        fcntl.ioctl(self.socket, _SIOCETHTOOL, request)
        return bool(rtattr.integer(value.raw[4:]))

    def links(self) -> list[Link]:
        """Return all links of the namespace."""
        return [rt.parse_link(body) for body in self.link_messages()]

    def link_messages(self) -> list[bytes]:
        """Return an RTM_NEWLINK message for each link, without its counters of packets."""
        return self.dump(rt.RTM_GETLINK, _EVERY_LINK)

    def link(self, name: str) -> Link | None:
        """Return the link of that name; None if there is none."""
        try:
            wanted = rt.LINK.pack(0, 0, 0, 0, 0) + rtattr.attributes((rt.IFLA_IFNAME, rtattr.text(name)))
            return rt.parse_link(self.get(rt.RTM_GETLINK, wanted))
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def index(self, name: str) -> int | None:
        """Return the index of the link of that name (SIOCGIFINDEX, netdevice(7)); None if there is none."""
        try:
            found = fcntl.ioctl(self.socket, _SIOCGIFINDEX, struct.pack("16s24x", name.encode()))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return int(struct.unpack_from("=i", found, 16)[0])

    def addresses(self) -> list[Address]:
        """Return all IPv4 and IPv6 addresses of the namespace."""
        return [rt.parse_address(body) for body in self.dump(rt.RTM_GETADDR, rt.ADDR.pack(0, 0, 0, 0, 0))]

    def neighbours(self, family: int) -> list[Neighbour]:
        """Return the ARP (AF_INET) or NDP (AF_INET6) table, or with AF_BRIDGE the forwarding entries of all bridges."""
        return [
            rt.parse_neighbour(family, body) for body in self.dump(rt.RTM_GETNEIGH, rt.NEIGH.pack(family, 0, 0, 0, 0))
        ]

    def routes(self, protocol: int | None = None) -> list[Route]:
        """Return the unicast routes of all tables, IPv4 and IPv6; with `protocol` those of this origin only."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            bodies = self.dump(rt.RTM_GETROUTE, rt.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
            found += [
                route
                for body in bodies
                if (route := rt.parse_route(body)) and protocol in (None, rt.ROUTE.unpack_from(body)[5])
            ]
        return found

    def rules(self) -> list[Rule]:
        """Return the rules of policy routing, IPv4 and IPv6."""
        return [
            rt.parse_rule(body)
            for family in (socket.AF_INET, socket.AF_INET6)
            for body in self.dump(rt.RTM_GETRULE, rt.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        ]

    def default_routes(self) -> list[tuple[int, str]]:
        """Return (index of the link, gateway) of the main tables' default routes, IPv4 and IPv6."""
        return [
            (route.link, route.gateway)
            for route in self.routes()
            if route.gateway and route.table == rt.RT_TABLE_MAIN and route.destination.endswith("/0")
        ]

    def namespace_number(self, netns: int) -> int | None:
        """Return the number of another namespace in this one (RTM_GETNSID), as in `Link`; None if it has none here."""
        body = self.get(rt.RTM_GETNSID, bytes(4) + rtattr.attributes((rt.NETNSA_FD, rtattr.u32(netns))))
        (number,) = struct.unpack("=i", rtattr.parse(body[4:])[rt.NETNSA_NSID])
        return number if number >= 0 else None
