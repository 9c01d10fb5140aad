"""The protocol of a fabric, an implementation of the tenants' networks on this host.

`apply` is level-triggered: it compares a tenant's whole intent with the installed state, and changes the differences.
It is idempotent, and repairs the state after a crash at any point. `plug` and `unplug` are the fast path for the port
of one instance that starts or ends. All methods block and may be called from any thread; calls for the same tenant run
one after another. They raise Unavailable before `open` and after `close` or `teardown`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from insula.model.errors import InsulaError
from insula.model.objects import Network, NetworkStatus, Port, Struct, Tenant
from insula.model.policies import Direction
from insula.model.routers import Router, RouterStatus
from insula.network.endpoints import Endpoint
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.interpreter.connections import OpenConnection
from insula.network.interpreter.interpretation import Interpretation
from insula.network.interpreter.queues import InstalledQueues
from insula.network.interpreter.space import MakeBoundaries
from insula.network.interpreter.tracing import TracedPacket, TracedWay


class NetnsNic(NamedTuple):
    """A network namespace (network_namespaces(7)), as a descriptor; it gets a device. `close` it after use."""

    fd: int

    def close(self) -> None:
        os.close(self.fd)


class TapNic(NamedTuple):
    """A tap device (tuntap.rst), for a virtual machine: the instance's end is a descriptor, the device is the fabric's,
    which moves it. `close` it after use: the machine has another descriptor, with which the device ends.

    None is the tap of a machine that runs: only the machine has its descriptor then.
    """

    fd: int | None

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


class DeviceNic(NamedTuple):
    """A network device whose other end is a virtual machine's, such as a vif of Xen: by its name in the host's
    namespace, from which the fabric moves it. It ends with the machine.

    None is the device of a machine that runs, which was moved before.
    """

    name: str | None

    def close(self) -> None:
        """Do nothing: no descriptor is open."""


class VfNic(NamedTuple):
    """A virtual function of SR-IOV by its PCI address, as in 0000:01:10.0."""

    address: str

    def close(self) -> None:
        """Do nothing: no descriptor is open."""


Nic = NetnsNic | TapNic | DeviceNic | VfNic
"""The instance's end of a port. A fabric may refuse kinds that it doesn't support (Unavailable)."""


# -- read-back --------------------------------------------------------------------------------------------------


class InstalledNetwork(Struct, kw_only=True):
    """A network as installed in the kernel; `index` is that of the `Network`, `gateways` have prefix lengths.

    `remotes` maps the MAC addresses of ports on other hosts to these hosts' underlay addresses, and `vni` is that of
    their packets, None if the network has no such ports. `reaches` are the indices of networks to which connections may
    be opened from it, itself included, `outbound` whether to the outside. `routes` has the next hops of static routes
    by destination.
    """

    index: int
    device: str
    gateways: list[str]
    mtu: int
    up: bool
    vni: int | None = None
    remotes: Mapping[str, str] = {}
    reaches: Sequence[int] = ()
    outbound: bool = False
    routes: Mapping[str, str] = {}


class InstalledPort(Struct, kw_only=True):
    """A port as installed in the kernel. `network` is the index of the network whose bridge it is on, None if on none.

    `macs` and `addresses` are the source addresses that the anti-spoofing rules allow; `addresses6` has the link-local
    address too.
    """

    index: int
    device: str
    network: int | None
    macs: list[str]
    addresses: list[str]
    addresses6: list[str]
    up: bool


class Installed(Struct, kw_only=True):
    """The installed state of one tenant. `drift` has its differences from what the fabric installs, as text."""

    tenant: str
    namespace: bool
    networks: list[InstalledNetwork]
    ports: list[InstalledPort]
    rules: str
    drift: list[str]


class TrafficCounter(NamedTuple):
    """Bytes and packets since the counter was made; another counter has another incarnation."""

    incarnation: str
    bytes: int
    packets: int


class CountedFlow(NamedTuple):
    """Connections between two addresses that policies in audit may have denied, in one direction of policies. `port` is
    that of TCP and UDP, or the ICMP type."""

    direction: Direction
    source: str
    destination: str
    protocol: str
    port: int
    connections: int


class Traffic(NamedTuple):
    """The traffic of a port or of a namespace, from the point of view of who is in it."""

    received: TrafficCounter
    sent: TrafficCounter


class Arrived(NamedTuple):
    """What has arrived for a tenant at this host: what it has got, what was dropped here because it was too much, and
    what waits; `bytes` and `backlog` are bytes."""

    bytes: int
    packets: int
    drops: int
    backlog: int


class Arrivals(NamedTuple):
    """What has arrived at this host for tenants, by their indices, since they are shaped. `link` is its bandwidth in
    bits a second, `floors` those of the tenants for what they receive."""

    link: int
    floors: Mapping[int, int]
    tenants: Mapping[int, Arrived]


class Queue(NamedTuple):
    """A queue that a tenant's packets pass, as it is installed. `floor` and `ceiling` are bits a second, None is none.

    It is that of a port, for all its packets in one direction, or one between the tenant and the outside: of one
    instance, or of all those of the tenant that have none of their own. `name` is the kernel's, by device and class.
    """

    of: Literal["port", "instance", "tenant"]
    floor: int | None
    ceiling: int | None
    name: str


# -- probe points -----------------------------------------------------------------------------------------------


class NameLease(NamedTuple):
    """An address that an instance may reach, for the names that it has asked for, and for how many seconds."""

    instance: str
    address: str
    names: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Station:
    """The probe point of an instance. `device` and `index` are those of the host's end of its port."""

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
class RouterPoints:
    """The probe points of a tenant's router. `netns` is its namespace, and `inside` are the devices there that receive
    packets from ports and from the host. `device` is the uplink's end on the host, `mac` the address of the other end.
    """

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
    """The places where probes of one tenant are sent and received: its router and its ports. `close` after use."""

    router: RouterPoints
    stations: tuple[Station, ...]

    def close(self) -> None:
        os.close(self.router.netns)


