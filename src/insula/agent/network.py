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
    from collections.abc import Iterator
    from typing import Any

    from insula.kernel.netlink import Request
    from insula.kernel.netlink.messages import Link

_SETTINGS = {
    "ipv4/ip_unprivileged_port_start": "0",
    "ipv4/ping_group_range": "0 2147483647",
    **{
        f"ipv6/conf/{scope}/{name}": "0"
        for scope in ("all", "default")
        for name in ("accept_ra", "autoconf", "accept_redirects", "accept_dad")
    },
}


_known: dict[str, Link] = {}
"""The devices by their MAC addresses, as the machine was booted with them: a copy need not look for them."""
_sockets: list[Rtnl] = []
"""The socket that was opened then."""


def prepare() -> None:
    """Do what is the same for all machines: settings, and the device lo up. Nothing is taken from router
    advertisements, as in a container."""
    for path, value in _SETTINGS.items():
        with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/net/{path}", "w") as file:
            file.write(value)
    _sockets.append(rtnl := Rtnl())
    rtnl.execute(requests.set_link(1, up=True))
    _known.update({link.mac: link for link in rtnl.links()})


class Configured:
    """What was configured: the devices by the names of their interfaces, and what the host has told of these."""

    def __init__(self, index: dict[str, int], interfaces: list[dict[str, Any]], tables: list[dict[str, Any]]) -> None:
        self.index, self.interfaces, self.tables = index, interfaces, tables


def configure(
    interfaces: list[dict[str, Any]],
    routes: list[dict[str, Any]],
    tables: list[dict[str, Any]],
    *,
    before: Configured | None = None,
) -> Configured:
    """Configure devices: `hardware` is the MAC address that one has, `mac` the one that it is to have, `name`, `mtu`
    and `addresses` with prefix lengths; routes have `destination`, `gateway` with its MAC address `hardware`, the
    device's name, and whether they are `default` routes. What is sent from an `address` is routed by its table, with
    `number`, `subnet` and `gateway`. OSError.

    As in a container the gateway needs no discovery. What was configured `before` is removed, and its devices are used
    in their order: this machine has the memory of another one.
    """
    [rtnl] = _sockets
    if before:
        hardware = (each["hardware"] for each in interfaces)
        devices = dict(zip(hardware, ((number, "") for number in _remove(rtnl, before)), strict=False))
    else:
        devices = {link.mac: (link.index, link.name) for link in _known.values()}
    devices = {each["name"]: devices[each["hardware"]] for each in interfaces if each["hardware"] in devices}
    for name, (number, named) in devices.items():
        if named != name:
            rtnl.execute(requests.set_link(number, name=f"spare{number}"))  # so that names may be exchanged
    return _configured(rtnl, devices, interfaces, routes, tables)


def reconfigure(
    interfaces: list[dict[str, Any]],
    routes: list[dict[str, Any]],
    tables: list[dict[str, Any]],
    before: Configured,
) -> Configured:
    """Configure the network again, with other devices, while programs use it: those that stay are not disturbed. ENODEV
    if a device is not there yet; then nothing has changed."""
    [rtnl] = _sockets
    links = rtnl.links()
    found = {each["name"]: _find(links, each, before) for each in interfaces}
    rtnl.execute(*_without_rules([each for each in before.tables if each not in tables]))
    for each in before.interfaces:
        number = before.index[each["name"]]
        if each["name"] not in found and number in {link.index for link in links}:
            rtnl.execute(*_without_addresses(number, each["addresses"]))
    for link in links:
        if link.name in found and link.index != found[link.name][0]:
            number = link.index
            rtnl.execute(requests.set_link(number, up=False), requests.set_link(number, name=f"spare{number}"))
    return _configured(rtnl, found, interfaces, routes, tables)


def _find(links: list[Link], wanted: dict[str, Any], before: Configured) -> tuple[int, str]:
    """Index and name of a device: it has the wanted MAC address, or is known under the name already."""
    known = before.index.get(wanted["name"]) if wanted in before.interfaces else None
    for link in links:
        if link.mac == wanted["mac"] or link.index == known:
            return link.index, link.name
    raise _no_device(wanted["mac"])


def _configured(
    rtnl: Rtnl,
    devices: dict[str, tuple[int, str]],
    interfaces: list[dict[str, Any]],
    routes: list[dict[str, Any]],
    tables: list[dict[str, Any]],
) -> Configured:
    """Configure `devices`, index and present name by the name of the interface."""
    index: dict[str, int] = {}
    for each in interfaces:
        name = each["name"]
        if name not in devices:
            raise _no_device(each["hardware"])
        number, named = devices[name]
        index[name] = number
        renamed = {} if named == name else {"name": name}
        rtnl.execute(
            requests.set_link(number, mac=each["mac"], mtu=each["mtu"], up=True, **renamed),
            *(requests.add_address(number, address) for address in each["addresses"]),
        )
    rtnl.execute(*_routes(index, routes), *_tables(index, tables))
    return Configured(index, interfaces, tables)


def _no_device(hardware: str) -> OSError:
    return OSError(19, f"there is no device {hardware}")


def renew_gateways(routes: list[dict[str, Any]]) -> None:
    """Take on the MAC addresses of gateways, which another host may have given others. OSError."""
    with Rtnl() as rtnl:
        index = {link.name: link.index for link in rtnl.links()}
        rtnl.execute(
            *(requests.add_neighbour(index[each["interface"]], each["gateway"], each["hardware"]) for each in routes)
        )


def _remove(rtnl: Rtnl, before: Configured) -> list[int]:
    """Remove what was configured, and return the devices. Their routes and neighbours go when they are set down."""
    for each in before.interfaces:
        rtnl.execute(*_without_addresses(before.index[each["name"]], each["addresses"]))
    rtnl.execute(*_without_rules(before.tables))
    return [*before.index.values()]


def _without_addresses(number: int, addresses: list[str]) -> list[Request]:
    return [requests.set_link(number, up=False), *(requests.delete_address(number, each) for each in addresses)]


def _without_rules(tables: list[dict[str, Any]]) -> list[Request]:
    return [requests.delete_source_rule(each["address"], each["number"]) for each in tables]


def _routes(index: dict[str, int], routes: list[dict[str, Any]]) -> Iterator[Request]:
    for each in routes:
        number = index[each["interface"]]
        yield requests.add_neighbour(number, each["gateway"], each["hardware"])
        if each["default"]:
            yield requests.add_route(each["destination"], index=number, gateway=each["gateway"])


def _tables(index: dict[str, int], tables: list[dict[str, Any]]) -> Iterator[Request]:
    """A table for each address: what is sent from it leaves by its device, as answers have to."""
    for each in tables:
        number, gateway, table = index[each["interface"]], each["gateway"], each["number"]
        everything = "::/0" if ":" in gateway else "0.0.0.0/0"
        yield requests.add_route(each["subnet"], index=number, table=table)
        yield requests.add_route(everything, index=number, gateway=gateway, table=table)
        yield requests.add_source_rule(each["address"], table)
