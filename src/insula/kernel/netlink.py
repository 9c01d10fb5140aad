"""rtnetlink(7): links, addresses, routes and neighbours, written as messages and sent in batches.

A request is a `nlmsghdr`, a fixed header of its kind and attributes (type, length, value), which may nest. The kernel
takes any number of requests in one sendmsg(2) and answers each with an acknowledgement, so that what makes a port
costs one system call each way. The module has functions that build requests, and `Rtnl`, a socket that sends them.

A socket belongs to the network namespace it was opened in, whichever thread uses it later.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface, ip_network

from insula.kernel import descriptors, rtattr
from insula.kernel import rtmessages as rt
from insula.kernel.rtmessages import Address, Link, Neighbour

# netlink.h, if_link.h, if_addr.h, rtnetlink.h, neighbour.h
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWNEIGH, _DELNEIGH, _GETNEIGH = 28, 29, 30
_SETNEIGHTBL, _GETNSID, _GETSTATS = 67, 90, 94
_F_REQUEST, _F_ACK, _F_DUMP, _F_REPLACE, _F_EXCL, _F_CREATE = 1, 4, 0x300, 0x100, 0x200, 0x400
_F_CAPPED, _F_ACK_TLVS, _F_DUMP_INTR = 0x100, 0x200, 0x10
_SIOCETHTOOL, _ETHTOOL_GLINK = 0x8946, 0x0A
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _STRICT = 270, 10, 11, 12

_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=8BI")
_STATS = struct.Struct("=BxxxiI")


class NetlinkError(OSError):
    """An errno, with what was asked and the kernel's extended acknowledgement."""


@dataclass(frozen=True)
class Request:
    """One message. `what` is for errors; an errno in `ignore` is no error, such as ENODEV of a deletion."""

    what: str
    type: int
    flags: int
    body: bytes
    ignore: frozenset[int] = field(default=frozenset())


# -- requests --------------------------------------------------------------------------------------------------


def veth(
    name: str,
    peer: str,
    netns: int,
    *,
    index: int = 0,
    mac: str | None = None,
    peer_mac: str | None = None,
    mtu: int | None = None,
    master: int | None = None,
) -> Request:
    """A veth(4) pair: `name` here, up, and `peer` in the namespace behind the descriptor `netns`, down."""
    far = _link_body(0) + rtattr.attributes(
        (rt.IFLA_IFNAME, rtattr.text(peer)),
        (rt.IFLA_NET_NS_FD, rtattr.u32(netns)),
        (rt.IFLA_ADDRESS, peer_mac and rtattr.mac(peer_mac)),
        (rt.IFLA_MTU, mtu and rtattr.u32(mtu)),
    )
    info = rtattr.nested(
        (rt.INFO_KIND, b"veth\0"),
        (rt.INFO_DATA | rtattr.NESTED, rtattr.nested((rt.VETH_INFO_PEER | rtattr.NESTED, far))),
    )
    return _new_link(f"veth {name}", name, index, info, mac=mac, mtu=mtu, master=master)


def bridge(name: str, *, index: int = 0, mac: str, mtu: int) -> Request:
    """A bridge, up, without spanning tree and without multicast snooping: everything for a group goes to all ports."""
    data = rtattr.nested((rt.BR_STP_STATE, rtattr.u32(0)), (rt.BR_MCAST_SNOOPING, b"\0"))
    info = rtattr.nested((rt.INFO_KIND, b"bridge\0"), (rt.INFO_DATA | rtattr.NESTED, data))
    return _new_link(f"bridge {name}", name, index, info, mac=mac, mtu=mtu)


