"""What a guest is told of its network: the agent sets it, as the fabric does for a container."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from typing import Any, Final, NamedTuple

from insula.machine.qemu.template import INTERFACES
from insula.model.objects import Network, Port
from insula.network.addresses import gateway_mac

_TABLES: Final = 100  # the routing table of eth0


class _Way(NamedTuple):
    address: str
    subnet: str
    gateway: str

    @property
    def everything(self) -> str:
        return "::/0" if ":" in self.gateway else "0.0.0.0/0"


def plan(ports: Sequence[Port], networks: Sequence[Network], hardware: Sequence[str] | None = None) -> dict[str, Any]:
    """The agent's request `network` for these ports, which are on these networks. As in a container the first port has
    the default routes, and each has a table of its own if there are several (`insula.network.linux.interfaces`).
    `hardware` are the MAC addresses that the devices have before; without them those of a template."""
    known = hardware or [each.mac for each in INTERFACES]
    interfaces: list[dict[str, Any]] = []
    routes: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    first: set[str] = set()
    for before, port, network in zip(known, ports, networks, strict=False):
        ways = list(_ways(port, network))
        interfaces.append(
            {
                "hardware": before,
                "name": port.interface,
                "port": port.index,
                "mac": port.mac,
                "mtu": network.mtu,
                "addresses": [f"{each.address}/{ip_network(each.subnet).prefixlen}" for each in ways],
            }
        )
        routes += [
            {
                "destination": each.everything,
                "gateway": each.gateway,
                "hardware": gateway_mac(network.index),
                "interface": port.interface,
                "default": each.everything not in first,
            }
            for each in ways
        ]
        first |= {each.everything for each in ways}
        table = _TABLES + number(port)
        tables += [{**each._asdict(), "interface": port.interface, "number": table} for each in ways]
    return {"interfaces": interfaces, "routes": routes, "tables": tables if len(ports) > 1 else []}


def device(port: Port, network: Network) -> dict[str, Any]:
    """The network device of a port, as the shim plugs it in (`insula.machine.shim.hotplug`)."""
    return {"index": port.index, "number": number(port), "mac": port.mac, "mtu": network.mtu}


def number(port: Port) -> int:
    """The number of a port's interface: 1 of eth1."""
    return int(port.interface.removeprefix("eth"))


def _ways(port: Port, network: Network) -> Iterator[_Way]:
    yield _Way(port.address, network.subnet, network.gateway)
    if port.address6 and network.subnet6 and network.gateway6:
        yield _Way(port.address6, network.subnet6, network.gateway6)
