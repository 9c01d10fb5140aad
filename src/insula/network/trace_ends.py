"""An end of a packet that `insula trace` follows."""

from __future__ import annotations

from dataclasses import dataclass

from insula.model.objects import Network, Port
from insula.network.endpoints import port_name


@dataclass(frozen=True)
class TraceEnd:
    """One end: an instance's port, the router of a network (`gateway`), or an address elsewhere. `name` is how it was
    asked for."""

    name: str
    address: str
    port: Port | None = None
    gateway: Network | None = None

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
