"""The host's side of packets from outside: the table of published ports, routes to floating addresses, and settings.

One object serves all tenants. An element belongs to the tenant whose transit address it leads to, or whose uplink it
names; each tenant's are compared with its intent and changed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface
from pathlib import Path
from typing import Literal

from insula.kernel.netlink import Rtnl, host_routes, maps
from insula.kernel.netlink.conntrack import ConntrackSocket, Match, to
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import OWN, call_in
from insula.kernel.nftables import Nft
from insula.model.objects import Tenant
from insula.network.fabric import Entries, OutsideView
from insula.network.intent import TenantIntent
from insula.network.linux import sysctl
from insula.network.linux.calls import Calls, about_host, no_namespace
from insula.network.linux.drift import rule_drift
from insula.network.linux.naming import Naming
from insula.network.linux.outside import elements, rules
from insula.network.linux.outside.addresses import OutsideAddresses, needs_transit, uses_loopback, version
from insula.network.linux.outside.elements import HOST_SETS, ExternalPorts, MapContents
from insula.network.linux.outside.services import services
from insula.network.linux.outside.tenant import TenantOutside
from insula.network.linux.outside.transits import Transits
from insula.network.linux.rules import install
from insula.network.linux.sysctl import HostSettings

_LOOPBACKS = ("127.0.0.1", "::1")


class HostOutside:
    """The sockets are in the host's namespace, that of the thread which makes this. `directory` is for `Transits`."""

    def __init__(self, directory: Path, names: Naming, rtnl: Rtnl, nft: Nft, settings: HostSettings) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.transits = Transits(directory, names)
        self._names = names
        self._table = rules.table(names.prefix)
        self._rtnl = rtnl
        self._nft = nft
        self._settings = settings
        self._nftables = NftablesSocket()
        self._conntrack = ConntrackSocket()
        self._netns = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._cached: tuple[int, MapContents] | None = None  # with the generation of the rules
        self._wanted: dict[str, tuple[MapContents, OutsideAddresses]] = {}  # by tenant

    def close(self) -> None:
        os.close(self._netns)
        self._nftables.close()
        self._conntrack.close()

    def realise(self, intent: TenantIntent, inside: TenantOutside) -> None:
        """Change both sides to the tenant's intent. Nothing happens if it neither wants nor has anything. OSError,
        InsulaError."""
        outside = intent.outside
        wants = outside.forwards or outside.floating or outside.balancers
        if not wants and not self.transits.exists(intent.tenant.name):
            return
        if wants or not intent.complete:
            at = self.addresses(intent)
            inside.apply(intent, at)
            self.apply(intent, at)
        else:
            inside.remove()
            self.remove(intent.tenant.name, intent.tenant.index)

    def addresses(self, intent: TenantIntent) -> OutsideAddresses:
        """Return the addresses that the tenant's elements are made of. Conflict if there is no free transit address."""
        transits = self.transits.ensure(intent.tenant.name, needs_transit(intent), complete=intent.complete)
        return self._addresses(intent.tenant.index, transits)

    def _addresses(self, tenant: int, transits: Mapping[str, str]) -> OutsideAddresses:
        (_, four), (_, six) = self._names.addresses(tenant)
        return OutsideAddresses(
            uplink=self._names.uplink(tenant), own={4: four, 6: six}, hosts=self._own(), transits=transits
        )

    def _own(self) -> Sequence[str]:
        """Return the host's addresses, without those of loopback and uplinks."""
        ranges = self._names.range4, self._names.range6
        found = (_own_address(each.address, *ranges) for each in self._rtnl.addresses() if not each.link_local)
        return sorted(address for address in found if address)

    def view(self) -> OutsideView:
        """Return the host's addresses, and the ports that its own programs use."""
        return OutsideView(self._own(), call_in(self._netns, services))

    # -- a tenant --------------------------------------------------------------------------------------------------

    def apply(self, intent: TenantIntent, at: OutsideAddresses) -> None:
        """Change the host's side to the tenant's intent, and delete tracked connections that this concerns. OSError,
        InsulaError."""
        with self._lock:
            install(self._nft, self._table, ("inet",), rules.host_rules(self._names))
            floating = {each.address for each in intent.outside.floating}
            self._route(intent.tenant.index, at, floating, complete=intent.complete)
            self._set_loopback(at.uplink, uses_loopback(intent))  # also if the intent lacks something: it comes back
            wanted = self._change(elements.of_host(intent, at), at, complete=intent.complete)
            self._wanted[intent.tenant.name] = wanted, at
            if any(":" in address for address in floating):
                self._settings.forward(6)

    def remove(self, name: str, index: int) -> None:
        """Remove what the tenant has here, by its name and index. Nothing happens if it has nothing."""
        self._wanted.pop(name, None)
        if not self.transits.exists(name):
            return
        at = self._addresses(index, self.transits.known(name))
        with self._lock:
            if self._index(at.uplink):
                self._route(index, at, set())
                self._set_loopback(at.uplink, set())
            self._change({name: {} for name in HOST_SETS}, at)
            self.transits.remove(name)

    def teardown(self) -> None:
        """Remove the table."""
        self._nft.run(f"add table inet {self._table}\ndelete table inet {self._table}\n")

    def _index(self, device: str) -> int:
        return self._rtnl.index(device) or 0

    def _change(self, wanted: MapContents, at: OutsideAddresses, *, complete: bool = True) -> MapContents:
        contents = self._read()
        have: MapContents = {name: {} for name in HOST_SETS} | elements.owned(contents, at)
        for name, keys in wanted.items():  # elements that lead elsewhere are replaced
            have[name] = have[name] | {key: contents[name][key] for key in keys if key in contents[name]}
        if not complete:
            wanted = {name: have[name] | some for name, some in wanted.items()}
        requests = [
            request
            for name in HOST_SETS
            for request in maps.change("inet", self._table_of(name), name, have[name], wanted[name])
        ]
        if not requests:
            return wanted
        self._cached = None
        self._nftables.transact(*requests)
        for name in HOST_SETS:
            kept = {key: value for key, value in contents[name].items() if key not in have[name]}
            contents[name] = kept | wanted[name]
        self._cached = self._nftables.generation(), contents
        hosts = [*at.hosts, *_LOOPBACKS]
        matches = [match for ports in elements.changed(have, wanted) for match in _matches(ports, hosts)]
        self._conntrack.delete(matches)
        return wanted

    def drift(self, tenant: str) -> list[str]:
        """Return differences of the host's side from what was applied last for a tenant, as text."""
        with self._lock:
            if tenant not in self._wanted:
                return []
            wanted, at = self._wanted[tenant]
            found = rule_drift(self._nft, self._table, ("inet",), rules.host_rules(self._names))
            have: MapContents = {name: {} for name in HOST_SETS} | elements.owned(self._read(), at)
        return [f"host: {text}" for text in (*found, *elements.differences(have, wanted))]

    def _read(self) -> MapContents:
        if self._cached and self._cached[0] == self._nftables.generation():
            return self._cached[1]
        return {name: maps.read(self._nftables, "inet", self._table_of(name), name) for name in HOST_SETS}

    def _table_of(self, name: str) -> str:
        return self._names.prefix if name.startswith("floating") else self._table

    # -- routes ----------------------------------------------------------------------------------------------------

    def _route(self, tenant: int, at: OutsideAddresses, floating: set[str], *, complete: bool = True) -> None:
        """Route transit and floating addresses to the tenant's uplink, and answer for floating ones where the host's
        own networks have them."""
        index = self._index(at.uplink)
        gateways = {family: pair[1] for family, pair in zip((4, 6), self._names.addresses(tenant), strict=True)}
        have = host_routes.read(self._rtnl, index)
        wanted = {address: gateways[version(address)] for address in (*at.transits.values(), *floating)}
        stale = {address for address in have if address not in wanted and complete}
        self._rtnl.execute(
            *(host_routes.delete(address, index) for address in stale),
            *(host_routes.add(each, index, gateway) for each, gateway in wanted.items() if have.get(each) != gateway),
        )
        proxies = host_routes.proxies(self._rtnl)
        answering = self._answering(floating)
        for link in {link for address, link in answering - proxies if version(address) == 6}:
            name = next(each.name for each in self._rtnl.links() if each.index == link)
            self._settings.at_least(f"ipv6/conf/{name}/proxy_ndp", 1)
        gone = {(address, link) for address, link in proxies if address in stale or address in floating} - answering
        self._rtnl.execute(
            *(host_routes.delete_proxy(*each) for each in gone),
            *(host_routes.add_proxy(*each) for each in answering - proxies),
        )

    def _answering(self, floating: set[str]) -> set[tuple[str, int]]:
        """Return (address, index of the device) for those that are in a network of the host."""
        networks = [(ip_interface(each.address).network, each.index) for each in self._rtnl.addresses()]
        return {(each, index) for each in floating for network, index in networks if ip_address(each) in network}

    def _set_loopback(self, uplink: str, versions: set[int]) -> None:
        """Let packets between loopback addresses and the uplink pass, or not.

        The kernel drops packets with loopback addresses on other devices, also replies after their translation back.
        With these settings it doesn't for this uplink. The rules drop those that come from it (chain `loopback`).
        """
        index = self._index(uplink)
        sysctl.write({f"ipv4/conf/{uplink}/route_localnet": "1" if 4 in versions else "0"})
        local = host_routes.add_local if 6 in versions else host_routes.delete_local
        with contextlib.suppress(OSError):  # no IPv6
            self._rtnl.execute(local("::1", index))

    def entries(self, tenants: Sequence[Tenant]) -> dict[str, Entries]:
        """Return the addresses by which packets come to tenants."""
        hosts, found = tuple(self._own()), {}
        for tenant in tenants:
            (_, four), (_, six) = self._names.addresses(tenant.index)
            known = self.transits.known(tenant.name) if self.transits.exists(tenant.name) else {}
            found[tenant.name] = Entries(hosts, (four, six), known)
        return found


