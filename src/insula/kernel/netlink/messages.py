"""Messages of rtnetlink(7): numbers, fixed headers, and classes for parsed replies."""

from __future__ import annotations

import functools
import socket
import struct
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from typing import NamedTuple

from insula.kernel.netlink import attributes as rtattr

# if_link.h, if_addr.h, rtnetlink.h, neighbour.h, net_namespace.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_SETNEIGHTBL, RTM_NEWNETCONF, RTM_DELNETCONF, RTM_GETNSID = 67, 80, 81, 90
NETCONFA_IFINDEX, NETCONFA_IFINDEX_ALL, NETCONFA_IFINDEX_DEFAULT = 1, -1, -2
IFF_UP, IFF_LOWER_UP = 1, 0x10000
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
IFLA_IFALIAS, IFLA_AF_SPEC, IFLA_GROUP, IFLA_NET_NS_FD, IFLA_LINK_NETNSID = 20, 26, 27, 28, 37
IFLA_PROTINFO, IFLA_NEW_IFINDEX, IFLA_EXT_MASK, SKIP_STATISTICS = 12, 49, 29, 8
INFO_KIND, INFO_DATA, INFO_SLAVE_KIND, INFO_SLAVE_DATA = 1, 2, 4, 5
INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_EUI64, ADDR_GEN_MODE_NONE = 8, 0, 1
BR_STP_STATE, BR_MCAST_SNOOPING, BRPORT_LEARNING, BRPORT_UNICAST_FLOOD = 5, 23, 8, 9
BRPORT_HAIRPIN, BRPORT_MCAST_FLOOD, BRPORT_BCAST_FLOOD, BRPORT_NEIGH_SUPPRESS, BRPORT_ISOLATED = 4, 27, 30, 32, 33
BRPORT_OF_PROTOCOL = frozenset(range(13, 24))
"""IFLA_BRPORT_ROOT_ID to IFLA_BRPORT_HOLD_TIMER: what the spanning tree protocol and its timers say; no settings."""
VXLAN_ID, VXLAN_LOCAL, VXLAN_LEARNING, VXLAN_PORT, VXLAN_LOCAL6 = 1, 4, 7, 15, 17
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
VETH_INFO_PEER, IFA_F_NODAD = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_TABLE = 1, 4, 5, 7, 15
RT_TABLE_MAIN, RTN_UNICAST, RTNH_F_ONLINK = 254, 1, 4
FRA_IIFNAME, FRA_PRIORITY, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_PROTOCOL, FR_ACT_TO_TBL = 3, 6, 14, 15, 21, 1
NDA_DST, NDA_LLADDR, NDA_CACHEINFO, NDA_PROBES, NDA_VNI = 1, 2, 3, 4, 7
NETNSA_NSID, NETNSA_FD = 1, 3
NDTA_NAME, NDTA_PARMS, NDTPA_IFINDEX, NDTPA_RETRANS_TIME = 1, 6, 1, 5
NUD_NOARP, NUD_PERMANENT, NTF_SELF, NTF_MASTER = 0x40, 0x80, 2, 4

LINK = struct.Struct("=BxHiII")
ADDR = struct.Struct("=BBBBI")
NEIGH = struct.Struct("=BxxxiHBB")
ROUTE = struct.Struct("=8BI")
RULE = struct.Struct("=8BI")  # struct fib_rule_hdr
FRA_SRC, FRA_PRIORITY = 2, 6


@dataclass(frozen=True)
class VxlanSettings:
    """The settings of a VXLAN device (RFC 7348): identifier, own address, UDP port, and whether it learns hosts."""

    vni: int
    local: str | None
    port: int
    learning: bool


@dataclass(frozen=True)
class Link:
    index: int
    name: str
    kind: str
    up: bool
    mac: str
    mtu: int
    master: int | None
    peer: int | None  # IFLA_LINK: of a veth the index of the other end, in its namespace
    alias: str
    group: int = 0
    learning: bool | None = None  # as a bridge port
    flood: bool | None = None
    hairpin: bool | None = None
    carrier: bool = False
    namespace: int | None = None  # of the peer, by its number here (ip-netns(8), set); None if it is here or unknown
    broadcast: bool | None = None  # as a bridge port: whether it sends broadcast, and multicast, frames of others
    multicast: bool | None = None
    suppress: bool | None = None  # whether the bridge answers for neighbours behind it: BR_NEIGH_SUPPRESS
    isolated: bool | None = None  # whether frames to other isolated ports of the bridge are dropped
    vxlan: VxlanSettings | None = None