Places = Sequence[tuple[Network, Port]]
"""Ports with their networks."""


class HostService(NamedTuple):
    """A port on which a program of the host listens; `address` None is every address of the host."""

    protocol: str
    port: int
    address: str | None


class OutsideView(NamedTuple):
    """The host's addresses, without loopback ones, and the ports that programs of the host use."""

    addresses: Sequence[str]
    services: Sequence[HostService]


class Entries(NamedTuple):
    """The addresses by which packets from outside come to a tenant. `hosts` are the host's own, without loopback ones.

    Packets to a port of every address of the host come with one of `own` as their destination, and those to a port of
    one address of the host with that of `transits`.
    """

    hosts: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    transits: Mapping[str, str] = {}


# -- changes ----------------------------------------------------------------------------------------------------


class NamespaceChange(NamedTuple):
    """Whether something has changed in a namespace: by the fabric's `own` doing, and by `other` programs."""

    own: bool
    other: bool


class ChangeMonitor(Protocol):
    """Descriptors that become readable when the kernel tells of a change in one namespace. For one thread."""

    def filenos(self) -> Sequence[int]: ...

    def read(self) -> NamespaceChange:
        """Return what has changed since the last time. It never blocks."""

    def close(self) -> None: ...


class Watcher(Protocol):
    """What is given monitors. Its methods are called from any thread, and don't block."""

    def opened(self, tenant: str | None, monitor: ChangeMonitor) -> None:
        """Take the monitor of a tenant's namespace, or of the host's (None)."""

    def closed(self, tenant: str | None, monitor: ChangeMonitor) -> None:
        """Close a monitor, whose namespace is about to be removed."""


# -- the protocol -----------------------------------------------------------------------------------------------


