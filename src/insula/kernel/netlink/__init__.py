"""Netlink: network devices, addresses, routes and neighbours of a network namespace; netlink(7), rtnetlink(7).

attributes.py   packing and parsing attributes
socket.py       a socket: batches of requests, dumps, errors
messages.py     numbers and structures of rtnetlink
requests.py     functions that build rtnetlink requests
rtnetlink.py    `Rtnl`, a socket that sends them and reads tables
devices.py      moving a device to another network namespace
port_ids.py     which sockets are this process's
monitor.py      what the kernel tells of changes
traffic_control.py   queueing disciplines, classes and filters
nftables.py     elements of nftables' sets, and recorded rules
"""

from __future__ import annotations

from insula.kernel.netlink.requests import (
    add_address,
    add_forwarding,
    add_neighbour,
    add_route,
    add_route_in,
    add_rule,
    add_source_rule,
    bridge,
    delete_address,
    delete_forwarding,
    delete_link,
    delete_links,
    delete_neighbour,
    delete_route_in,
    delete_rule,
    delete_source_rule,
    ifb,
    move_link,
    set_bridge_port,
    set_link,
    set_link_group,
    set_retransmission,
    veth,
    vxlan,
)
from insula.kernel.netlink.rtnetlink import Rtnl
from insula.kernel.netlink.socket import NetlinkError, Request

__all__ = [
    "NetlinkError",
    "Request",
    "Rtnl",
    "add_address",
    "add_forwarding",
    "add_neighbour",
    "add_route",
    "add_route_in",
    "add_rule",
    "add_source_rule",
    "bridge",
    "delete_address",
    "delete_forwarding",
    "delete_link",
    "delete_links",
    "delete_neighbour",
    "delete_route_in",
    "delete_rule",
    "delete_source_rule",
    "ifb",
    "move_link",
    "set_bridge_port",
    "set_link",
    "set_link_group",
    "set_retransmission",
    "veth",
    "vxlan",
]
