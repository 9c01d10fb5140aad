"""What a guest is told of its network: the agent sets it, as the fabric does for a container."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from typing import Any, NamedTuple

from insula.machine.qemu.template import INTERFACES
from insula.model.objects import Network, Port
from insula.network.addresses import gateway_mac


class _Way(NamedTuple):
    address: str
    subnet: str
    gateway: str

    @property
    def everything(self) -> str:
        return "::/0" if ":" in self.gateway else "0.0.0.0/0"


def plan(ports: Sequence[Port], networks: Sequence[Network]) -> dict[str, Any]:
    """The agent's request `network` for these ports, which are on these networks. A guest has at most one port."""
    interfaces, routes = [], []
    for device, port, network in zip(INTERFACES, ports, networks, strict=False):
        ways = list(_ways(port, network))
        interfaces.append(
            {
                "hardware": device.mac,
                "name": port.interface,
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
            }
            for each in ways
        ]
    return {"interfaces": interfaces, "routes": routes}


def _ways(port: Port, network: Network) -> Iterator[_Way]:
    yield _Way(port.address, network.subnet, network.gateway)
    if port.address6 and network.subnet6 and network.gateway6:
        yield _Way(port.address6, network.subnet6, network.gateway6)
