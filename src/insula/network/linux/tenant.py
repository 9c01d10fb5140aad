"""A tenant's network namespace on this host, and the changes in it.

Its handles (a descriptor, netlink sockets, an nftables context) are opened in the namespace once and kept, so that
plugging a port needs no setns(2) into it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from insula.kernel import descriptors, netlink
from insula.kernel.injection import Injector
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.conntrack import ConnectionTable
from insula.kernel.netlink.nftables import ElementCounter, NftablesSocket
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.errors import InsulaError
from insula.model.objects import Network, Port, Tenant
from insula.model.routers import Router
from insula.network.addresses import gateway_mac, uplink_mac
from insula.network.fabric import DeviceNic, NetnsNic, Places, TapNic, Traffic, TrafficCounter
from insula.network.intent import TenantIntent
from insula.network.linux import (
    interfaces,
    machine_ports,
    naming,
    neighbours,
    overlay,
    pairs,
    routing,
    rules,
    state,
    sysctl,
)
from insula.network.linux.connections import PortConnections
from insula.network.linux.deletion import group_of
from insula.network.linux.epoch import Epoch
from insula.network.linux.guests import GuestServer
from insula.network.linux.interpreter.stack import StackReader
from insula.network.linux.naming import Naming
from insula.network.linux.outside.tenant import TenantOutside
from insula.network.linux.peerings import peer_overlay, peering, transit
from insula.network.linux.policy.state import NO_CHANGE, InstalledPolicy, PolicyChange
from insula.network.linux.reporting import recording, reported
from insula.network.linux.state import InstalledState, addresses
from insula.network.linux.underlay import Members
from insula.network.packets import announcement

FAMILIES = ("bridge", "inet")
NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})
_REMEMBERED = 4096
_SINGLY = 8  # ports whose counters are asked for one by one, and not all together


class TenantNamespace:
    """The namespace of one tenant, used by one thread at a time. Methods raise `Failed` with the kernel's error."""

    def __init__(
        self,
        names: Naming,
        tenant: Tenant,
        netns: int,
        injector: Injector | None,
        procfs: sysctl.Procfs,
        guests: GuestServer,
    ) -> None:
        self.naming = names
        self.tenant = tenant
        self.netns = descriptors.move_above_select_limit(netns)
        handles = call_in(self.netns, lambda: (Rtnl(), Nft(), NftablesSocket(), Rtnl()))
        # the last socket is for slow requests, which would block users of the first
        self.rtnl, self.nft, self._nftables, self._slow_rtnl = handles
        self._epoch = Epoch(self._nftables, names.prefix)
        self.stack = StackReader(self.rtnl, self._nftables)
        self.tracked = ConnectionTable(self._nftables)
        self.bridged = sysctl.OpenSettings(self.netns, sysctl.BRIDGE_FILTERS[:2])
        self.outside = TenantOutside(names.prefix, self.netns, self.rtnl, self.nft, self._nftables)
        self.policy = InstalledPolicy(self._nftables, names.prefix, self._epoch)
        self._deleting = threading.Lock()
        self._closed = False
        self._networks: set[int] = set()  # of all intents so far
        self._peerings: set[int] = set()  # of all intents so far
        self._ports: set[int] = set()  # of all intents so far, and those that were plugged
        self._routed: rules.Elements = {}  # of the routers of the last intent
        self._marked_groups: set[int] = set()  # for `delete_marked`
        self._unplugged = 0
        self._previous_macs: dict[str, str] = {}  # the last MAC address of each IP address
        self._remotes: set[tuple[str, str]] = set()  # (network, MAC address) of ports on other hosts
        self._injector = injector
        self._connections = PortConnections(names, self.rtnl, procfs, self.delete_marked, self._replace_elements)
        self._server = guests
        self._guests = guests.serve(self.netns)

    def close(self) -> None:
        with self._deleting:
            self._closed = True
            self._slow_rtnl.close()
        self._server.forget(self._guests)
        self.rtnl.close()
        self.nft.close()
        self._nftables.close()
        self.bridged.close()
        netns, self.netns = self.netns, -1  # a late thread must not use another file with the same number
        os.close(netns)

    def is_current(self) -> bool:
        """Whether the namespace with the tenant's name is still the one of these handles."""
        try:
            kept, ours = os.stat(self.naming.namespace(self.tenant.name)), os.fstat(self.netns)
        except FileNotFoundError:
            return False
        return (kept.st_dev, kept.st_ino) == (ours.st_dev, ours.st_ino)

    # -- the tenant --------------------------------------------------------------------------------------------

    def ensure(self, host: Rtnl, *, ipv6: bool) -> None:
        """Install the router's settings, rules and the uplink."""
        call_in(self.netns, lambda: sysctl.write(sysctl.ROUTER))
        rules.install(self.nft, self.naming.prefix, FAMILIES, rules.tenant_rules(self.naming.prefix))
        self._ensure_uplink(host, ipv6=ipv6)

    def _uplink_addresses(self) -> list[str]:
        """Return the addresses of the tenant's end, with prefix lengths."""
        (_, ours), (_, ours6) = self.naming.addresses(self.tenant.index)
        return [f"{ours}/31", f"{ours6}/127"]

    def _ensure_uplink(self, host: Rtnl, *, ipv6: bool) -> None:
        index, name = self.tenant.index, self.naming.uplink(self.tenant.index)
        host_mac, our_mac = uplink_mac(index, host=True), uplink_mac(index, host=False)
        far, near = host.link(name), self.rtnl.link(naming.UPLINK)
        if not (far and near and far.peer == near.index and near.peer == far.index):
            host.execute(netlink.delete_link(name=name))
            self.rtnl.execute(netlink.delete_link(name=naming.UPLINK))
            host.execute(netlink.veth(name, naming.UPLINK, self.netns, mac=host_mac, peer_mac=our_mac, mtu=naming.MTU))
            far, near = host.link(name), self.rtnl.link(naming.UPLINK)
            assert far and near
        four, six = self.naming.addresses(index)
        settings = {"disable_ipv6": "0" if ipv6 else "1", "accept_ra": "0"}
        host.execute(netlink.set_link(far.index, up=True, alias=self.tenant.name, link_local=False if ipv6 else None))
        sysctl.write({f"ipv6/conf/{name}/{key}": value for key, value in settings.items()})
        self.rtnl.execute(netlink.set_link(near.index, mac=our_mac, link_local=False if ipv6 else None))
        settings_near = {f"ipv6/conf/{naming.UPLINK}/{key}": value for key, value in settings.items()}
        call_in(self.netns, lambda: sysctl.write(settings_near))
        pairs = [(*four, "0.0.0.0/0", 31)] + ([(*six, "::/0", 127)] if ipv6 else [])
        for theirs, ours, everything, length in pairs:
            # neighbours are permanent, so the host's rules may drop everything that a tenant sends to the host
            host.execute(
                netlink.add_address(far.index, f"{theirs}/{length}"), netlink.add_neighbour(far.index, ours, our_mac)
            )
            self.rtnl.execute(
                netlink.set_link(1, up=True),
                netlink.set_link(near.index, up=True),
                netlink.add_address(near.index, f"{ours}/{length}"),
                netlink.add_neighbour(near.index, theirs, host_mac),
                netlink.add_route(everything, index=near.index, gateway=theirs),
            )
        host.sync_carrier(name)
        self.rtnl.sync_carrier(naming.UPLINK)

    # -- the whole intent ----------------------------------------------------------------------------------------

    def apply(
        self,
        intent: TenantIntent,
        prepare: Callable[[Network], None],
        members: Members | None,
        errors: dict[str, InsulaError],
    ) -> Sequence[Network]:
        """Change networks, ports and set elements to those of the intent; `ensure` was called before. Returns the
        networks whose bridges were made.

        `prepare` is called with each network first, and may refuse it. `members` are the other hosts, None if this host
        has no underlay. Errors are added to `errors`.
        """
        now = state.read(self.netns, self.rtnl, self._nftables, self.naming.prefix)
        self._marked_groups |= now.marked_groups
        with recording(errors, "tenant"):
            self.rtnl.execute(*state.uplink(now, self._uplink_addresses()))
        with recording(errors, "leftovers"):
            self._remove_leftovers(intent, now)
        networks = {network.name: network for network in intent.networks}
        endpoints = transit.addresses(networks, intent.peerings)
        made: list[Network] = []
        for network in intent.networks:
            with recording(errors, f"network {network.name}"):
                prepare(network)
                if self._apply_network(network, now, endpoints.get(naming.bridge_index(network.index), ())):
                    made.append(network)
            if f"network {network.name}" in errors:
                del networks[network.name]
        if made:  # the ports of a new bridge have to be attached again
            now = state.read(self.netns, self.rtnl, self._nftables, self.naming.prefix)
        self._guests.set(networks.values(), intent.routers, intent.ports)
        plugged = [port for port in intent.ports if port.network in networks and self._is_plugged(port, now)]
        for port in plugged:
            with recording(errors, f"port {port.instance}"):
                self._repair_port(networks[port.network], port, now)
        with recording(errors, "tenant"):
            taken = {(port.network, address) for port in intent.ports for address in addresses(port)}
            self.rtnl.execute(*pairs.missing(pairs.neighbours(networks, plugged, taken), now.neighbours))
            devices = None if intent.complete else {naming.port(port.index) for port in plugged}
            pairs.change(self._nftables, self.naming.prefix, plugged, devices)
        remotes = overlay.by_network(intent, plugged)
        for network in networks.values():
            with recording(errors, f"network {network.name}"):
                if beyond := remotes[network.name]:
                    ports = beyond.ports
                    overlay.apply(self.rtnl, self.netns, members, network, ports, now, complete=intent.complete)
                elif intent.complete:
                    overlay.delete(self.rtnl, network, now)
        self._remotes = {(remote.network, remote.mac) for remote in intent.remotes}
        routes = routing.changes(now.routing, routing.wanted(networks, intent.routers))
        with recording(errors, "routes"):
            routing.execute(self.rtnl, routes.before)
        with recording(errors, "tenant"):
            elsewhere = [rules.of_remote(n, each) for n in networks.values() for each in remotes[n.name].ports]
            elsewhere += [rules.of_routed(network, remotes[network.name].routed) for network in networks.values()]
            self._apply_elements(networks, plugged, now, intent, elsewhere)
            if intent.complete:  # a router whose record can't be read may need them
                routing.execute(self.rtnl, routes.after)
        return made

    def _remove_leftovers(self, intent: TenantIntent, now: InstalledState) -> None:
        """Remove networks and ports that are not in the intent; if it is incomplete only those of earlier intents."""
        networks = {network.index for network in intent.networks}
        ports = {port.index: port for port in intent.ports}
        peerings = {peering.index for peering in intent.peerings}
        for link in now.links.values():
            network, port = naming.number(link.name, "br"), naming.number(link.name, "p")
            network = naming.number(link.name, "vx") if network is None else network
            stale = network is not None and network not in networks and (intent.complete or network in self._networks)
            joined = naming.number(link.name, naming.PEERING)
            joined = naming.number(link.name, naming.PEERING_VXLAN) if joined is None else joined
            stale |= joined is not None and joined not in peerings and (intent.complete or joined in self._peerings)
            stale |= port is not None and port not in ports and (intent.complete or port in self._ports)
            stale |= port in ports and link.index != naming.port_index(ports[port].index)
            if stale and (port is None or link.kind):
                self.rtnl.execute(netlink.delete_link(index=link.index))
            elif stale:
                self.rtnl.execute(machine_ports.block(link.index))
        self._networks |= networks
        self._ports |= ports.keys()
        self._peerings |= peerings
        if intent.complete:
            self._networks, self._ports, self._peerings = networks, set(ports), peerings
            known = {address for port in intent.ports for address in addresses(port)}
            known |= {address for port in intent.ports for _, address in pairs.single(port)}
            known |= {address for remote in intent.remotes for address in overlay.addresses(remote)}
            for index, address in now.neighbours:
                if address not in known:
                    self.rtnl.execute(netlink.delete_neighbour(index, address))

    def _apply_network(self, network: Network, now: InstalledState, endpoints: Sequence[str]) -> bool:
        """Make or repair the bridge, which answers for service endpoints as well. Returns whether it was made."""
        name, index = naming.bridge(network.index), naming.bridge_index(network.index)
        link = now.links.get(name)
        wrong = link is not None and (link.kind != "bridge" or link.index != index)
        if link and wrong:
            self.rtnl.execute(netlink.delete_link(index=link.index))
        made = link is None or wrong
        if made:
            self.rtnl.execute(netlink.bridge(name, index=index, mac=gateway_mac(network.index), mtu=network.mtu))
            now.links.pop(name, None)
            now.addresses.pop(index, None)
        if made or bool(network.gateway6) != (name in now.ipv6):
            settings = {**sysctl.bridge(name), f"ipv6/conf/{name}/disable_ipv6": "0" if network.gateway6 else "1"}
            call_in(self.netns, lambda: sysctl.write(settings))
        self.rtnl.execute(*state.bridge(now, network, endpoints))
        return made

    def _is_plugged(self, port: Port, now: InstalledState) -> bool:
        link = now.links.get(naming.port(port.index))
        return link is not None and link.index == naming.port_index(port.index)

    def _repair_port(self, network: Network, port: Port, now: InstalledState) -> None:
        """Repair the router's side of a port; the instance's side is repaired by `plug` only."""
        if requests := state.port(now, network, port):
            self.rtnl.execute(*requests)
            self.rtnl.sync_carrier(naming.port(port.index))

    def _apply_elements(
        self,
        networks: Mapping[str, Network],
        ports: Iterable[Port],
        now: InstalledState,
        intent: TenantIntent,
        elsewhere: Iterable[rules.Elements],
    ) -> None:
        """Change the sets to the elements of these networks and plugged ports. Counters of other ports of the intent
        stay: their instances have ended, and the counters may have to be read."""
        devices, have = {(naming.port(port.index),) for port in intent.ports}, now.elements
        counted = {
            name: [each for key in have.get(name, ()) if (each := rules.element(name, key)) in devices]
            for name in rules.COUNTED
        }
        wanted: list[rules.Elements] = [rules.OF_EGRESS, counted]
        routed = routing.elements(networks, intent.routers)
        wanted += [*map(rules.of_network, networks.values()), *map(rules.of_port, ports), routed]
        between = [each for each in intent.peerings if peer_overlay.is_needed(each, intent.ports)]
        wanted.append(peering.elements(networks, intent.peerings, [each.index for each in between]))
        wanted += [peer_overlay.elements(networks, each, self.naming.range6) for each in between]
        wanted += elsewhere
        if not intent.complete:  # elements that may be of a missing network or port stay
            known = {naming.bridge(n) for n in self._networks} | {naming.port(n) for n in self._ports}
            of_routers = routing.known(have, self._routed)
            have = {name: {k for k in some if rules.element(name, k)[0] in known} for name, some in have.items()}
            have |= of_routers
        self._routed = routed
        self._transact(wanted, have, self.policy.whole(intent, ports))

    def _transact(
        self, wanted: Iterable[rules.Elements], have: dict[str, set[bytes]], policies: PolicyChange | None = None
    ) -> None:
        """Change the sets from the keys `have` to the elements `wanted`, and the policies. If some go, the next epoch
        begins: open connections may need them."""
        added, deleted = state.differences(wanted, have)
        requests = rules.change(self.naming.prefix, added, deleted)
        restricts = not self._epoch.is_valid() or any(deleted.values())
        self.policy.commit(requests, policies or NO_CHANGE, restricts=restricts)

    # -- ports ---------------------------------------------------------------------------------------------------

    def plug(
        self,
        network: Network,
        port: Port,
        nic: NetnsNic | TapNic | DeviceNic,
        beside: Places = (),
        labels: Mapping[str, str] = NO_LABELS,
    ) -> None:
        """Connect a nic to a port; an existing connection is repaired. `beside` are the instance's other ports, which
        are connected, and `labels` those of the instance."""
        if isinstance(nic, NetnsNic):
            self._plug_netns(network, port, nic.fd, beside, labels)
        else:
            self._plug_machine(network, port, nic, labels)

    def _plug_netns(self, network: Network, port: Port, netns: int, beside: Places, labels: Mapping[str, str]) -> None:
        with reported(network, port):
            inside = self._connections.enter(network, port, netns)

        def configure() -> None:
            interfaces.configure(inside, network, port, beside)
            inside.sync_carrier(port.interface)

        with contextlib.closing(inside):
            connect = functools.partial(self._connections.veth, network, port, netns, inside)
            self._plug(network, port, labels, connect, configure)

    def _plug_machine(self, network: Network, port: Port, nic: TapNic | DeviceNic, labels: Mapping[str, str]) -> None:
        """Connect the device of a virtual machine, which configures its own end."""
        self._plug(
            network,
            port,
            labels,
            functools.partial(self._connections.machine, network, port, nic, self.netns),
            lambda: None,
        )

    def _plug(
        self,
        network: Network,
        port: Port,
        labels: Mapping[str, str],
        connect: Callable[[], None],
        configure: Callable[[], None],
    ) -> None:
        """Connect a port, admit its packets, and then have the instance's end configured. A failure undoes it."""
        with contextlib.ExitStack() as undo:
            self._ports.add(port.index)
            undo.callback(self.unplug, network, port)
            with reported(network, port):
                connect()
                self.policy.admit(port, labels, rules.add(self.naming.prefix, rules.of_port(port)))
                pairs.replace(self._nftables, self.naming.prefix, port, plugged=True)
                configure()
                self.rtnl.sync_carrier(naming.port(port.index))
                self._announce(port)
                self._guests.add(network, port)
            undo.pop_all()

    def _announce(self, port: Port) -> None:
        """Announce addresses whose MAC address has changed; neighbours would use the old one for half a minute."""
        moved = [address for address in addresses(port) if self._previous_macs.pop(address, port.mac) != port.mac]
        if moved and self._injector:
            inject, index = self._injector.inject, naming.port_index(port.index)
            frames = [announcement(port.mac, address) for address in moved]
            call_in(self.netns, lambda: [inject(index, frame) for frame in frames])

    def unplug(self, network: Network, port: Port) -> None:
        """Remove the port's set elements, and mark its device, which `delete_marked` deletes with its other end."""
        self._unplug(network, port, rules.of_port(port))

    def _unplug(self, network: Network, port: Port, elements: rules.Elements) -> None:
        self._guests.remove(port)
        bridge, moved = naming.bridge_index(network.index), (network.name, port.mac) in self._remotes
        self.policy.withdraw(port, rules.delete(self.naming.prefix, elements))
        pairs.replace(self._nftables, self.naming.prefix, port, plugged=False)
        group, self._unplugged = group_of(self._unplugged), self._unplugged + 1
        self.rtnl.execute(
            netlink.set_link_group(naming.port_index(port.index), group),
            *(netlink.delete_neighbour(bridge, address) for address in addresses(port) if not moved),
        )
        self._marked_groups.add(group)
        for address in addresses(port):
            self._previous_macs[address] = port.mac
        while len(self._previous_macs) > _REMEMBERED:
            del self._previous_macs[next(iter(self._previous_macs))]

    def withdraw(self, network: Network, port: Port, netns: int, beside: Places) -> None:
        """Remove a port except for its counters, its device, and what belongs to it in the namespace `netns`."""
        blocked = {name: some for name, some in rules.of_port(port).items() if name not in rules.COUNTED}
        self._unplug(network, port, blocked)
        while self.delete_marked():
            pass
        with reported(network, port), call_in(netns, Rtnl) as inside:
            interfaces.forget(inside, network, port, beside)
            call_in(netns, lambda: neighbours.release(self.naming.prefix, interfaces.gateways(network, port)))

    def delete_marked(self) -> bool:
        """Delete one group of unplugged devices; returns whether there are more. May be called from any thread."""
        with self._deleting:
            if self._marked_groups and not self._closed:
                machine_ports.delete_group(self._slow_rtnl, self._marked_groups.pop())
            return bool(self._marked_groups) and not self._closed

    def router_gaps(self, networks: Mapping[str, Network], router: Router) -> Sequence[str]:
        """Return what is missing of a router, as text. `networks` are all of the tenant's, by name."""
        have = {
            name: {rules.element(name, key) for key in rules.read(self._nftables, self.naming.prefix, name)}
            for name in routing.SETS
        }
        return routing.missing(self.rtnl, have, networks, router)

    # -- elements ------------------------------------------------------------------------------------------------

    def elements(self) -> dict[str, set[tuple[str, ...]]]:
        """Return all elements of the sets, by "family set"."""
        have = state.keys(self._nftables, self.naming.prefix)
        return {name: {rules.element(name, key) for key in some} for name, some in have.items()}

    def traffic(self, ports: Sequence[Port]) -> dict[int, Traffic]:
        """Return the counters of these ports by their indices; a port without them is left out."""
        table, keys = self.naming.prefix, {p.index: rules.key("bridge sent", (naming.port(p.index),)) for p in ports}

        def counters(name: str) -> dict[bytes, ElementCounter]:
            if len(keys) > _SINGLY:
                return self._nftables.counters("bridge", table, name)
            found = {key: self._nftables.counter("bridge", table, name, key) for key in keys.values()}
            return {key: counter for key, counter in found.items() if counter}

        received, sent = counters("received"), counters("sent")
        return {
            index: Traffic(TrafficCounter(*one), TrafficCounter(*other))
            for index, key in keys.items()
            if (one := received.get(key)) and (other := sent.get(key))
        }

    def egress_traffic(self) -> Traffic | None:
        """Return the counters of all namespaces of `linux.egress`; None if they are missing."""
        sent, received = (
            self._nftables.counter(family, self.naming.prefix, set_, rules.key(name, element))
            for name, [element] in rules.OF_EGRESS.items()
            for family, set_ in [name.split()]
        )
        return Traffic(TrafficCounter(*received), TrafficCounter(*sent)) if received and sent else None

    def _replace_elements(self, port: Port) -> None:
        """Replace all elements of the port's device by those of the port."""
        device = naming.port(port.index)
        have = state.keys(self._nftables, self.naming.prefix)
        mine = {name: {k for k in some if rules.element(name, k)[0] == device} for name, some in have.items()}
        self._transact([rules.of_port(port)], mine)