def vxlan(name: str, *, vni: int, local: str, port: int = 4789, index: int = 0, mtu: int, master: int) -> Request:
    """A VXLAN device (RFC 7348), up, that learns nothing: its forwarding entries are written with `forwarding`."""
    address = ip_address(local)
    data = rtattr.nested(
        (rt.VXLAN_ID, rtattr.u32(vni)),
        (rt.VXLAN_LOCAL if address.version == 4 else rt.VXLAN_LOCAL6, address.packed),
        (rt.VXLAN_LEARNING, b"\0"),
        (rt.VXLAN_PORT, struct.pack("!H", port)),
    )
    info = rtattr.nested((rt.INFO_KIND, b"vxlan\0"), (rt.INFO_DATA | rtattr.NESTED, data))
    return _new_link(f"vxlan {name}", name, index, info, mtu=mtu, master=master)


def set_link(
    index: int,
    *,
    up: bool | None = None,
    mac: str | None = None,
    mtu: int | None = None,
    master: int | None = None,
    alias: str | None = None,
    link_local: bool | None = None,
) -> Request:
    """Change an existing link; `link_local` False means that IPv6 makes no address for it by itself."""
    mode = rt.ADDR_GEN_MODE_EUI64 if link_local else rt.ADDR_GEN_MODE_NONE
    inet6 = rtattr.nested((socket.AF_INET6 | rtattr.NESTED, rtattr.nested((rt.INET6_ADDR_GEN_MODE, bytes([mode])))))
    body = rt.LINK.pack(0, 0, index, rt.IFF_UP if up else 0, 0 if up is None else rt.IFF_UP) + rtattr.attributes(
        (rt.IFLA_ADDRESS, mac and rtattr.mac(mac)),
        (rt.IFLA_MTU, mtu and rtattr.u32(mtu)),
        (rt.IFLA_MASTER, None if master is None else rtattr.u32(master)),
        (rt.IFLA_IFALIAS, None if alias is None else rtattr.text(alias)),
        (rt.IFLA_AF_SPEC | rtattr.NESTED, None if link_local is None else inet6),
    )
    return Request(f"set link {index}", _NEWLINK, 0, body)


def set_bridge_port(index: int, *, learning: bool, flood: bool) -> Request:
    """Whether the port's bridge learns source addresses from it, and sends it unicast to addresses it doesn't know."""
    data = rtattr.nested((rt.BRPORT_LEARNING, bytes([learning])), (rt.BRPORT_UNICAST_FLOOD, bytes([flood])))
    info = rtattr.nested((rt.INFO_SLAVE_KIND, b"bridge\0"), (rt.INFO_SLAVE_DATA | rtattr.NESTED, data))
    return Request(
        f"set bridge port {index}",
        _NEWLINK,
        0,
        _link_body(index) + rtattr.attributes((rt.IFLA_LINKINFO | rtattr.NESTED, info)),
    )


def delete_link(*, index: int = 0, name: str | None = None) -> Request:
    """Remove a link, of a veth both ends; no error when it is gone."""
    body = _link_body(index) + rtattr.attributes((rt.IFLA_IFNAME, name and rtattr.text(name)))
    return Request(f"delete link {name or index}", _DELLINK, 0, body, ignore=frozenset({19}))  # ENODEV


def mark_link(index: int, group: int) -> Request:
    """Put a link into a group (ip-link(8)); no error when it is gone."""
    body = _link_body(index) + rtattr.attributes((rt.IFLA_GROUP, rtattr.u32(group)))
    return Request(f"mark link {index}", _NEWLINK, 0, body, ignore=frozenset({19}))  # ENODEV


def delete_links(group: int) -> Request:
    """Remove all links of a group at once; no error when there is none."""
    body = _link_body(0) + rtattr.attributes((rt.IFLA_GROUP, rtattr.u32(group)))
    return Request(f"delete links of group {group}", _DELLINK, 0, body, ignore=frozenset({19}))  # ENODEV


def add_address(index: int, address: str) -> Request:
    """`address` with its prefix length on a link, usable at once: without duplicate address detection (RFC 4862)."""
    body = _address_body(index, address) + rtattr.attributes((rt.IFA_FLAGS, rtattr.u32(rt.IFA_F_NODAD)))
    return Request(f"add address {address}", _NEWADDR, _F_CREATE | _F_REPLACE, body)


