"""`LinuxFabric`: the implementation of the Fabric protocol with network namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from insula.kernel import netlink
from insula.kernel.injection import Injector
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.nftables import Nft
from insula.model.errors import InsulaError, NotFound, Unavailable
from insula.model.objects import Network, NetworkStatus, Port, Tenant
from insula.model.routers import Router, RouterStatus
from insula.network.fabric import (
    CountedFlow,
    DeviceNic,
    Installed,
    NameLease,
    NetnsNic,
    Nic,
    Places,
    ProbePoints,
    TapNic,
    Traffic,
)
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.linux import (
    bridge_filter,
    calls,
    drift,
    egress,
    host_rules,
    inside,
    namespaces,
    naming,
    overlay,
    points,
    readback,
    rules,
    status,
    sysctl,
)
from insula.network.linux.beyond import RoutesBeyond
from insula.network.linux.calls import Calls, about_host, about_tenant
from insula.network.linux.deletion import DeferredDeletion
from insula.network.linux.dns import resolver
from insula.network.linux.dns.resolvers import TenantResolvers
from insula.network.linux.egress_names import EgressNames
from insula.network.linux.gates import NameGates
from insula.network.linux.guarantees.host import HasShaper
from insula.network.linux.guarantees.shaper import Shaper
from insula.network.linux.guests import GuestServer
from insula.network.linux.interpreter.interpreters import Interpreters
from insula.network.linux.interpreter.reading import HasInterpreters
from insula.network.linux.monitor import HasMonitors
from insula.network.linux.naming import Naming
from insula.network.linux.neighbours import enlarge_tables
from insula.network.linux.outside.host import HasOutside, HostOutside
from insula.network.linux.outside.pool_routes import PoolRoutes
from insula.network.linux.peerings import transit
from insula.network.linux.peerings.peers import Peers
from insula.network.linux.records import TenantRecords
from insula.network.linux.reporting import recording
from insula.network.linux.state import addresses
from insula.network.linux.sysctl import HostSettings
from insula.network.linux.tenant import NO_LABELS, TenantNamespace
from insula.network.linux.underlay import Members, Underlay
from insula.network.names import gate


class LinuxFabric(HasOutside, HasShaper, HasInterpreters, HasMonitors):
    """Tenants' networks in network namespaces of this host.

    `run` is a directory on a file system that is empty after a reboot. `range4` and `range6` are the ranges of the
    uplinks' addresses. `resolvers` are the upstream name servers: None means the host's, () none. `groups` is the
    parent of the tenants' control groups, in which their resolvers run. `underlay` is this host's address on the
    network between the hosts; without it all instances of a tenant are on this host. `floating` are the ranges of the
    pool of floating addresses. The host's namespace is that of the thread that calls `open`.
    """

    def __init__(
        self,
        run: Path,
        prefix: str = "insula",
        *,
        range4: str = "100.64.0.0/10",
        range6: str = "fd69:6e73:756c:6100::/64",
        resolvers: Sequence[str] | None = None,
        groups: str | None = None,
        underlay: Underlay | None = None,
        floating: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._floating = floating
        self._pool: PoolRoutes | None = None
        self._underlay = underlay
        self._members: Members | None = None
        self.naming = Naming(prefix, IPv4Network(range4), IPv6Network(range6))
        self._run = run / "network"
        self._records = TenantRecords(self._run)
        self._settings = HostSettings(self._run / "sysctl.json")
        self._procfs = sysctl.Procfs()
        self._servers = resolver.host_resolvers() if resolvers is None else list(resolvers)
        self._resolver = TenantResolvers(resolver.reachable_directory(run, prefix), groups)
        self._names = EgressNames(NameGates(self._run / "names", prefix, groups), prefix, (range4, range6))
        self._tenants: dict[str, TenantNamespace] = {}
        self.shaper = Shaper(self.naming, underlay)
        self._peers = Peers(self.naming, self._records)
        self._beyond = RoutesBeyond()
        self._deletion = DeferredDeletion()
        self._interpreters = Interpreters(self.naming, ipv6=os.path.exists("/proc/sys/net/ipv6"))
        self._calls = Calls()
        self._lock = threading.Lock()  # for `_tenants`
        self._ipv6 = os.path.exists("/proc/sys/net/ipv6")
        self._host: Rtnl | None = None
        self._host_nft: Nft | None = None
        self._injector: Injector | None = None
        self._guests = GuestServer()

    # -- the host ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Install the host's table, and enable forwarding on the host."""
        if os.geteuid() != 0:
            raise Unavailable("networks need root", "start insulad as root")
        for directory in (self._run, self._records.directory):  # readable by root only: it has data of all tenants
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)
        bridge_filter.require()
        if namespaces.prepare_directory():
            (self._run / "directory").touch()
        if self._host is None:
            self._host, self._host_nft = Rtnl(), Nft()
            self._pool = PoolRoutes(self._run / "pool.json", self._floating, self._host)
            self._interpreters.open(self._host)
            with contextlib.suppress(OSError):  # a kernel without bpf(2): address changes are not announced
                self._injector = Injector()
        self._ensure_host()
        if self._outside is None:
            self._outside = HostOutside(self._run / "outside", self.naming, *self._handles(), self._settings)
        if self._underlay and self._members is None:
            self._members = Members(self._underlay, self.naming.prefix, Rtnl(), NftablesSocket())
        self._calls.open()

    def close(self) -> None:
        """Wait for running calls and release all handles; the installed state stays. New calls are refused.

        Failed if a call runs for too long; then nothing is released.
        """
        self._calls.close()
        self._release()

    def _release(self) -> None:
        self._deletion.close()
        self._monitors.close_all()
        with self._lock:
            closing, self._tenants = list(self._tenants.values()), {}
        for namespace in closing:
            namespace.close()
        self._guests.close()
        if self._host and self._host_nft:
            self._interpreters.close()
            self._host.close()
            self._host_nft.close()
        for part in (self._injector, self._members, self._outside):
            if part:
                part.close()
        self._procfs.close()
        self._members = self._outside = self._pool = self._host = self._host_nft = self._injector = None

    def _ensure_host(self) -> None:
        self._forward(4)
        if self._servers and all(":" in server for server in self._servers):
            self._forward(6)
        enlarge_tables(self._settings)
        if self._pool:
            self._pool.ensure()

    def _forward(self, version: int) -> None:
        """Enable forwarding of an IP version on the host, for tenants and not between the host's own devices."""
        _, nft = self._handles()
        rules.install(nft, self.naming.prefix, ("inet",), self._host_rules(version))
        self._settings.forward(version)

    def _host_rules(self, about: int | None = None) -> str:
        """Return the host's rules; `about` is an IP version for which forwarding is about to be enabled."""
        versions = [v for v in (4, 6) if v == about or sysctl.read(sysctl.FORWARDING[v]) == "1"]
        closed = {v: self._settings.closed(v) for v in versions}
        return host_rules.host_rules(self.naming, self._servers, closed, self._underlay)

    @property
    def reserved(self) -> Sequence[str]:
        """The uplinks' ranges, and the addresses of the gate of egress by name."""
        return str(self.naming.range4), str(self.naming.range6), f"{gate.ADDRESS4}/32", f"{gate.ADDRESS6}/128"

    def between_peers(self, peering: int, number: int) -> Sequence[str]:
        """Return the transit addresses with a number."""
        return transit.addresses_of(peering, number, self.naming.range6)

    @about_host
    def host_drift(self) -> list[str]:
        """Return differences in the host's own namespace, as text."""
        _, nft = self._handles()
        others = [text for part in (self._members, self._pool) if part for text in part.drift()]
        return [*drift.rule_drift(nft, self.naming.prefix, ("inet",), self._host_rules()), *others]

    @about_host
    def repair_host(self) -> list[str]:
        """Install the host's rules and settings again, if they differ."""
        found = self.host_drift()
        self._ensure_host()
        return found

    @about_host
    def set_hosts(self, hosts: Iterable[str]) -> None:
        """Accept packets of tenants' networks from the hosts with these underlay addresses, and no others."""
        if self._members is None:
            raise Unavailable("this host has no underlay address", "set one, and start insulad again")
        self._members.set(hosts)

    def _handles(self) -> tuple[Rtnl, Nft]:
        if self._host is None or self._host_nft is None:
            raise calls.not_open()
        return self._host, self._host_nft

    # -- tenants -------------------------------------------------------------------------------------------------

    def apply(self, intent: TenantIntent) -> dict[str, InsulaError]:
        """Install the tenant's namespace, settings, rules, uplink, resolver, bridges, ports and names."""
        with self._calls.of(intent.tenant.name):
            return self._apply(intent)

    def _apply(self, intent: TenantIntent) -> dict[str, InsulaError]:
        host, _ = self._handles()
        tenant, errors = intent.tenant, dict[str, InsulaError]()
        self._records.add(tenant)
        self._beyond.know(intent)
        namespaces.create(self.naming.namespace(tenant.name))
        namespace = self._tenant(tenant)
        made: Sequence[Network] = ()
        with recording(errors, "tenant"), contextlib.ExitStack() as starting:
            with recording(errors, "tenant"):  # the resolver starts while the rest is made
                closed = any(network.outbound == "none" for network in intent.networks)
                starting.enter_context(self._resolver.ensuring(tenant, namespace.netns, self._upstream(tenant), closed))
            with recording(errors, "tenant"):
                namespace.ensure(host, ipv6=self._ipv6)
            with recording(errors, "egress by name"):
                self._names.apply(intent, namespace.netns, self._upstream(tenant))
            made = namespace.apply(intent, self._prepare, self._members, errors)
        with recording(errors, "guarantees"):
            self.shaper.apply(host, namespace, intent)
        with recording(errors, "tenant"):
            for network in made:
                self._resolver.await_network(tenant, namespace.netns, self._upstream(tenant), network)
        self._peers.apply(namespace, intent, self._members, errors)
        with recording(errors, "outside"):
            if self._outside:
                self._outside.realise(intent, namespace.outside)
        with recording(errors, "names"):
            self._resolver.set_names(tenant, {**intent.names, **self._peers.names(intent)})
        self._deletion.wake(namespace)
        return errors

    def _prepare(self, network: Network) -> None:
        """Enable forwarding on the host as the network needs it. Unavailable if the host can't."""
        if network.gateway6:
            if not self._ipv6:
                raise Unavailable("this host's kernel has no IPv6", "make the network without an IPv6 subnet")
            if sysctl.read(sysctl.FORWARDING[6]) != "1":
                self._forward(6)

    @about_tenant
    def remove(self, tenant: Tenant) -> None:
        """Remove resolver, uplink and namespace in this order: the namespace ends only when nothing refers to it."""
        self._remove_tenant(tenant.name, tenant.index)

    def _remove_tenant(self, name: str, index: int) -> None:
        host, _ = self._handles()
        self._resolver.remove(name)
        self._names.remove(name)
        with self._lock:
            namespace = self._tenants.pop(name, None)
        self._monitors.close(name)
        if namespace:
            namespace.close()
        self.shaper.remove(host, index)
        self._peers.forget(name)
        self._beyond.forget(name)
        overlay.remove(self.naming.namespace(name))
        if self._outside:
            self._outside.remove(name, index)
        host.execute(netlink.delete_link(name=self.naming.uplink(index)))
        namespaces.remove(self.naming.namespace(name))
        self._records.remove(name)

    def _upstream(self, tenant: Tenant) -> list[str]:
        """Return the upstream servers of the tenant's resolver: ports at the host's end of its uplink, which the host's
        rules translate to the name servers."""
        (host, _), (host6, _) = self.naming.addresses(tenant.index)
        ports = enumerate(self._servers, host_rules.FIRST_DNS_PORT)
        return [f"{host6 if ':' in server else host}#{port}" for port, server in ports]

    def _check_recorded(self, tenant: Tenant) -> None:
        """Check that the tenant was not removed meanwhile, or its names would be left behind. NotFound."""
        if not self._records.has(tenant):
            raise calls.no_namespace(tenant)

    def _tenant(self, tenant: Tenant) -> TenantNamespace:
        with self._lock:
            namespace = self._tenants.get(tenant.name)
            if namespace and namespace.tenant.index == tenant.index and namespace.is_current():
                return namespace
            if namespace:
                del self._tenants[tenant.name]
                namespace.close()
            netns = namespaces.open_named(self.naming.namespace(tenant.name))
            if netns is None:
                raise calls.no_namespace(tenant)
            namespace = TenantNamespace(self.naming, tenant, netns, self._injector, self._procfs, self._guests)
            self._tenants[tenant.name] = namespace
            self._monitors.open(tenant.name, namespace.netns)
            return namespace

    # -- ports ---------------------------------------------------------------------------------------------------

    @about_tenant
    def plug(
        self,
        tenant: Tenant,
        network: Network,
        port: Port,
        nic: Nic,
        beside: Places = (),
        labels: Mapping[str, str] = NO_LABELS,
    ) -> None:
        """Connect a namespace, a tap or a device to the network; a virtual function is refused (Unavailable)."""
        if not isinstance(nic, NetnsNic | TapNic | DeviceNic):
            raise Unavailable(f"{port.instance} has a virtual function, which is not supported", "use a container")
        self._check_recorded(tenant)
        namespace = self._tenant(tenant)
        self._names.admit(port, labels, namespace.netns, self._upstream(tenant))
        namespace.plug(network, port, nic, beside, labels)
        if beside and isinstance(nic, NetnsNic):
            self._beyond.install(tenant.name, nic.fd, [(network, port), *beside])
        self.shaper.plugged(namespace, port)
        self._resolver.add_name(tenant, port.instance, addresses(port))
        for peer, name in self._peers.names_beyond(tenant, port):
            self._resolver.add_name(peer, name, addresses(port))

    @about_tenant
    def enforce(self, tenant: Tenant, policy: PolicyIntent) -> None:
        namespace = self._tenant(tenant)
        self._names.enforce(tenant, policy, namespace.netns, self._upstream(tenant))
        namespace.policy.replace(policy)

    @about_tenant
    def leases(self, tenant: Tenant) -> Sequence[NameLease]:
        """Ask the tenant's lessor."""
        return self._names.leases(tenant.name)

    @about_tenant
    def unplug(self, tenant: Tenant, network: Network, port: Port, nic: Nic | None = None, beside: Places = ()) -> None:
        """Block the port's packets now, and schedule the deletion of its device; with `nic` delete it now."""
        self._resolver.remove_name(tenant.name, port.instance, addresses(port))
        for peer, name in self._peers.names_beyond(tenant, port):
            self._resolver.remove_name(peer.name, name, addresses(port))
        with contextlib.suppress(NotFound):  # the namespace is gone with everything in it
            namespace = self._tenant(tenant)
            if isinstance(nic, NetnsNic):
                namespace.withdraw(network, port, nic.fd, beside)
                self._beyond.install(tenant.name, nic.fd, beside)
            else:
                namespace.unplug(network, port)
            self._deletion.wake(namespace)
            self._names.withdraw(port, namespace.netns, self._upstream(tenant))

    @about_tenant
    def route(self, tenant: Tenant, nic: Nic, places: Places) -> None:
        if isinstance(nic, NetnsNic):
            self._beyond.install(tenant.name, nic.fd, places)

    @about_tenant
    def egress(self, tenant: Tenant) -> int:
        """Return a descriptor of a new network namespace with the tenant's way out, and nothing else."""
        self._check_recorded(tenant)
        return egress.connect(self._tenant(tenant))

    # -- reading back ----------------------------------------------------------------------------------------------

    @about_tenant
    def status(self, tenant: Tenant, network: Network) -> NetworkStatus:
        """Return the status of a network: ready if the gateway has its addresses and the resolver answers there."""
        try:
            return status.of_network(self._tenant(tenant), network)
        except NotFound as error:
            return NetworkStatus(ready=False, reason=error.message)

    @about_tenant
    def router_status(self, tenant: Tenant, networks: Sequence[Network], router: Router) -> RouterStatus:
        """Return the status of a router: ready if its set elements and routes are there."""
        try:
            return status.of_router(self._tenant(tenant), networks, router)
        except NotFound as error:
            return RouterStatus(ready=False, reason=error.message)

    @about_tenant
    def installed(self, tenant: Tenant) -> Installed:
        """Read the installed state of a tenant from the kernel."""
        try:
            namespace = self._tenant(tenant)
        except NotFound as error:
            return Installed(
                tenant=tenant.name, namespace=False, networks=[], ports=[], rules="", drift=[error.message]
            )
        found = readback.read(namespace, ipv6=self._ipv6)
        found.drift.extend(self.shaper.drift(self._handles()[0], tenant.index))
        if not self._resolver.running(tenant, namespace.netns, self._upstream(tenant)):
            found.drift.append("the resolver does not run")
        found.drift.extend(self._names.drift(tenant.name, namespace.netns))
        found.drift.extend(namespace.outside.drift())
        if self._outside:
            found.drift.extend(self._outside.drift(tenant.name))
        return found

    @about_tenant
    def traffic(self, tenant: Tenant, ports: Sequence[Port]) -> dict[int, Traffic]:
        """Return the counters of set elements (rules.py), which an instance can't reset or bypass."""
        return self._tenant(tenant).traffic(ports)

    @about_tenant
    def audited(self, tenant: Tenant) -> list[CountedFlow]:
        return self._tenant(tenant).policy.audited()

    @about_tenant
    def egress_traffic(self, tenant: Tenant) -> Traffic | None:
        """Return the counters of set elements (rules.py), which are those of all namespaces together."""
        return self._tenant(tenant).egress_traffic()

    @about_tenant
    def probe_points(self, tenant: Tenant, networks: Sequence[Network], ports: Sequence[Port]) -> ProbePoints:
        """Return the tenant's namespace, and the host's ends of its ports and of its uplink."""
        return points.of_tenant(self._tenant(tenant), networks, ports, ipv6=self._ipv6)

    @about_host
    def strange_devices(self, ports: Mapping[int, int], owners: Sequence[Port]) -> list[str]:
        """Find devices other than ports that lead out of instances' namespaces."""
        return inside.strange_devices(ports, owners, self.naming)

    # -- cleaning up -----------------------------------------------------------------------------------------------

    @about_host
    def sweep(self, keep: Iterable[Tenant]) -> None:
        """Remove everything that this fabric made for tenants other than these."""
        self._sweep(keep, self._calls.of)

    def _sweep(self, keep: Iterable[Tenant], turn: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
        host, _ = self._handles()
        wanted = {tenant.name: tenant for tenant in keep}
        for name, index in self._records.indices().items():
            if name not in wanted or wanted[name].index != index:
                with turn(name):
                    self._remove_tenant(name, index)
        for name in {*self._resolver.tenants(), *self._names.tenants()} - set(wanted):
            with turn(name):
                self._resolver.remove(name)
                self._names.remove(name)
        indices = {tenant.index for tenant in wanted.values()}
        self.shaper.sweep(host, indices)
        for link in host.links():
            uplink = naming.number(link.name, self.naming.uplinks)
            if uplink is not None and uplink not in indices:
                host.execute(netlink.delete_link(index=link.index))

    def teardown(self) -> None:
        """Wait for running calls, remove everything of this fabric from the host, and restore the host's settings.

        New calls are refused. Failed if a call runs for too long; `teardown` may be called again after any failure.
        """
        _, nft = self._handles()
        self._calls.close()
        self._sweep([], lambda _: contextlib.nullcontext())
        nft.run(f"add table inet {self.naming.prefix}\ndelete table inet {self.naming.prefix}\n")
        if self._outside:
            self._outside.teardown()
        if self._pool:
            self._pool.remove()
        self._settings.restore()
        if (self._run / "directory").exists():
            namespaces.release_directory()
        self._release()
        self._resolver.close()
        shutil.rmtree(self._run, ignore_errors=True)
