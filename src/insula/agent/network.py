"""The network of a machine: its devices are found by their MAC addresses, and get addresses and routes.

The host tells them, as it sets those of a container from outside. A device that a copy has from its original has the
original's MAC address; the host names both.
"""

from __future__ import annotations

import contextlib

from insula.kernel.netlink import requests
from insula.kernel.netlink.rtnetlink import Rtnl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SETTINGS = {
    "ipv4/ip_unprivileged_port_start": "0",
    "ipv4/ping_group_range": "0 2147483647",
    **{
        f"ipv6/conf/{scope}/{name}": "0"
        for scope in ("all", "default")
        for name in ("accept_ra", "autoconf", "accept_redirects", "accept_dad")
    },
}


def raise_loopback() -> None:
    """Set the device lo up: programs talk to themselves over it."""
    with Rtnl() as rtnl:
        rtnl.execute(requests.set_link(1, up=True))


def configure(interfaces: list[dict[str, Any]], routes: list[dict[str, Any]]) -> None:
    """Configure devices: `hardware` is the MAC address that one has, `mac` the one that it is to have, `name`, `mtu`
    and `addresses` with prefix lengths; routes have `destination`, `gateway` with its MAC address `hardware`, and the
    device's name. OSError.

    As in a container the gateway needs no discovery, and nothing is taken from router advertisements.
    """
    for path, value in _SETTINGS.items():
        with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/net/{path}", "w") as file:
            file.write(value)
    with Rtnl() as rtnl:
        found = {link.mac: link for link in rtnl.links()}
        index: dict[str, int] = {}
        for each in interfaces:
            link = found.get(each["hardware"])
            if link is None:
                raise OSError(19, f"there is no device {each['hardware']}")
            number = index[each["name"]] = link.index
            rtnl.execute(
                requests.set_link(number, name=each["name"], mac=each["mac"], mtu=each["mtu"]),
                requests.set_link(number, up=True),
                *(requests.add_address(number, address) for address in each["addresses"]),
            )
        rtnl.execute(
            *(
                request
                for each in routes
                for request in (
                    requests.add_neighbour(index[each["interface"]], each["gateway"], each["hardware"]),
                    requests.add_route(each["destination"], index=index[each["interface"]], gateway=each["gateway"]),
                )
            )
        )