def delete_address(index: int, address: str) -> Request:
    """Remove it; no error when it is gone."""
    ignore = frozenset({19, 99})  # ENODEV, EADDRNOTAVAIL
    return Request(f"delete address {address}", _DELADDR, 0, _address_body(index, address), ignore)


def add_route(destination: str, *, index: int, gateway: str | None = None) -> Request:
    """A route to `destination` in CIDR notation through a gateway or straight out of the link."""
    network = ip_network(destination)
    scope = 0 if gateway else 253  # RT_SCOPE_UNIVERSE, RT_SCOPE_LINK
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    main, protocol_static, unicast = 254, 4, 1
    body = _ROUTE.pack(family, network.prefixlen, 0, 0, main, protocol_static, scope, unicast, 0) + rtattr.attributes(
        (rt.RTA_DST, network.network_address.packed if network.prefixlen else None),
        (rt.RTA_OIF, rtattr.u32(index)),
        (rt.RTA_GATEWAY, gateway and ip_address(gateway).packed),
    )
    return Request(f"add route {destination}", _NEWROUTE, _F_CREATE | _F_REPLACE, body)


def add_neighbour(index: int, address: str, mac: str) -> Request:
    """A permanent entry of the ARP or NDP table: the kernel never asks for it and never forgets it."""
    ip = ip_address(address)
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    body = rt.NEIGH.pack(family, index, rt.NUD_PERMANENT, 0, 0) + rtattr.attributes(
        (rt.NDA_DST, ip.packed), (rt.NDA_LLADDR, rtattr.mac(mac))
    )
    return Request(f"add neighbour {address}", _NEWNEIGH, _F_CREATE | _F_REPLACE, body)


def delete_neighbour(index: int, address: str) -> Request:
    """Remove an entry; no error when it is gone."""
    ip = ip_address(address)
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    body = rt.NEIGH.pack(family, index, 0, 0, 0) + rtattr.attributes((rt.NDA_DST, ip.packed))
    ignore = frozenset({2, 6, 19, 22})  # ENOENT, ENXIO, ENODEV; EINVAL where the link has no IPv6
    return Request(f"delete neighbour {address}", _DELNEIGH, 0, body, ignore)


def set_retransmission(index: int, milliseconds: int, *, ipv6: bool) -> Request:
    """How long a link waits between two questions for a neighbour's MAC address (RTM_SETNEIGHTBL, arp(7))."""
    family, table = (socket.AF_INET6, "ndisc_cache") if ipv6 else (socket.AF_INET, "arp_cache")
    parameters = rtattr.nested(
        (rt.NDTPA_IFINDEX, rtattr.u32(index)), (rt.NDTPA_RETRANS_TIME, struct.pack("=Q", milliseconds))
    )
    body = struct.pack("=Bxxx", family) + rtattr.attributes(
        (rt.NDTA_NAME, rtattr.text(table)), (rt.NDTA_PARMS | rtattr.NESTED, parameters)
    )
    return Request(f"set {table} of {index}", _SETNEIGHTBL, 0, body)


def add_forwarding(index: int, mac: str, *, remote: str | None = None) -> Request:
    """bridge(8) fdb: frames to `mac` leave through this bridge port, or through this VXLAN device to host `remote`."""
    body = rt.NEIGH.pack(socket.AF_BRIDGE, index, rt.NUD_NOARP, rt.NTF_SELF if remote else rt.NTF_MASTER, 0)
    body += rtattr.attributes((rt.NDA_LLADDR, rtattr.mac(mac)), (rt.NDA_DST, remote and ip_address(remote).packed))
    return Request(f"add forwarding entry {mac}", _NEWNEIGH, _F_CREATE | _F_REPLACE, body)


