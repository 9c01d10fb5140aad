"""Routes to single addresses through one device, unreachable ranges, and addresses that a device answers for (proxy ARP
and NDP; arp(7)).

A device answers requests for a proxied address if the route to the address leads through another device.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from typing import Final

from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink import messages as rt
from insula.kernel.netlink.rtnetlink import Rtnl
from insula.kernel.netlink.socket import CREATE, REPLACE, Request

_MAIN, _LOCAL = 254, 255  # tables
_STATIC = 4  # RTPROT_STATIC
_UNICAST, _TO_LOCAL, _UNREACHABLE = 1, 2, 7  # RTN_UNICAST, RTN_LOCAL, RTN_UNREACHABLE
_UNIVERSE, _LINK, _HOST, _NOWHERE = 0, 253, 254, 255  # scopes
_RTA_PRIORITY = 6
_NTF_PROXY = 8
_GONE: Final = frozenset({2, 3, 6, 19, 22, 99})  # ENOENT, ESRCH, ENXIO, ENODEV, EINVAL (no IPv6), EADDRNOTAVAIL
_AFTER_LOOPBACK: Final = 2048
_LAST: Final = 0x7FFFFFFE
"""The metric of an unreachable range: one that a device has as well is reached by the device."""


def add(address: str, index: int, gateway: str | None = None) -> Request:
    """Add a route to an address through the link, and a gateway there."""
    scope = _UNIVERSE if gateway or ":" in address else _LINK
    body = _route(address, index, _MAIN, scope, _UNICAST, gateway)
    return Request(f"add a route to {address}", rt.RTM_NEWROUTE, CREATE | REPLACE, body)


def delete(address: str, index: int) -> Request:
    """Delete a route to an address through the link; no error if it is gone."""
    body = _route(address, index, _MAIN, _NOWHERE, _UNICAST)
    return Request(f"delete the route to {address}", rt.RTM_DELROUTE, 0, body, _GONE)


def add_local(address: str, index: int) -> Request:
    """Make packets to an address that come from this link be for this host.

    IPv6 looks for ::1 among the routes of the link that a packet came from only.
    """
    body = _route(address, index, _LOCAL, _UNIVERSE if ":" in address else _HOST, _TO_LOCAL, metric=_AFTER_LOOPBACK)
    return Request(f"add a local route to {address}", rt.RTM_NEWROUTE, CREATE | REPLACE, body)


def delete_local(address: str, index: int) -> Request:
    """Undo `add_local`; no error if it is gone."""
    body = _route(address, index, _LOCAL, _NOWHERE, _TO_LOCAL, metric=_AFTER_LOOPBACK)
    return Request(f"delete the local route to {address}", rt.RTM_DELROUTE, 0, body, _GONE)


def read(rtnl: Rtnl, index: int) -> dict[str, str | None]:
    """Return the gateways of the routes to single addresses through a link, by address."""
    found: dict[str, str | None] = {}
    for family, length in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
        body = rt.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + rtattr.attributes((rt.RTA_OIF, rtattr.u32(index)))
        for answer in rtnl.dump(rt.RTM_GETROUTE, body):
            attributes = rtattr.parse(answer[rt.ROUTE.size :])
            through = rtattr.integer(attributes.get(rt.RTA_OIF, bytes(4)))
            if (answer[1], answer[4], answer[7], through) != (length, _MAIN, _UNICAST, index):
                continue
            gateway = attributes.get(rt.RTA_GATEWAY)
            found[str(ip_address(attributes[rt.RTA_DST]))] = str(ip_address(gateway)) if gateway else None
    return found


def add_unreachable(network: str) -> Request:
    """Add a route that answers packets to a range with ICMP "host unreachable" (ip-route(8)); CIDR notation."""
    return Request(f"make {network} unreachable", rt.RTM_NEWROUTE, CREATE | REPLACE, _unreachable(network, _STATIC))


def delete_unreachable(network: str) -> Request:
    """Undo `add_unreachable`; no error if it is gone."""
    return Request(f"delete the unreachable {network}", rt.RTM_DELROUTE, 0, _unreachable(network, 0), _GONE)


def unreachable(rtnl: Rtnl) -> set[str]:
    """Return the ranges that `add_unreachable` has added, in CIDR notation."""
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for answer in rtnl.dump(rt.RTM_GETROUTE, rt.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            attributes = rtattr.parse(answer[rt.ROUTE.size :])
            metric = rtattr.integer(attributes.get(_RTA_PRIORITY, bytes(4)))
            if (answer[4], answer[7], metric) == (_MAIN, _UNREACHABLE, _LAST) and rt.RTA_DST in attributes:
                found.add(f"{ip_address(attributes[rt.RTA_DST])}/{answer[1]}")
    return found


def add_proxy(address: str, index: int) -> Request:
    """Have the link answer for an address that it doesn't have."""
    return Request(f"answer for {address}", rt.RTM_NEWNEIGH, CREATE | REPLACE, _proxy(address, index))


def delete_proxy(address: str, index: int) -> Request:
    """Undo `add_proxy`; no error if it is gone."""
    return Request(f"answer no longer for {address}", rt.RTM_DELNEIGH, 0, _proxy(address, index), _GONE)


def proxies(rtnl: Rtnl) -> set[tuple[str, int]]:
    """Return (address, index of the link) of all addresses that links answer for."""
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for answer in rtnl.dump(rt.RTM_GETNEIGH, rt.NEIGH.pack(family, 0, 0, _NTF_PROXY, 0)):
            attributes = rtattr.parse(answer[rt.NEIGH.size :])
            if rt.NDA_DST in attributes:
                found.add((str(ip_address(attributes[rt.NDA_DST])), int(rt.NEIGH.unpack_from(answer)[1])))
    return found


def _route(
    address: str, index: int, table: int, scope: int, kind: int, gateway: str | None = None, metric: int | None = None
) -> bytes:
    family, packed = _packed(address)
    protocol = _STATIC if scope != _NOWHERE else 0
    return rt.ROUTE.pack(family, 8 * len(packed), 0, 0, table, protocol, scope, kind, 0) + rtattr.attributes(
        (rt.RTA_DST, packed),
        (rt.RTA_OIF, rtattr.u32(index)),
        (rt.RTA_GATEWAY, gateway and _packed(gateway)[1]),
        (_RTA_PRIORITY, metric and rtattr.u32(metric)),
    )


def _unreachable(network: str, protocol: int) -> bytes:
    whole = ip_network(network)
    family = socket.AF_INET if whole.version == 4 else socket.AF_INET6
    scope = _UNIVERSE if protocol else _NOWHERE
    return rt.ROUTE.pack(family, whole.prefixlen, 0, 0, _MAIN, protocol, scope, _UNREACHABLE, 0) + rtattr.attributes(
        (rt.RTA_DST, whole.network_address.packed), (_RTA_PRIORITY, rtattr.u32(_LAST))
    )


def _proxy(address: str, index: int) -> bytes:
    family, packed = _packed(address)
    return rt.NEIGH.pack(family, index, 0, _NTF_PROXY, 0) + rtattr.attributes((rt.NDA_DST, packed))


def _packed(address: str) -> tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)