@dataclass(frozen=True)
class Address:
    index: int
    address: str  # with prefix length
    link_local: bool


@dataclass(frozen=True)
class Neighbour:
    index: int
    mac: str
    address: str | None
    permanent: bool
    host: str | None = None  # of a VXLAN device's forwarding entry: the host that frames are sent to
    vni: int | None = None  # of such an entry: with this VNI instead of the device's


class Route(NamedTuple):
    """A route of a table, through `gateway`, or directly through the link with that index."""

    table: int
    destination: str  # in CIDR notation
    gateway: str | None
    link: int
    source: str | None = None  # of packets of the namespace itself


class Rule(NamedTuple):
    """A rule of policy routing (ip-rule(8)): packets that `device` has received are looked up in `table`. Those of the
    namespace itself are received by lo. `short` is the longest prefix of which a route is ignored, -1 for none."""

    family: int
    device: str
    table: int
    priority: int
    short: int = -1


def parse_link(body: bytes) -> Link:
    """Parse an RTM_NEWLINK message."""
    _, _, index, flags, _ = LINK.unpack_from(body)
    attributes = rtattr.parse(body[LINK.size :])
    kind, vxlan, port = _link_info(attributes.get(IFLA_LINKINFO, b""))
    return Link(
        index=index,
        name=rtattr.string(attributes[IFLA_IFNAME]),
        kind=kind,
        up=bool(flags & IFF_UP),
        mac=attributes.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=rtattr.integer(attributes[IFLA_MTU]),
        master=rtattr.integer(attributes[IFLA_MASTER]) if IFLA_MASTER in attributes else None,
        peer=rtattr.integer(attributes[IFLA_LINK]) if IFLA_LINK in attributes else None,
        alias=rtattr.string(attributes.get(IFLA_IFALIAS, b"")),
        group=rtattr.integer(attributes[IFLA_GROUP]) if IFLA_GROUP in attributes else 0,
        carrier=bool(flags & IFF_LOWER_UP),
        namespace=rtattr.integer(attributes[IFLA_LINK_NETNSID]) if IFLA_LINK_NETNSID in attributes else None,
        vxlan=vxlan,
        learning=port.learning,
        flood=port.flood,
        hairpin=port.hairpin,
        broadcast=port.broadcast,
        multicast=port.multicast,
        suppress=port.suppress,
        isolated=port.isolated,
    )


class _BridgePort(NamedTuple):
    """The settings of a bridge port, as in `Link`."""

    learning: bool | None
    flood: bool | None
    hairpin: bool | None
    broadcast: bool | None
    multicast: bool | None
    suppress: bool | None
    isolated: bool | None


@functools.lru_cache(maxsize=4096)
def _link_info(packed: bytes) -> tuple[str, VxlanSettings | None, _BridgePort]:
    """Parse what depends on the kind of a link. It is long, and seldom changes."""
    info = rtattr.parse(packed)
    port = rtattr.parse(info.get(INFO_SLAVE_DATA, b"")) if info.get(INFO_SLAVE_KIND) == b"bridge\0" else {}
    settings = _BridgePort(
        learning=_flag(port, BRPORT_LEARNING),
        flood=_flag(port, BRPORT_UNICAST_FLOOD),
        hairpin=_flag(port, BRPORT_HAIRPIN),
        broadcast=_flag(port, BRPORT_BCAST_FLOOD),
        multicast=_flag(port, BRPORT_MCAST_FLOOD),
        suppress=_flag(port, BRPORT_NEIGH_SUPPRESS),
        isolated=_flag(port, BRPORT_ISOLATED),
    )
    return rtattr.string(info.get(INFO_KIND, b"")), _vxlan(info), settings


def bridge_port_settings(body: bytes) -> tuple[int, dict[int, bytes]]:
    """Return the index of the bridge, and the settings of the port, of an RTM_NEWLINK message of AF_BRIDGE."""
    attributes = rtattr.parse(body[LINK.size :])
    port = rtattr.parse(attributes.get(IFLA_PROTINFO, b""))
    settings = {number: value for number, value in port.items() if number not in BRPORT_OF_PROTOCOL}
    return rtattr.integer(attributes.get(IFLA_MASTER, b"")), settings


