"""Requests to rtnetlink(7): each function builds the message for one change of a link, address, route or neighbour.

`Rtnl.execute` sends them.
"""

from __future__ import annotations

import socket
import struct

from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink import messages as rt
from insula.kernel.netlink.messages import Route, Rule
from insula.kernel.netlink.socket import CREATE, EXCLUSIVE, REPLACE, Request

MAIN_TABLE = 254
_RULES = 1000  # the preference of a rule for a routing table with number 0
_EXISTS = frozenset({17})  # EEXIST
_ENOENT, _ESRCH, _ENXIO, _ENODEV, _EINVAL, _EADDRNOTAVAIL = 2, 3, 6, 19, 22, 99


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
    """Create a veth(4) pair: `name` here, up, and `peer` in the namespace behind the descriptor `netns`, down."""
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
    """Create a bridge, up, without spanning tree and multicast snooping: multicast frames go to all ports."""
    data = rtattr.nested((rt.BR_STP_STATE, rtattr.u32(0)), (rt.BR_MCAST_SNOOPING, b"\0"))
    info = rtattr.nested((rt.INFO_KIND, b"bridge\0"), (rt.INFO_DATA | rtattr.NESTED, data))
    return _new_link(f"bridge {name}", name, index, info, mac=mac, mtu=mtu)


def ifb(name: str) -> Request:
    """Create an intermediate functional block, up: a device whose root discipline shapes what is redirected to it."""
    return _new_link(f"ifb {name}", name, 0, rtattr.nested((rt.INFO_KIND, b"ifb\0")))


def vxlan(
    name: str,
    *,
    vni: int,
    local: str,
    port: int = 4789,
    index: int = 0,
    mtu: int,
    mac: str | None = None,
    master: int | None = None,
    netns: int | None = None,
) -> Request:
    """Create a VXLAN device (RFC 7348), up, without learning: forwarding entries are added with `add_forwarding`.

    With the descriptor `netns` the device and its `master` are in that namespace; its UDP socket stays in this one.
    """
    family, packed = _packed(local)
    data = rtattr.nested(
        (rt.VXLAN_ID, rtattr.u32(vni)),
        (rt.VXLAN_LOCAL if family == socket.AF_INET else rt.VXLAN_LOCAL6, packed),
        (rt.VXLAN_LEARNING, b"\0"),
        (rt.VXLAN_PORT, struct.pack("!H", port)),
    )
    info = rtattr.nested((rt.INFO_KIND, b"vxlan\0"), (rt.INFO_DATA | rtattr.NESTED, data))
    return _new_link(f"vxlan {name}", name, index, info, mac=mac, mtu=mtu, master=master, netns=netns)


def set_link(
    index: int,
    *,
    up: bool | None = None,
    name: str | None = None,
    mac: str | None = None,
    mtu: int | None = None,
    master: int | None = None,
    alias: str | None = None,
    link_local: bool | None = None,
) -> Request:
    """Change an existing link. It takes a new name only while it is down. `link_local` False disables its automatic
    IPv6 link-local address."""
    mode = rt.ADDR_GEN_MODE_EUI64 if link_local else rt.ADDR_GEN_MODE_NONE
    inet6 = rtattr.nested((socket.AF_INET6 | rtattr.NESTED, rtattr.nested((rt.INET6_ADDR_GEN_MODE, bytes([mode])))))
    body = rt.LINK.pack(0, 0, index, rt.IFF_UP if up else 0, 0 if up is None else rt.IFF_UP) + rtattr.attributes(
        (rt.IFLA_IFNAME, name and rtattr.text(name)),
        (rt.IFLA_ADDRESS, mac and rtattr.mac(mac)),
        (rt.IFLA_MTU, mtu and rtattr.u32(mtu)),
        (rt.IFLA_MASTER, None if master is None else rtattr.u32(master)),
        (rt.IFLA_IFALIAS, None if alias is None else rtattr.text(alias)),
        (rt.IFLA_AF_SPEC | rtattr.NESTED, None if link_local is None else inet6),
    )
    return Request(f"set link {index}", rt.RTM_NEWLINK, 0, body)


def move_link(index: int, netns: int, *, name: str, new_index: int) -> Request:
    """Move a link to the namespace behind the descriptor `netns`, where it has another name and index. EEXIST if a link
    there has the name, EBUSY if one has the index. It is down afterwards."""
    body = _link_body(index) + rtattr.attributes(
        (rt.IFLA_NET_NS_FD, rtattr.u32(netns)),
        (rt.IFLA_IFNAME, rtattr.text(name)),
        (rt.IFLA_NEW_IFINDEX, rtattr.u32(new_index)),
    )
    return Request(f"move link {index}", rt.RTM_NEWLINK, 0, body)


