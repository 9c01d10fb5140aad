"""An end of a packet that `insula trace` follows."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from insula.model.objects import Network, Port
from insula.network.endpoints import port_name
from insula.network.intent import TenantIntent


@dataclass(frozen=True)
class TraceEnd:
    """One end: an instance's port, the router of a network (`gateway`), or an address elsewhere. `name` is how it was
    asked for. `mac` is the port's MAC address for this address."""

    name: str
    address: str
    port: Port | None = None
    gateway: Network | None = None
    mac: str | None = None

    @property
    def words(self) -> str:
        """The end in words."""
        if self.port:
            return f"{port_name(self.port)} ({self.address})"
        if self.gateway:
            return f"the gateway of network {self.gateway.name} ({self.address})"
        if self.name == "outside":
            return f"the outside ({self.address})"
        return self.address if self.name == self.address else f"{self.name} ({self.address})"


def holders(intent: TenantIntent, address: str) -> list[tuple[Port, str]]:
    """Return the port that has an address, or else those that may use it, each with its MAC address there."""
    own = [(port, port.mac) for port in intent.ports if address in (port.address, port.address6)]
    return own or [
        (port, pair.mac or port.mac)
        for port in intent.ports
        for pair in port.allowed_pairs
        if "/" not in pair.address and ip_address(pair.address) == ip_address(address)
    ]
