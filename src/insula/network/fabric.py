"""The face of a fabric: what realises the tenants' networks on this host, and what it reads back.

A fabric is level-triggered: every `ensure_…` looks at what is there and repairs it, so that calling it again, or
after a crash at any point, changes nothing that is right. All methods block and may be called from any thread: a call
waits for those before it about the same tenant. They raise Unavailable before `open` and after `close` or `teardown`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from insula.model.objects import Network, NetworkStatus, Port, Struct, Tenant


class NetnsNic(NamedTuple):
    """A descriptor of the network namespace that gets a device (network_namespaces(7)); `close` it after use."""

    fd: int

    def close(self) -> None:
        os.close(self.fd)


Nic = NetnsNic
"""Where an instance is plugged in: a network namespace."""


class InstalledNetwork(Struct, kw_only=True):
    """A network as the kernel has it; `index` is the one of the `Network`, `gateways` are addresses with prefixes."""

    index: int
    device: str
    gateways: list[str]
    mtu: int
    up: bool


class InstalledPort(Struct, kw_only=True):
    """A port as the kernel has it. `network` is the index of the network whose bridge it is on, None if on none.

    `macs` and `addresses` are what the anti-spoofing rules let it send from; `addresses6` include the link-local one.
    """

    index: int
    device: str
    network: int | None
    macs: list[str]
    addresses: list[str]
    addresses6: list[str]
    up: bool


class Installed(Struct, kw_only=True):
    """What the kernel really has of one tenant. `drift` lists what differs from what the fabric installs, as text."""

    tenant: str
    namespace: bool
    networks: list[InstalledNetwork]
    ports: list[InstalledPort]
    rules: str
    drift: list[str]


class Fabric(Protocol):
    @property
    def reserved(self) -> Sequence[str]:
        """Ranges in CIDR notation that no network may overlap."""

    def open(self) -> None:
        """Make the host-wide parts. Raises `Unavailable` when this host lacks what it takes."""

    def close(self) -> None:
        """Wait for calls that run, and release handles; what is installed stays. Failed if one doesn't end."""

    def ensure_tenant(self, tenant: Tenant) -> None:
        """The tenant's routing domain with its rules, its uplink and its resolver."""

    def remove_tenant(self, tenant: Tenant) -> None:
        """Everything of the tenant."""

    def ensure_network(self, tenant: Tenant, network: Network) -> None:
        """The segment with its gateway addresses."""

    def remove_network(self, tenant: Tenant, network: Network) -> None:
        """The segment; ports still on it lose their connection."""

    def attach(self, tenant: Tenant, network: Network, port: Port, netns: int) -> None:
        """Connect the network namespace behind the descriptor `netns`: eth0, addresses, default routes, loopback."""

    def detach(self, tenant: Tenant, network: Network, port: Port) -> None:
        """Remove the port; nothing to do when it is gone already."""

    def set_names(self, tenant: Tenant, names: Mapping[str, Sequence[str]]) -> None:
        """What the tenant's resolver answers, with and without the domain <tenant>.internal; replaces all earlier."""

    def add_name(self, tenant: Tenant, name: str, addresses: Sequence[str]) -> None:
        """One more name, or other addresses for one."""

    def remove_name(self, tenant: Tenant, name: str) -> None:
        """One name less; nothing to do when it is gone already."""

    def status(self, tenant: Tenant, network: Network) -> NetworkStatus:
        """Measured now."""

    def installed(self, tenant: Tenant) -> Installed:
        """Read back from the kernel."""

    def traffic(self, tenant: Tenant, ports: Iterable[Port]) -> dict[int, tuple[int, int]]:
        """Bytes that each instance has received and sent through its port, by the port's index."""

    def host_drift(self) -> list[str]:
        """What differs from what the fabric installs in the host's own namespace, as text."""

    def sweep_tenants(self, tenants: Iterable[Tenant]) -> None:
        """Remove whatever of this fabric exists and is of none of these tenants, left by crashes."""

    def sweep_tenant(self, tenant: Tenant, networks: Iterable[Network], ports: Iterable[Port]) -> None:
        """Remove whatever the tenant has and is not in these, left by crashes."""

    def sweep(self, tenants: Iterable[Tenant], networks: Iterable[Network], ports: Iterable[Port]) -> None:
        """Remove whatever of this fabric exists and is not in these."""

    def teardown(self) -> None:
        """Wait for calls that run, and remove everything: no namespace, device, rule or process stays."""