def _new_link(
    what: str,
    name: str,
    index: int,
    info: bytes,
    *,
    mac: str | None = None,
    mtu: int | None = None,
    master: int | None = None,
) -> Request:
    body = _link_body(index, rt.IFF_UP) + rtattr.attributes(
        (rt.IFLA_IFNAME, rtattr.text(name)),
        (rt.IFLA_ADDRESS, mac and rtattr.mac(mac)),
        (rt.IFLA_MTU, mtu and rtattr.u32(mtu)),
        (rt.IFLA_MASTER, master and rtattr.u32(master)),
        (rt.IFLA_LINKINFO | rtattr.NESTED, info),
    )
    return Request(f"add {what}", _NEWLINK, _F_CREATE | _F_EXCL, body)


def _link_body(index: int, flags: int = 0) -> bytes:
    return rt.LINK.pack(0, 0, index, flags, flags)


def _address_body(index: int, address: str) -> bytes:
    interface = ip_interface(address)
    family = socket.AF_INET if interface.version == 4 else socket.AF_INET6
    packed = interface.ip.packed
    return rt.ADDR.pack(family, interface.network.prefixlen, 0, 0, index) + rtattr.attributes(
        (rt.IFA_LOCAL, packed), (rt.IFA_ADDRESS, packed)
    )


# -- the socket --------------------------------------------------------------------------------------------------