class HasOutside:
    """The part of a fabric that shows what the outside sees of the host."""

    _calls: Calls
    naming: Naming
    _outside: HostOutside | None = None

    @about_host
    def router_socket(self, tenant: Tenant, version: Literal[4, 6]) -> socket.socket:
        """Return a TCP socket in the tenant's namespace. NotFound without one."""
        try:
            netns = os.open(self.naming.namespace(tenant.name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise no_namespace(tenant) from None
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        try:
            return call_in(netns, lambda: socket.socket(family, socket.SOCK_STREAM))
        finally:
            os.close(netns)

    @about_host
    def outside_view(self) -> OutsideView:
        """Return the host's addresses, and the ports that its own programs use."""
        assert self._outside
        return self._outside.view()

    @about_host
    def entries(self, tenants: Sequence[Tenant]) -> Mapping[str, Entries]:
        """Return the addresses by which packets from outside come to these tenants, by name."""
        assert self._outside
        return self._outside.entries(tenants)


@functools.lru_cache(maxsize=16384)
def _own_address(text: str, range4: IPv4Network, range6: IPv6Network) -> str | None:
    """Return an address without its prefix length; None for one of loopback or of an uplink, as most are."""
    found = ip_interface(text).ip
    return None if found.is_loopback or found in range4 or found in range6 else str(found)


def _matches(ports: ExternalPorts, hosts: Sequence[str]) -> list[Match]:
    if ports.protocol is None:
        assert ports.address is not None
        return [to(ports.address), Match(source=ports.address, version=ports.version)]
    named = [each for each in hosts if version(each) == ports.version] if ports.address is None else [ports.address]
    return [to(address, ports.protocol, (ports.first, ports.last)) for address in named]
