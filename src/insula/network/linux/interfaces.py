"""Addresses and routes inside an instance, at the other ends of its ports.

The first port, the one with the lowest interface, has the default routes. An instance with several ports has a routing
table for each (ip-rule(8)): what is sent from a port's address leaves by that port, so that an answer takes the way of
its question, and is not dropped as a forged address by the rules at another port. What is sent from no address yet, as
by a client, is routed by the main table: to the network of a port by that port, and to others by the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.model.errors import Failed
from insula.model.objects import Network, Port
from insula.network.addresses import gateway_mac
from insula.network.fabric import Places
from insula.network.linux.state import prefix

_LOOPBACK = 1
_TABLES: Final = 100  # the routing table of eth0
RETRANSMIT: Final = 100
"""Milliseconds between two requests for a neighbour's MAC address.

All namespaces of the host share the neighbour tables (arp(7), gc_thresh3), and an entry that waits for a reply can't be
evicted. It waits for three requests (mcast_solicit), here 0.3 s instead of the usual 3 s. A neighbour on the same host
replies much faster.
"""


class InterfaceAddress(NamedTuple):
    """An address of a port, and the gateway and subnet there."""

    address: str
    gateway: str
    subnet: str

    @property
    def with_prefix(self) -> str:
        return f"{self.address}/{prefix(self.subnet)}"

    @property
    def everything(self) -> str:
        """The destination of default routes."""
        return "::/0" if ":" in self.gateway else "0.0.0.0/0"


def addresses_of(network: Network, port: Port) -> list[InterfaceAddress]:
    """Return one for each IP version of the port."""
    found = [InterfaceAddress(port.address, network.gateway, network.subnet)]
    if port.address6 and network.subnet6 and network.gateway6:
        found.append(InterfaceAddress(port.address6, network.gateway6, network.subnet6))
    return found


def gateways(network: Network, port: Port) -> list[str]:
    """Return the gateways of a port."""
    return [each.gateway for each in addresses_of(network, port)]


def configure(inside: Rtnl, network: Network, port: Port, beside: Places) -> None:
    """Set up loopback and the port's device, with addresses and routes. `beside` are the instance's other ports."""
    index, mac = _index(inside, port), gateway_mac(network.index)
    requests = [netlink.set_link(_LOOPBACK, up=True), netlink.set_link(index, up=True)]
    for each in addresses_of(network, port):
        requests += [
            netlink.set_retransmission(index, RETRANSMIT, ipv6=":" in each.gateway),
            netlink.add_address(index, each.with_prefix),
            netlink.add_neighbour(index, each.gateway, mac),
        ]
    requests += default_routes(inside, network, port, beside)
    if beside:
        for place in ((network, port), *beside):
            requests += _table(inside, *place)
    inside.execute(*requests)


def default_routes(inside: Rtnl, network: Network, port: Port, beside: Places) -> Iterator[Request]:
    """Yield requests for the default routes through a port, for each IP version of which it is the first port."""
    index, earlier = _index(inside, port), [other for other in beside if number(other[1]) < number(port)]
    taken = {each.everything for place in earlier for each in addresses_of(*place)}
    for each in addresses_of(network, port):
        if each.everything not in taken:
            yield netlink.add_route(each.everything, index=index, gateway=each.gateway)


def forget(inside: Rtnl, network: Network, port: Port, beside: Places) -> None:
    """Remove the rules of a port whose device is gone, and restore default routes that were through it. `beside` are
    the instance's other ports."""
    table = _TABLES + number(port)
    requests = [netlink.delete_source_rule(each.address, table) for each in addresses_of(network, port)]
    for position, place in enumerate(beside):
        requests += default_routes(inside, *place, [*beside[:position], *beside[position + 1 :]])
    inside.execute(*requests)


def _table(inside: Rtnl, network: Network, port: Port) -> Iterator[Request]:
    """Yield requests for the routing table of a port: its own network, and everything else through its gateway."""
    index, table = _index(inside, port), _TABLES + number(port)
    for each in addresses_of(network, port):
        yield netlink.add_route(each.subnet, index=index, table=table)
        yield netlink.add_route(each.everything, index=index, gateway=each.gateway, table=table)
        yield netlink.add_source_rule(each.address, table)


def _index(inside: Rtnl, port: Port) -> int:
    index = inside.index(port.interface)
    if index is None:
        raise Failed(f"{port.interface} of {port.instance} is missing", "start the instance again")
    return index


def number(port: Port) -> int:
    """Return the number in the name of the port's interface."""
    return int(port.interface.removeprefix("eth"))
