"""The protocol of a fabric: what makes the tenants' networks on this host, and reads back what it made.

`apply` is level-triggered: it compares a tenant's whole intent with what is there, and changes what differs. Called
again, or after a crash at any point, it changes nothing that is right. `plug` and `unplug` are the fast path of one
port, for the start and the end of an instance. All methods block and may be called from any thread: a call waits for
those before it about the same tenant. They raise Unavailable before `open` and after `close` or `teardown`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from insula.model.errors import InsulaError
from insula.model.objects import Network, NetworkStatus, Port, Struct, Tenant
from insula.network.endpoints import Endpoint
from insula.network.intent import TenantIntent


class NetnsNic(NamedTuple):
    """A descriptor of the network namespace that gets a device (network_namespaces(7)); `close` it after use."""

    fd: int

    def close(self) -> None:
        os.close(self.fd)


class TapNic(NamedTuple):
    """A tap device of that name (tuntap.rst), for a virtual machine."""

    device: str

    def close(self) -> None:
        """Nothing is open."""


class VfNic(NamedTuple):
    """A virtual function of SR-IOV by its PCI address, as in 0000:01:10.0."""

    address: str

    def close(self) -> None:
        """Nothing is open."""


Nic = NetnsNic | TapNic | VfNic
"""Where an instance is plugged in. A fabric may refuse kinds that it can't serve (Unavailable)."""


# -- read-back --------------------------------------------------------------------------------------------------


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


# -- probe points -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Station:
    """An instance. `device` is the host's end of its port, `index` that device's index, in the tenant's namespace."""

    endpoints: tuple[Endpoint, ...]
    gateways: tuple[str, ...]
    subnets: tuple[str, ...]
    device: str
    index: int
    mac: str

    @property
    def key(self) -> str:
        return self.endpoints[0].label


@dataclass(frozen=True)
class Router:
    """A tenant's router and its namespace; `inside` are the devices there that see what came through a port or from
    the host. `device` is its uplink's end on the host, `mac` that of the other end."""

    tenant: str
    netns: int
    gateways: tuple[Endpoint, ...]
    hosts: tuple[Endpoint, ...]
    outsides: tuple[Endpoint, ...]
    inside: tuple[str, ...]
    device: str
    mac: str


@dataclass(frozen=True)
class ProbePoints:
    """Where probes of one tenant are sent and received: its router, and a station for each port; `close` after use."""

    router: Router
    stations: tuple[Station, ...]

    def close(self) -> None:
        os.close(self.router.netns)


# -- the protocol -----------------------------------------------------------------------------------------------


class Fabric(Protocol):
    @property
    def reserved(self) -> Sequence[str]:
        """Ranges in CIDR notation that no network may overlap."""

    def open(self) -> None:
        """Make the host-wide parts. Raises `Unavailable` when this host lacks what it takes."""

    def close(self) -> None:
        """Wait for calls that run, and release handles; what is installed stays. Failed if one doesn't end."""

    def apply(self, intent: TenantIntent) -> Mapping[str, InsulaError]:
        """Make what the tenant wants, and take away what it doesn't want.

        What can't be made keeps nothing else from being made. It is returned, with the error, by the part of the
        intent that it belongs to: "tenant" (router, rules, uplink, resolver), "network NAME", "port INSTANCE", "names",
        "leftovers". Raises InsulaError if nothing of the tenant can be made.
        """

    def remove(self, tenant: Tenant) -> None:
        """Take away everything of the tenant; nothing to do when it is gone already."""

    def plug(self, tenant: Tenant, network: Network, port: Port, nic: Nic) -> None:
        """Connect `nic`, and have the instance's name resolve to the port's addresses, too.

        What is there already and right stays. In a network namespace: eth0, addresses, default routes, loopback.
        Raises Conflict if the network is full, Unavailable for a kind of nic that the fabric can't serve.
        """

    def unplug(self, tenant: Tenant, network: Network, port: Port) -> None:
        """Take away the port and its addresses' name; nothing to do when they are gone already."""

    def status(self, tenant: Tenant, network: Network) -> NetworkStatus:
        """Measured now."""

    def installed(self, tenant: Tenant) -> Installed:
        """Read back from the kernel."""

    def traffic(self, tenant: Tenant, ports: Iterable[Port]) -> dict[int, tuple[int, int]]:
        """Bytes that each instance has received and sent through its port, by the port's index."""

    def probe_points(self, tenant: Tenant, networks: Sequence[Network], ports: Sequence[Port]) -> ProbePoints:
        """Where the tenant's probes enter and leave. `networks` are all of the tenant's, `ports` those to probe."""

    def strange_devices(self, ports: Mapping[int, int], owners: Sequence[Port]) -> list[str]:
        """Devices that lead out of an instance's namespace beside its port, as text.

        `ports` are descriptors of the instances' namespaces by the index of the port, `owners` the ports.
        """

    def host_drift(self) -> list[str]:
        """What differs from what the fabric installs in the host's own namespace, as text."""

    def sweep(self, keep: Iterable[Tenant]) -> None:
        """Take away what this fabric made for any other tenant, left by crashes."""

    def teardown(self) -> None:
        """Wait for calls that run, and remove everything: no namespace, device, rule or process stays."""