def parse_netconf(body: bytes) -> int | None:
    """Return the index of the device that an RTM_NEWNETCONF message is about: NETCONFA_IFINDEX_ALL, or one's own."""
    packed = rtattr.parse(body[4:]).get(NETCONFA_IFINDEX)
    return struct.unpack("=i", packed)[0] if packed else None


def _flag(attributes: dict[int, bytes], number: int) -> bool | None:
    return bool(attributes[number][0]) if number in attributes else None


def _vxlan(info: dict[int, bytes]) -> VxlanSettings | None:
    data = rtattr.parse(info.get(INFO_DATA, b"")) if info.get(INFO_KIND) == b"vxlan\0" else {}
    if VXLAN_ID not in data:
        return None
    local = data.get(VXLAN_LOCAL) or data.get(VXLAN_LOCAL6)
    return VxlanSettings(
        vni=rtattr.integer(data[VXLAN_ID]),
        local=str(ip_address(local)) if local else None,
        port=int.from_bytes(data.get(VXLAN_PORT, b""), "big"),
        learning=_flag(data, VXLAN_LEARNING) is not False,
    )


def parse_address(body: bytes) -> Address:
    """Parse an RTM_NEWADDR message."""
    _, prefix, _, scope, index = ADDR.unpack_from(body)
    attributes = rtattr.parse(body[ADDR.size :])
    address = ip_address(attributes.get(IFA_LOCAL) or attributes[IFA_ADDRESS])
    return Address(index, f"{address}/{prefix}", link_local=scope == 253 and address.version == 6)


def parse_neighbour(family: int, body: bytes) -> Neighbour:
    """Parse an RTM_NEWNEIGH message; `family` is that of the request."""
    _, index, state, _, _ = NEIGH.unpack_from(body)
    attributes = rtattr.parse(body[NEIGH.size :])
    to = attributes.get(NDA_DST)
    return Neighbour(
        index=index,
        mac=attributes.get(NDA_LLADDR, b"").hex(":"),
        address=str(ip_address(to)) if to and family != socket.AF_BRIDGE else None,
        permanent=bool(state & NUD_PERMANENT) or (family == socket.AF_BRIDGE and bool(state & NUD_NOARP)),
        host=str(ip_address(to)) if to and family == socket.AF_BRIDGE else None,
        vni=rtattr.integer(attributes[NDA_VNI]) if NDA_VNI in attributes else None,
    )


def without_times(body: bytes) -> bytes:
    """Return the beginning of an RTM_NEWNEIGH message: what is in front of the times and counts of use."""
    offset, last = NEIGH.size, len(body) - 4
    while offset <= last:
        length, kind = rtattr.HEAD.unpack_from(body, offset)
        if kind in (NDA_CACHEINFO, NDA_PROBES) or length < 4:
            return body[:offset]
        offset += length + 3 & ~3
    return body


def parse_route(body: bytes) -> Route | None:
    """Parse an RTM_NEWROUTE message; None for a route of another kind: local, multicast, or with several next hops."""
    family, length, _, _, table, _, _, kind, _ = ROUTE.unpack_from(body)
    attributes = rtattr.parse(body[ROUTE.size :])
    if kind != RTN_UNICAST or RTA_OIF not in attributes or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    to, through = attributes.get(RTA_DST, bytes(4 if family == socket.AF_INET else 16)), attributes.get(RTA_GATEWAY)
    return Route(
        table=rtattr.integer(attributes[RTA_TABLE]) if RTA_TABLE in attributes else table,
        destination=f"{ip_address(to)}/{length}",
        gateway=str(ip_address(through)) if through else None,
        link=rtattr.integer(attributes[RTA_OIF]),
        source=str(ip_address(attributes[RTA_PREFSRC])) if RTA_PREFSRC in attributes else None,
    )


def parse_rule(body: bytes) -> Rule:
    """Parse an RTM_NEWRULE message; `device` is empty for a rule about all packets."""
    family, _, _, _, table, _, _, _, _ = ROUTE.unpack_from(body)
    attributes = rtattr.parse(body[ROUTE.size :])
    short = attributes.get(FRA_SUPPRESS_PREFIXLEN, b"\xff\xff\xff\xff")
    return Rule(
        family=family,
        device=rtattr.string(attributes.get(FRA_IIFNAME, b"")),
        table=rtattr.integer(attributes[FRA_TABLE]) if FRA_TABLE in attributes else table,
        priority=rtattr.integer(attributes[FRA_PRIORITY]) if FRA_PRIORITY in attributes else 0,
        short=int.from_bytes(short, sys.byteorder, signed=True),
    )