def set_bridge_port(
    index: int,
    *,
    learning: bool,
    flood: bool,
    broadcast: bool | None = None,
    multicast: bool | None = None,
    suppress: bool | None = None,
    hairpin: bool | None = None,
    alias: str | None = None,
) -> Request:
    """Set a bridge port's flags (bridge(8)), and its link's alias.

    They are learning of source addresses; flooding of unicast to unknown addresses, of broadcast and of multicast; and
    `suppress`: the bridge itself answers ARP and NDP for the neighbours behind this port. With `hairpin` frames may
    leave by the port that they came from.
    """
    flags = {
        rt.BRPORT_LEARNING: learning,
        rt.BRPORT_UNICAST_FLOOD: flood,
        rt.BRPORT_BCAST_FLOOD: broadcast,
        rt.BRPORT_MCAST_FLOOD: multicast,
        rt.BRPORT_NEIGH_SUPPRESS: suppress,
        rt.BRPORT_HAIRPIN: hairpin,
    }
    data = rtattr.nested(*((flag, None if value is None else bytes([value])) for flag, value in flags.items()))
    info = rtattr.nested((rt.INFO_SLAVE_KIND, b"bridge\0"), (rt.INFO_SLAVE_DATA | rtattr.NESTED, data))
    return Request(
        f"set bridge port {index}",
        rt.RTM_NEWLINK,
        0,
        _link_body(index)
        + rtattr.attributes(
            (rt.IFLA_IFALIAS, None if alias is None else rtattr.text(alias)), (rt.IFLA_LINKINFO | rtattr.NESTED, info)
        ),
    )


def delete_link(*, index: int = 0, name: str | None = None) -> Request:
    """Delete a link, with the other end of a veth pair; no error if it is gone."""
    body = _link_body(index) + rtattr.attributes((rt.IFLA_IFNAME, name and rtattr.text(name)))
    return Request(f"delete link {name or index}", rt.RTM_DELLINK, 0, body, ignore=frozenset({_ENODEV}))


def set_link_group(index: int, group: int) -> Request:
    """Set a link's group (ip-link(8)); no error if it is gone."""
    body = _link_body(index) + rtattr.attributes((rt.IFLA_GROUP, rtattr.u32(group)))
    return Request(f"set group of link {index}", rt.RTM_NEWLINK, 0, body, ignore=frozenset({_ENODEV}))


def delete_links(group: int) -> Request:
    """Delete all links of a group at once; no error if there are none."""
    body = _link_body(0) + rtattr.attributes((rt.IFLA_GROUP, rtattr.u32(group)))
    return Request(f"delete links of group {group}", rt.RTM_DELLINK, 0, body, ignore=frozenset({_ENODEV}))


def add_address(index: int, address: str) -> Request:
    """Add `address`, with prefix length, to a link; usable at once, without duplicate address detection (RFC 4862)."""
    body = _address_body(index, address) + rtattr.attributes((rt.IFA_FLAGS, rtattr.u32(rt.IFA_F_NODAD)))
    return Request(f"add address {address}", rt.RTM_NEWADDR, CREATE | REPLACE, body)


def delete_address(index: int, address: str) -> Request:
    """Delete an address; no error if it is gone."""
    ignore = frozenset({_ENODEV, _EADDRNOTAVAIL})
    return Request(f"delete address {address}", rt.RTM_DELADDR, 0, _address_body(index, address), ignore)


def add_route(destination: str, *, index: int, gateway: str | None = None, table: int = MAIN_TABLE) -> Request:
    """Add a route to `destination`, in CIDR notation, through a gateway or directly through the link. `table` is the
    number of a routing table below 256."""
    network, _, length = destination.partition("/")
    family, packed = _packed(network)
    scope = 0 if gateway else 253  # RT_SCOPE_UNIVERSE, RT_SCOPE_LINK
    protocol_static, unicast = 4, 1
    body = rt.ROUTE.pack(family, int(length), 0, 0, table, protocol_static, scope, unicast, 0) + rtattr.attributes(
        (rt.RTA_DST, packed if int(length) else None),
        (rt.RTA_OIF, rtattr.u32(index)),
        (rt.RTA_GATEWAY, gateway and _packed(gateway)[1]),
    )
    return Request(f"add route {destination}", rt.RTM_NEWROUTE, CREATE | REPLACE, body)


