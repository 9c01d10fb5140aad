"""The part of a tenant's namespace that receives packets from outside: a table, and balancers' internal addresses.

An internal address of a balancer is one of a network that no instance has. The router answers for it on the network's
bridge (proxy ARP and NDP), and a route to loopback, which leads nowhere, makes it do so. Packets to it are translated
before they are routed.
"""

from __future__ import annotations

from collections.abc import Iterable

from insula.kernel.netlink import Rtnl, host_routes, maps
from insula.kernel.netlink.conntrack import ConntrackSocket, Match, to
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.network.intent import TenantIntent
from insula.network.linux import naming, sysctl
from insula.network.linux.drift import rule_drift
from insula.network.linux.outside import elements, rules
from insula.network.linux.outside.addresses import OutsideAddresses, version
from insula.network.linux.outside.elements import TENANT_SETS, ExternalPorts, MapContents
from insula.network.linux.rules import install

_LOOPBACK = 1


class TenantOutside:
    """The tenant's side. The sockets are in its namespace `netns`; it is used by one thread at a time."""

    def __init__(self, prefix: str, netns: int, rtnl: Rtnl, nft: Nft, nftables: NftablesSocket) -> None:
        self._prefix = prefix
        self._table = rules.table(prefix)
        self._netns = netns
        self._rtnl = rtnl
        self._nft = nft
        self._nftables = nftables
        self._cached: tuple[int, MapContents] | None = None  # with the generation of the rules
        self._wanted: MapContents | None = None

    def apply(self, intent: TenantIntent, at: OutsideAddresses) -> None:
        """Change the table to the intent, and delete tracked connections that its changes concern. OSError."""
        install(self._nft, self._table, ("inet",), rules.tenant_rules(self._prefix))
        have, wanted = self._read(), elements.of_tenant(intent, at)
        if not intent.complete:  # what may be of a record that can't be read stays
            wanted = {name: have[name] | some for name, some in wanted.items()}
        self._apply_internal(intent)
        requests = [
            request
            for name in TENANT_SETS
            for request in maps.change("inet", self._table_of(name), name, have[name], wanted[name])
        ]
        self._nftables.transact(*requests)
        self._cached = self._nftables.generation(), wanted
        self._wanted = wanted
        if requests:
            self._forget(have, wanted, at)

    def remove(self) -> None:
        """Remove the table and what belongs to it; connections through it end."""
        have = self._read()
        external = ("external4", "external6")
        self._nftables.transact(
            *(each for name in external for each in maps.change("inet", self._prefix, name, have[name], {}))
        )
        self._nft.run(f"add table inet {self._table}\ndelete table inet {self._table}\n")
        self._cached = self._wanted = None
        self._set_internal(set())
        self._forget(have, {name: {} for name in TENANT_SETS}, None)

    def drift(self) -> list[str]:
        """Return differences from what was applied last, as text."""
        if self._wanted is None:
            return []
        found = rule_drift(self._nft, self._table, ("inet",), rules.tenant_rules(self._prefix))
        return [*found, *elements.differences(self._read(), self._wanted)]

    def _read(self) -> MapContents:
        if self._cached and self._cached[0] == self._nftables.generation():
            return self._cached[1]
        return {name: maps.read(self._nftables, "inet", self._table_of(name), name) for name in TENANT_SETS}

    def _table_of(self, name: str) -> str:
        return self._prefix if name.startswith("external") else self._table

    # -- internal addresses ----------------------------------------------------------------------------------------

    def _apply_internal(self, intent: TenantIntent) -> None:
        networks = {network.name: network.index for network in intent.networks}
        listeners = [each for balancer in intent.outside.balancers for each in balancer.listeners]
        self._set_internal(
            {
                (each.address, naming.bridge_index(networks[each.network]))
                for each in listeners
                if each.address and each.network in networks
            }
        )

    def _set_internal(self, wanted: set[tuple[str, int]]) -> None:
        """Have these bridges answer for these addresses, and no others."""
        have = host_routes.proxies(self._rtnl)
        routed = set(host_routes.read(self._rtnl, _LOOPBACK))
        addresses = {address for address, _ in wanted}
        self._rtnl.execute(
            *(host_routes.delete_proxy(*each) for each in have - wanted),
            *(host_routes.delete(address, _LOOPBACK) for address in routed - addresses),
            *(host_routes.add(address, _LOOPBACK) for address in addresses - routed),
        )
        if new := {index for _, index in wanted - have}:
            settings: dict[str, str] = {}
            for name in (link.name for link in self._rtnl.links() if link.index in new):
                settings |= {f"ipv6/conf/{name}/proxy_ndp": "1"}
                settings |= {f"{ip}/neigh/{name}/proxy_delay": "0" for ip in ("ipv4", "ipv6")}  # instances wait shortly
            call_in(self._netns, lambda: sysctl.write(settings))
        self._rtnl.execute(*(host_routes.add_proxy(*each) for each in wanted - have))

    # -- connections -----------------------------------------------------------------------------------------------

    def _forget(self, have: MapContents, wanted: MapContents, at: OutsideAddresses | None) -> None:
        """Delete tracked connections that are translated differently now: also those from before a port was published,
        which were not translated."""
        hosts = [*at.hosts, *at.own.values()] if at else []
        matches = [match for ports in elements.changed(have, wanted) for match in _matches(ports, hosts)]
        matches += _to_lost_backends(have, wanted)
        if matches:
            with call_in(self._netns, ConntrackSocket) as conntrack:
                conntrack.delete(matches)


def _matches(ports: ExternalPorts, hosts: Iterable[str]) -> Iterable[Match]:
    if ports.protocol is None:  # a floating address: packets to it, and replies to what was sent from it
        assert ports.address is not None
        return [to(ports.address), Match(ports.address, reply=True, version=ports.version)]
    named = [each for each in hosts if version(each) == ports.version] if ports.address is None else [ports.address]
    return [to(address, ports.protocol, (ports.first, ports.last)) for address in named]


def _to_lost_backends(have: MapContents, wanted: MapContents) -> Iterable[Match]:
    """Return conditions for packets that balancers still send to backends which get no new connections.

    Those of UDP end, because a client may go on for ever. TCP connections live on: their end is seen by both sides, and
    a backend that fails checks may still finish what it has.
    """
    for family in (4, 6):
        before, after = (elements.backends(each[f"places{family}"]) for each in (have, wanted))
        for _, address, port in before - after:
            yield Match(
                source=address, protocol="udp", source_ports=(port, port), reply=True, version=family, translated=True
            )