class Fabric(Protocol):
    @property
    def reserved(self) -> Sequence[str]:
        """Ranges in CIDR notation that no network may overlap."""

    def between_peers(self, peering: int, number: int) -> Sequence[str]:
        """Return the addresses that a service endpoint or a client with a number has between the routers of a peering's
        two tenants, by the index of the peering: one of each version of IP."""

    def open(self) -> None:
        """Make the host-wide parts. `Unavailable` if this host lacks a requirement."""

    def watch(self, watcher: Watcher | None) -> None:
        """Give monitors of the host's namespace and of those of tenants to `watcher`, as they are opened, until
        another takes its place; with None all are closed."""

    def close(self) -> None:
        """Wait for running calls, and release handles; the installed state stays. Failed if a call doesn't end."""

    def set_hosts(self, hosts: Iterable[str]) -> None:
        """Set the underlay addresses of the cloud's hosts: `RemotePort.host` is one of these, and packets of tenants'
        networks from other addresses are dropped. Invalid, Unavailable if this host is the only one."""

    def dropped_arrivals(self) -> int | None:
        """Return how many packets for tenants this host has dropped, because more arrived than its link has for them;
        None if what arrives isn't shared out, because no tenant has a floor. It is cheap."""

    def arrivals(self) -> Arrivals | None:
        """Return what has arrived for each tenant; None if `dropped_arrivals` is."""

    def limit_senders(self, receiver: str, ceilings: Mapping[int, int]) -> None:
        """Limit what tenants, by their indices, send from this host to another, by its underlay address: bits a second.

        It replaces earlier ceilings for that host. They hold for tenants that are shaped, and end with the fabric.
        """

    def queues(self, tenant: Tenant, port: Port, direction: Direction, *, outside: bool) -> list[Queue]:
        """Return the queues that packets from the port ("out") or to it ("in") pass, in their order: those of the port,
        and with `outside` those between the tenant and the outside. Read from the kernel; empty if nothing is shaped.
        """

    def apply(self, intent: TenantIntent) -> Mapping[str, InsulaError]:
        """Make the installed state of the tenant equal to its intent.

        A part that fails does not prevent others. The errors are returned by part of the intent: "tenant" (routing,
        rules, uplink, resolver), "network NAME", "routes" (static ones), "port INSTANCE", "guarantees", "names",
        "leftovers". Raises
        InsulaError if nothing of the tenant can be made.
        """

    def remove(self, tenant: Tenant) -> None:
        """Remove everything of the tenant; no error if it is gone."""

    def plug(
        self,
        tenant: Tenant,
        network: Network,
        port: Port,
        nic: Nic,
        beside: Places = (),
        labels: Mapping[str, str] = ...,
    ) -> None:
        """Connect `nic` to a port, and add the port's addresses to the instance's name. Idempotent.

        `beside` are the instance's other ports, which are connected. A network namespace gets loopback and the port's
        interface with its addresses. The lowest interface has the default routes; what is sent from an address of
        another leaves by that one. Conflict if the network is full, Unavailable for a kind of nic that the fabric
        doesn't support. The instance has `labels`, and the policies that select it apply from its first packet on.
        """

    def enforce(self, tenant: Tenant, policy: PolicyIntent) -> None:
        """Change the policies, labels and groups of a tenant for those of its last intent, and nothing else of it.

        When this returns, they are in force for open connections too. The change is made as a whole or not at all.
        """

    def leases(self, tenant: Tenant) -> Sequence[NameLease]:
        """Return the addresses that instances may reach now because they have asked for names of policies. Failed."""

    def unplug(self, tenant: Tenant, network: Network, port: Port, nic: Nic | None = None, beside: Places = ()) -> None:
        """Remove the port, and its addresses from the instance's name; no error if they are gone.

        With `nic` the instance runs on with the ports `beside`: the interface and what belongs to it are gone when this
        returns, and only the port's counters stay until `unplug` without `nic`.
        """

    def route(self, tenant: Tenant, nic: Nic, places: Places) -> None:
        """Change the routes of an instance with the ports `places` to what routers and peerings lead to by the tenant's
        last intent: by the port whose network they join. `plug` does this as well. Machines ask for their routes.
        Failed."""

    def egress(self, tenant: Tenant) -> int:
        """Return a descriptor of a new network namespace, which the caller closes, for a program of the host.

        It has the way out that the tenant's instances have, and their resolvers; it can't reach them, nor they it.
        """

    def status(self, tenant: Tenant, network: Network) -> NetworkStatus:
        """Measure the status of a network."""

    def router_status(self, tenant: Tenant, networks: Sequence[Network], router: Router) -> RouterStatus:
        """Measure the status of a router. `networks` are all of the tenant's."""

    def installed(self, tenant: Tenant) -> Installed:
        """Read the installed state of a tenant from the kernel."""

    def traffic(self, tenant: Tenant, ports: Sequence[Port]) -> dict[int, Traffic]:
        """Return the packets that each instance has received and sent through its port, by the port's index.

        Counted are IP packets from layer 3 on, which the fabric's rules let through. The counters live from `plug` to
        `unplug`, also if the instance and its device are gone before that. A port that isn't plugged is left out.
        """

    def audited(self, tenant: Tenant) -> list[CountedFlow]:
        """Return the connections that passed although no enforced policy allows them, to or from instances that a
        policy in audit selects: those that it would deny are among them. A bounded number of flows is counted."""

    def egress_traffic(self, tenant: Tenant) -> Traffic | None:
        """Return the IP packets that all namespaces of `egress` have received and sent together, those that are gone
        included, as `traffic` counts them; None if nothing counts them."""

    def probe_points(self, tenant: Tenant, networks: Sequence[Network], ports: Sequence[Port]) -> ProbePoints:
        """Return the tenant's probe points. `networks` are all of the tenant's, `ports` those to probe."""

    def strange_devices(self, ports: Mapping[int, int], owners: Sequence[Port]) -> list[str]:
        """Find devices other than the port that lead out of an instance's namespace; as text.

        `ports` has descriptors of the instances' namespaces by the index of the port, `owners` the ports.
        """

    def interpret(
        self, tenant: Tenant, intent: TenantIntent, running: Collection[int], cuts: MakeBoundaries
    ) -> Interpretation:
        """Read the installed state of a tenant, and compute whom it lets reach whom, for all packets at once.

        `running` are the indices of the ports that are plugged. `cuts` returns boundaries by version of IP that the
        result has to tell apart, too. The same object as the last time is returned if nothing has changed. NotFound if
        the tenant has no namespace.
        """

    def interpret_host(self, tenants: Sequence[Tenant], offered: object, cuts: MakeBoundaries) -> Interpretation:
        """The same for the host between tenants: `inside` are runs from tenants, `above` those from others. The result
        is computed again if `offered` is another than the last time, too."""

    def installed_queues(
        self, tenants: Sequence[Tenant], guaranteed: Mapping[str, Sequence[int]] | None = None
    ) -> InstalledQueues:
        """Return the classes of traffic control that the packets of these tenants pass on this host."""

    def connections(self, tenant: Tenant, marks: Collection[int]) -> Sequence[OpenConnection]:
        """Return the tenant's open connections that have one of these marks. NotFound if it has no namespace."""

    def trace(self, tenant: Tenant, intent: TenantIntent, packet: TracedPacket) -> TracedWay:
        """Follow one packet through the installed state of a tenant. NotFound if the tenant has no namespace."""

    def trace_host(self, tenant: Tenant, packet: TracedPacket) -> TracedWay:
        """Follow one packet through the host: from the tenant's uplink, or from outside to it."""

    def entries(self, tenants: Sequence[Tenant]) -> Mapping[str, Entries]:
        """Return the addresses by which packets from outside come to these tenants, by name."""

    def router_socket(self, tenant: Tenant, version: Literal[4, 6]) -> socket.socket:
        """Return a TCP socket of the tenant's router, which reaches its instances. NotFound without a router."""

    def outside_view(self) -> OutsideView:
        """Return what the outside sees of this host itself."""

    def host_drift(self) -> list[str]:
        """Return differences of the host's namespace from the state that the fabric installs there, as text."""

    def repair_host(self) -> list[str]:
        """Make the host's namespace as the fabric installs it. Return the differences that there were, as text."""

    def sweep(self, keep: Iterable[Tenant]) -> None:
        """Remove the installed state of all other tenants, left by crashes."""

    def teardown(self) -> None:
        """Wait for running calls, and remove everything: namespaces, devices, rules and processes."""