class Rtnl:
    """An rtnetlink socket in the network namespace of the calling thread. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sequence = 0
        kind = socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE
        self._socket = socket.socket(*kind, fileno=descriptors.high(socket.socket(*kind).detach()))
        for option in (_CAP_ACK, _EXT_ACK, _STRICT):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._socket.bind((0, 0))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Rtnl:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def execute(self, *requests: Request) -> None:
        """Send all, in order, in one system call. The kernel tries each; the first failure raises `NetlinkError`."""
        if not requests:
            return
        with self._lock:
            first, packet = self._sequence + 1, bytearray()
            for request in requests:
                packet += self._pack(request.type, request.flags | _F_ACK, request.body)
            self._socket.sendto(packet, (0, 0))
            errors: dict[int, NetlinkError] = {}
            missing = set(range(first, first + len(requests)))
            while missing:
                for type_, flags, sequence, body in self._receive():
                    if type_ == _NLMSG_ERROR and sequence in missing:
                        missing.remove(sequence)
                        request = requests[sequence - first]
                        error = _error(request.what, flags, body)
                        if error is not None and error.errno not in request.ignore:
                            errors[sequence] = error
        if errors:
            raise errors[min(errors)]

    def settle(self, name: str) -> bool:
        """Whether the link has a carrier, with what follows from a change of it done at once.

        The kernel handles such changes in a queue that runs at most once a second (net/core/link_watch.c); until then
        a device that has come up may drop packets, and a bridge not forward them. ETHTOOL_GLINK doesn't wait for it.
        """
        value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_GLINK, 0), 8)
        request = struct.pack("16sP", name.encode(), ctypes.addressof(value)).ljust(40, b"\0")
        fcntl.ioctl(self._socket, _SIOCETHTOOL, request)
        return bool(rtattr.integer(value.raw[4:]))

    def links(self) -> list[Link]:
        """All links of the namespace."""
        return [rt.parse_link(body) for body in self._dump(_GETLINK, rt.LINK.pack(0, 0, 0, 0, 0))]

    def link(self, name: str) -> Link | None:
        """The link of that name."""
        try:
            return rt.parse_link(
                self._get(_GETLINK, _link_body(0) + rtattr.attributes((rt.IFLA_IFNAME, rtattr.text(name))))
            )
        except NetlinkError as error:
            if error.errno == 19:  # ENODEV
                return None
            raise

    def traffic(self, index: int) -> tuple[int, int] | None:
        """Bytes that the link has received and sent (RTM_GETSTATS); None if there is no such link."""
        try:
            body = self._get(_GETSTATS, _STATS.pack(0, index, 1 << (rt.IFLA_STATS_LINK_64 - 1)))
        except NetlinkError as error:
            if error.errno == 19:  # ENODEV
                return None
            raise
        counters = rtattr.parse(body[_STATS.size :])[rt.IFLA_STATS_LINK_64]  # struct rtnl_link_stats64
        received, sent = struct.unpack_from("=QQ", counters, 16)
        return received, sent

    def addresses(self) -> list[Address]:
        """All IPv4 and IPv6 addresses of the namespace."""
        return [rt.parse_address(body) for body in self._dump(_GETADDR, rt.ADDR.pack(0, 0, 0, 0, 0))]

    def neighbours(self, family: int) -> list[Neighbour]:
        """The ARP (AF_INET) or NDP (AF_INET6) table, or with AF_BRIDGE the forwarding entries of all bridges."""
        return [rt.parse_neighbour(family, body) for body in self._dump(_GETNEIGH, rt.NEIGH.pack(family, 0, 0, 0, 0))]

    def default_routes(self) -> list[tuple[int, str]]:
        """(index of the link, gateway) of the main tables' default routes, IPv4 and IPv6."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for body in self._dump(_GETROUTE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
                attributes = rtattr.parse(body[_ROUTE.size :])
                if body[1] == 0 and body[4] == 254 and rt.RTA_GATEWAY in attributes and rt.RTA_OIF in attributes:
                    found.append((rtattr.integer(attributes[rt.RTA_OIF]), str(ip_address(attributes[rt.RTA_GATEWAY]))))
        return found

    def namespace_number(self, netns: int) -> int | None:
        """By what number links here refer to the namespace behind the descriptor; None if none does (RTM_GETNSID)."""
        body = self._get(_GETNSID, bytes(4) + rtattr.attributes((rt.NETNSA_FD, rtattr.u32(netns))))
        (number,) = struct.unpack("=i", rtattr.parse(body[4:])[rt.NETNSA_NSID])
        return number if number >= 0 else None

    def _get(self, type_: int, body: bytes) -> bytes:
        with self._lock:
            self._socket.sendto(self._pack(type_, 0, body), (0, 0))
            sequence = self._sequence
            while True:
                for answer, flags, number, payload in self._receive():
                    if number != sequence:
                        continue
                    if answer == _NLMSG_ERROR:
                        raise _error("get", flags, payload) or NetlinkError(5, "get: no answer")
                    return payload

    def _dump(self, type_: int, body: bytes) -> list[bytes]:
        """All answers of a dump, taken again if the table changed meanwhile (NLM_F_DUMP_INTR)."""
        with self._lock:
            while True:
                self._socket.sendto(self._pack(type_, _F_DUMP, body), (0, 0))
                sequence, found, interrupted, done = self._sequence, [], False, False
                while not done:
                    for answer, flags, number, payload in self._receive():
                        if number != sequence:
                            continue
                        interrupted |= bool(flags & _F_DUMP_INTR)
                        if answer == _NLMSG_ERROR and (error := _error("dump", flags, payload)):
                            raise error
                        if answer in (_NLMSG_ERROR, _NLMSG_DONE):
                            done = True
                        else:
                            found.append(payload)
                if not interrupted:
                    return found

    def _pack(self, type_: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return _HEADER.pack(_HEADER.size + len(body), type_, flags | _F_REQUEST, self._sequence, 0) + body

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = self._socket.recv(1 << 18)
        offset = 0
        while offset < len(data):
            length, type_, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            yield type_, flags, sequence, data[offset + _HEADER.size : offset + length]
            offset += -(-length // 4) * 4


# -- answers --------------------------------------------------------------------------------------------------


def _error(what: str, flags: int, body: bytes) -> NetlinkError | None:
    """The error in an NLMSG_ERROR with the text of its extended acknowledgement; None if it is a success."""
    code = -int(struct.unpack_from("=i", body)[0])
    if code == 0:
        return None
    text = os.strerror(code)
    if flags & _F_ACK_TLVS:
        request = _HEADER.size if flags & _F_CAPPED else -(-struct.unpack_from("=I", body, 4)[0] // 4) * 4
        said = rtattr.parse(body[4 + request :]).get(1, b"").rstrip(b"\0").decode(errors="replace")
        text = f"{text}: {said}" if said else text
    return NetlinkError(code, f"{what}: {text}")