def add_source_rule(source: str, table: int) -> Request:
    """Add a rule (ip-rule(8)): packets from the address `source` are routed by `table`. No error if it is there."""
    return Request(f"add rule for {source}", rt.RTM_NEWRULE, CREATE | EXCLUSIVE, _rule(source, table), _EXISTS)


def delete_source_rule(source: str, table: int) -> Request:
    """Delete a rule that `add_source_rule` has added; no error if it is gone."""
    ignore = frozenset({_ENOENT})
    return Request(f"delete rule for {source}", rt.RTM_DELRULE, 0, _rule(source, table), ignore)


def _rule(source: str, table: int) -> bytes:
    family, packed = _packed(source)
    to_table = 1  # FR_ACT_TO_TBL
    return rt.RULE.pack(family, 0, len(packed) * 8, 0, table, 0, 0, to_table, 0) + rtattr.attributes(
        (rt.FRA_SRC, packed), (rt.FRA_PRIORITY, rtattr.u32(_RULES + table))
    )


def add_route_in(route: Route, *, protocol: int) -> Request:
    """Add a route to a table. It replaces one to the same destination; its gateway is taken to be on the link."""
    flags = rt.RTNH_F_ONLINK if route.gateway else 0
    body = _route_body(route, protocol, flags)
    return Request(f"add route {route.destination}", rt.RTM_NEWROUTE, CREATE | REPLACE, body)


def delete_route_in(route: Route) -> Request:
    """Delete a route from a table; no error if it is gone."""
    ignore = frozenset({_ESRCH, _ENODEV})
    return Request(f"delete route {route.destination}", rt.RTM_DELROUTE, 0, _route_body(route, 0, 0), ignore)


def _route_body(route: Route, protocol: int, flags: int) -> bytes:
    network, _, length = route.destination.partition("/")
    family, packed = _packed(network)
    scope = 255 if not protocol else 0 if route.gateway else 253  # RT_SCOPE_NOWHERE (any), _UNIVERSE, _LINK
    return rt.ROUTE.pack(family, int(length), 0, 0, 0, protocol, scope, rt.RTN_UNICAST, flags) + rtattr.attributes(
        (rt.RTA_TABLE, rtattr.u32(route.table)),
        (rt.RTA_DST, packed if int(length) else None),
        (rt.RTA_OIF, rtattr.u32(route.link)),
        (rt.RTA_GATEWAY, route.gateway and _packed(route.gateway)[1]),
        (rt.RTA_PREFSRC, route.source and _packed(route.source)[1]),
    )


def add_rule(rule: Rule, *, protocol: int) -> Request:
    """Add a rule of policy routing; no error if it exists."""
    body = _rule_body(rule) + rtattr.attributes((rt.FRA_PROTOCOL, bytes([protocol])))
    return Request(f"add rule for {rule.device}", rt.RTM_NEWRULE, CREATE | EXCLUSIVE, body, _EXISTS)


def delete_rule(rule: Rule) -> Request:
    """Delete a rule; no error if it is gone."""
    return Request(f"delete rule for {rule.device}", rt.RTM_DELRULE, 0, _rule_body(rule), frozenset({_ENOENT}))


def _rule_body(rule: Rule) -> bytes:
    short = struct.pack("=i", rule.short) if rule.short >= 0 else None
    return rt.ROUTE.pack(rule.family, 0, 0, 0, 0, 0, 0, rt.FR_ACT_TO_TBL, 0) + rtattr.attributes(
        (rt.FRA_TABLE, rtattr.u32(rule.table)),
        (rt.FRA_PRIORITY, rtattr.u32(rule.priority)),
        (rt.FRA_IIFNAME, rtattr.text(rule.device) if rule.device else None),
        (rt.FRA_SUPPRESS_PREFIXLEN, short),
    )


def add_neighbour(index: int, address: str, mac: str) -> Request:
    """Add a permanent entry to the ARP or NDP table: the kernel never resolves or expires it."""
    family, packed = _packed(address)
    body = rt.NEIGH.pack(family, index, rt.NUD_PERMANENT, 0, 0) + rtattr.attributes(
        (rt.NDA_DST, packed), (rt.NDA_LLADDR, rtattr.mac(mac))
    )
    return Request(f"add neighbour {address}", rt.RTM_NEWNEIGH, CREATE | REPLACE, body)


def delete_neighbour(index: int, address: str) -> Request:
    """Delete an entry; no error if it is gone."""
    family, packed = _packed(address)
    body = rt.NEIGH.pack(family, index, 0, 0, 0) + rtattr.attributes((rt.NDA_DST, packed))
    ignore = frozenset({_ENOENT, _ENXIO, _ENODEV, _EINVAL})  # EINVAL where the link has no IPv6
    return Request(f"delete neighbour {address}", rt.RTM_DELNEIGH, 0, body, ignore)


def set_retransmission(index: int, milliseconds: int, *, ipv6: bool) -> Request:
    """Set a link's time between two requests for a neighbour's MAC address (RTM_SETNEIGHTBL, arp(7))."""
    family, table = (socket.AF_INET6, "ndisc_cache") if ipv6 else (socket.AF_INET, "arp_cache")
    parameters = rtattr.nested(
        (rt.NDTPA_IFINDEX, rtattr.u32(index)), (rt.NDTPA_RETRANS_TIME, struct.pack("=Q", milliseconds))
    )
    body = struct.pack("=Bxxx", family) + rtattr.attributes(
        (rt.NDTA_NAME, rtattr.text(table)), (rt.NDTA_PARMS | rtattr.NESTED, parameters)
    )
    return Request(f"set {table} of {index}", rt.RTM_SETNEIGHTBL, 0, body)


def add_forwarding(index: int, mac: str, *, remote: str | None = None, vni: int | None = None) -> Request:
    """Add a forwarding entry (bridge(8) fdb): frames to `mac` leave by this bridge port or VXLAN device.

    Those of a VXLAN device go to the host `remote`, with another VNI than the device's if `vni` is one.
    """
    state, place = (rt.NUD_PERMANENT, rt.NTF_SELF) if remote else (rt.NUD_NOARP, rt.NTF_MASTER)
    body = rt.NEIGH.pack(socket.AF_BRIDGE, index, state, place, 0)
    body += rtattr.attributes(
        (rt.NDA_LLADDR, rtattr.mac(mac)),
        (rt.NDA_DST, remote and _packed(remote)[1]),
        (rt.NDA_VNI, None if vni is None else rtattr.u32(vni)),
    )
    return Request(f"add forwarding entry {mac}", rt.RTM_NEWNEIGH, CREATE | REPLACE, body)


def delete_forwarding(index: int, mac: str, *, remote: bool = False) -> Request:
    """Delete a forwarding entry of a bridge port, or with `remote` that of a VXLAN device; no error if it is gone."""
    body = rt.NEIGH.pack(socket.AF_BRIDGE, index, 0, rt.NTF_SELF if remote else rt.NTF_MASTER, 0)
    body += rtattr.attributes((rt.NDA_LLADDR, rtattr.mac(mac)))
    ignore = frozenset({_ENOENT, _ENODEV})
    return Request(f"delete forwarding entry {mac}", rt.RTM_DELNEIGH, 0, body, ignore)


def _new_link(
    what: str,
    name: str,
    index: int,
    info: bytes,
    *,
    mac: str | None = None,
    mtu: int | None = None,
    master: int | None = None,
    netns: int | None = None,
) -> Request:
    body = _link_body(index, rt.IFF_UP) + rtattr.attributes(
        (rt.IFLA_IFNAME, rtattr.text(name)),
        (rt.IFLA_NET_NS_FD, None if netns is None else rtattr.u32(netns)),
        (rt.IFLA_ADDRESS, mac and rtattr.mac(mac)),
        (rt.IFLA_MTU, mtu and rtattr.u32(mtu)),
        (rt.IFLA_MASTER, master and rtattr.u32(master)),
        (rt.IFLA_LINKINFO | rtattr.NESTED, info),
    )
    return Request(f"add {what}", rt.RTM_NEWLINK, CREATE | EXCLUSIVE, body)


def _link_body(index: int, flags: int = 0) -> bytes:
    return rt.LINK.pack(0, 0, index, flags, flags)


def _address_body(index: int, address: str) -> bytes:
    ip, _, length = address.partition("/")
    family, packed = _packed(ip)
    return rt.ADDR.pack(family, int(length), 0, 0, index) + rtattr.attributes(
        (rt.IFA_LOCAL, packed), (rt.IFA_ADDRESS, packed)
    )


def _packed(address: str) -> tuple[int, bytes]:
    """Return family and bytes of an IP address. ipaddress takes 10 to 20 us each, and a port has a dozen."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)
