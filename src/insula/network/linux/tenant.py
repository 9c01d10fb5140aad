"""A tenant's network namespace on this host: handles into it, and what is made through them.

The handles (a descriptor, an rtnetlink socket, an nftables context) are opened inside once and kept, so that a port
costs no change of namespace on the tenant's side.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from insula.kernel import descriptors, netlink
from insula.kernel.injection import Injector
from insula.kernel.netlink import NetlinkError, Rtnl
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.errors import Conflict, Failed, InsulaError
from insula.model.objects import Network, Port, Tenant
from insula.network.addresses import gateway_mac, uplink_mac
from insula.network.intent import TenantIntent
from insula.network.linux import naming, neighbours, rules, state, sysctl
from insula.network.linux.deletion import group_of, is_gone
from insula.network.linux.naming import Naming
from insula.network.linux.state import State, addresses, prefix
from insula.network.packets import announcement

FAMILIES = ("bridge", "inet")
DEVICE = "eth0"  # of an instance
_REMEMBERED = 4096
RETRANSMIT: Final = 100
"""Milliseconds between two questions for a neighbour's MAC address.

The neighbour tables are shared by all namespaces of the host (arp(7), gc_thresh3), and an entry that waits for an
answer can't be taken out of them. It waits for three questions (mcast_solicit): 0.3 s here, while 3 s are usual. On one
host a neighbour answers in far less.
"""


class TenantNamespace:
    """Handles of one tenant; from one thread at a time. Raises `Failed` with the kernel's reason."""

    def __init__(self, names: Naming, tenant: Tenant, netns: int, injector: Injector | None) -> None:
        self.naming = names
        self.tenant = tenant
        self.netns = descriptors.move_above_select_limit(netns)
        # the third is for what takes long, and would keep others waiting for the first
        self.rtnl, self.nft, self._slow = call_in(self.netns, lambda: (Rtnl(), Nft(), Rtnl()))
        self._deleting = threading.Lock()
        self._closed = False
        self._networks: set[int] = set()  # that intents had
        self._ports: set[int] = set()  # that intents had, or that were plugged
        self._gone: set[int] = set()  # groups of devices that wait for `delete_marked`
        self._departed = 0
        self._before: dict[str, str] = {}  # address → MAC address of who had it last
        self._injector = injector

    def close(self) -> None:
        with self._deleting:
            self._closed = True
            self._slow.close()
        self.rtnl.close()
        self.nft.close()
        netns, self.netns = self.netns, -1  # a thread that is late must not find another namespace behind the number
        os.close(netns)

    def is_current(self) -> bool:
        """Whether the namespace kept under the tenant's name is still the one behind our handles."""
        try:
            kept, ours = os.stat(self.naming.namespace(self.tenant.name)), os.fstat(self.netns)
        except FileNotFoundError:
            return False
        return (kept.st_dev, kept.st_ino) == (ours.st_dev, ours.st_ino)

    # -- the tenant --------------------------------------------------------------------------------------------

    def ensure(self, host: Rtnl, *, ipv6: bool) -> None:
        """Router settings, rules and the uplink."""
        call_in(self.netns, lambda: sysctl.write(sysctl.ROUTER))
        rules.install(self.nft, self.naming.prefix, FAMILIES, rules.tenant_rules(self.naming.prefix))
        self._ensure_uplink(host, ipv6=ipv6)

    def _uplink_addresses(self) -> list[str]:
        """Of the tenant's end, with prefix lengths."""
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
            # neighbours are fixed: nobody has to ask, and the host's rules may drop whatever a tenant sends to it
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

    # -- all of it -----------------------------------------------------------------------------------------------

    def apply(self, intent: TenantIntent, prepare: Callable[[Network], None], errors: dict[str, InsulaError]) -> None:
        """Make networks, ports and elements what the intent wants; `ensure` was called before.

        `prepare` is called with each network first, and may refuse it. What can't be made is added to `errors`.
        """
        now = state.read(self.netns, self.rtnl, self.naming.prefix)
        self._gone |= now.gone
        with recording(errors, "tenant"):
            self.rtnl.execute(*state.uplink(now, self._uplink_addresses()))
        with recording(errors, "leftovers"):
            self._remove_leftovers(intent, now)
        networks = {network.name: network for network in intent.networks}
        made = False
        for network in intent.networks:
            with recording(errors, f"network {network.name}"):
                prepare(network)
                made |= self._apply_network(network, now)
            if f"network {network.name}" in errors:
                del networks[network.name]
        if made:  # what was on a bridge that was not there needs more than before
            now = state.read(self.netns, self.rtnl, self.naming.prefix)
        plugged = [port for port in intent.ports if port.network in networks and self._is_plugged(port, now)]
        for port in plugged:
            with recording(errors, f"port {port.instance}"):
                self._repair_port(networks[port.network], port, now)
        with recording(errors, "tenant"):
            self._apply_elements(networks.values(), plugged, now, complete=intent.complete)

    def _remove_leftovers(self, intent: TenantIntent, now: State) -> None:
        """Take away networks and ports that are not in the intent; unless it is complete only those that once were."""
        networks = {network.index for network in intent.networks}
        ports = {port.index: port for port in intent.ports}
        for link in now.links.values():
            network, port = naming.number(link.name, "br"), naming.number(link.name, "p")
            stale = network is not None and network not in networks and (intent.complete or network in self._networks)
            stale |= port is not None and port not in ports and (intent.complete or port in self._ports)
            stale |= port in ports and link.index != naming.port_index(ports[port].index)
            if stale:
                self.rtnl.execute(netlink.delete_link(index=link.index))
        self._networks |= networks
        self._ports |= ports.keys()
        if intent.complete:
            self._networks, self._ports = networks, set(ports)
            known = {address for port in intent.ports for address in addresses(port)}
            for index, address in now.neighbours:
                if address not in known:
                    self.rtnl.execute(netlink.delete_neighbour(index, address))

    def _apply_network(self, network: Network, now: State) -> bool:
        """Make the bridge, or change what is wrong with it. True if it was made."""
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
        self.rtnl.execute(*state.bridge(now, network))
        return made

    def _is_plugged(self, port: Port, now: State) -> bool:
        link = now.links.get(naming.port(port.index))
        return link is not None and link.index == naming.port_index(port.index)

    def _repair_port(self, network: Network, port: Port, now: State) -> None:
        """Set right what the router's side of a port lacks; what is inside the instance only `plug` sees."""
        if requests := state.port(now, network, port):
            self.rtnl.execute(*requests)
            self.rtnl.sync_carrier(naming.port(port.index))

    def _apply_elements(
        self, networks: Iterable[Network], ports: Iterable[Port], now: State, *, complete: bool
    ) -> None:
        """Make the sets hold what these networks and plugged ports need, and nothing else."""
        wanted = [*map(rules.of_network, networks), *map(rules.of_port, ports)]
        have = now.elements
        if not complete:  # what may be somebody's stays
            known = {naming.bridge(n) for n in self._networks} | {naming.port(n) for n in self._ports}
            have = {name: {k for k in some if rules.element(name, k)[0] in known} for name, some in have.items()}
        if commands := state.elements(self.naming.prefix, wanted, have):
            self.nft.run(commands)

    # -- ports ---------------------------------------------------------------------------------------------------

    def plug(self, network: Network, port: Port, netns: int) -> None:
        """Connect the namespace `netns`; what is there already and right stays, what is wrong is replaced."""
        with contextlib.ExitStack() as undo:
            with reported(network, port):
                inside = call_in(netns, lambda: self._enter(network, port))
            self._ports.add(port.index)
            try:
                undo.callback(self.unplug, network, port)
                with reported(network, port):
                    try:
                        self._connect(network, port, netns)
                        self.nft.run(rules.add(self.naming.prefix, rules.of_port(port)))
                    except NetlinkError as error:
                        if error.errno != errno.EEXIST:
                            raise
                        self._reconnect(network, port, netns, inside)
                        self._replace_elements(port)
                    _configure(inside, network, port)
                    self.rtnl.sync_carrier(naming.port(port.index))
                    inside.sync_carrier(DEVICE)
                    self._announce(port)
                undo.pop_all()
            finally:
                inside.close()

    def _enter(self, network: Network, port: Port) -> Rtnl:
        """In the instance's namespace: its settings and rules, and a socket to do the rest from outside."""
        sysctl.write(sysctl.instance(ipv6=port.address6 is not None))
        gateways = [gateway for _, gateway in _with_prefixes(network, port)]
        neighbours.bound(self.naming.prefix, DEVICE, gateways)
        return Rtnl()

    def _announce(self, port: Port) -> None:
        """Tell neighbours of addresses that another MAC address had before; they would send there for half a minute."""
        moved = [address for address in addresses(port) if self._before.pop(address, port.mac) != port.mac]
        if moved and self._injector:
            inject, index = self._injector.inject, naming.port_index(port.index)
            frames = [announcement(port.mac, address) for address in moved]
            call_in(self.netns, lambda: [inject(index, frame) for frame in frames])

    def unplug(self, network: Network, port: Port) -> None:
        """Remove what the port was allowed; both its ends are only marked, to be deleted by `delete_marked`."""
        bridge = naming.bridge_index(network.index)
        self.nft.run(rules.delete(self.naming.prefix, rules.of_port(port)))
        group, self._departed = group_of(self._departed), self._departed + 1
        self.rtnl.execute(
            netlink.set_link_group(naming.port_index(port.index), group),
            *(netlink.delete_neighbour(bridge, address) for address in addresses(port)),
        )
        self._gone.add(group)
        for address in addresses(port):
            self._before[address] = port.mac
        while len(self._before) > _REMEMBERED:
            del self._before[next(iter(self._before))]

    def delete_marked(self) -> bool:
        """Delete devices of some ports that were detached, which takes its time; whether there are more. May be called
        from any thread."""
        with self._deleting:
            if self._gone and not self._closed:
                self._slow.execute(netlink.delete_links(self._gone.pop()))
            return bool(self._gone) and not self._closed

    def _connect(self, network: Network, port: Port, netns: int) -> None:
        """Make the pair in one batch. EEXIST if a device has one of the names; Conflict if the bridge is full."""
        index, bridge = naming.port_index(port.index), naming.bridge_index(network.index)
        pair = netlink.veth(
            naming.port(port.index), DEVICE, netns, index=index, peer_mac=port.mac, mtu=network.mtu, master=bridge
        )
        try:
            self.rtnl.execute(pair, *state.port_settings(network, port))
        except NetlinkError as error:
            if error.errno != errno.EXFULL:
                raise
            while self.delete_marked():  # those that are marked have their places still
                pass
            try:
                self.rtnl.execute(pair, *state.port_settings(network, port))
            except NetlinkError as still:
                if still.errno != errno.EXFULL:
                    raise
                what = f"network {network.name} has as many ports as a bridge can have, {naming.MAX_PORTS}"
                raise Conflict(what, "make another network for more instances") from None

    def _reconnect(self, network: Network, port: Port, netns: int, inside: Rtnl) -> None:
        """There is a device already: repair it if it leads to this namespace, else make it anew."""
        ours, theirs = self.rtnl.link(naming.port(port.index)), inside.link(DEVICE)
        index = naming.port_index(port.index)
        if ours and is_gone(ours.group):
            ours = None
        if ours and theirs and (ours.index, ours.peer) == (theirs.peer, theirs.index) == (index, theirs.index):
            repair = netlink.set_link(
                index, up=True, mtu=network.mtu, master=naming.bridge_index(network.index), alias=port.instance
            )
            self.rtnl.execute(repair, *state.port_settings(network, port))
            inside.execute(netlink.set_link(theirs.index, mac=port.mac, mtu=network.mtu))
            wanted = {address for address, _ in _with_prefixes(network, port)}
            present = [a for a in inside.addresses() if a.index == theirs.index and not a.link_local]
            inside.execute(
                *(netlink.delete_address(theirs.index, a.address) for a in present if a.address not in wanted)
            )
            return
        self.rtnl.execute(netlink.delete_link(name=naming.port(port.index)))
        inside.execute(netlink.delete_link(name=DEVICE))
        self._connect(network, port, netns)

    # -- elements ------------------------------------------------------------------------------------------------

    def elements(self) -> dict[str, set[tuple[str, ...]]]:
        """All elements of our sets, by "family set"."""
        have = call_in(self.netns, lambda: state.keys(self.naming.prefix))
        return {name: {rules.element(name, key) for key in some} for name, some in have.items()}

    def _replace_elements(self, port: Port) -> None:
        """Make what a port may send from all that is said of its device."""
        device = naming.port(port.index)
        have = call_in(self.netns, lambda: state.keys(self.naming.prefix))
        mine = {name: {k for k in some if rules.element(name, k)[0] == device} for name, some in have.items()}
        if commands := state.elements(self.naming.prefix, [rules.of_port(port)], mine):
            self.nft.run(commands)


@contextlib.contextmanager
def recording(errors: dict[str, InsulaError], what: str) -> Iterator[None]:
    """Add what fails inside to `errors`, under `what`, and go on."""
    try:
        yield
    except InsulaError as error:
        errors.setdefault(what, error)
    except OSError as error:
        errors.setdefault(what, Failed(f"{what}: {error.strerror or error}"))


@contextlib.contextmanager
def reported(network: Network, port: Port) -> Iterator[None]:
    """Raise Failed for an OSError inside, with the port's name."""
    try:
        yield
    except OSError as error:
        raise Failed(f"port of {port.instance} on network {network.name}: {error.strerror or error}") from error


def _with_prefixes(network: Network, port: Port) -> list[tuple[str, str]]:
    """(address with prefix length, gateway) of each IP version that the port has."""
    found = [(f"{port.address}/{prefix(network.subnet)}", network.gateway)]
    if port.address6 and network.subnet6 and network.gateway6:
        found.append((f"{port.address6}/{prefix(network.subnet6)}", network.gateway6))
    return found


def _configure(inside: Rtnl, network: Network, port: Port) -> None:
    """Bring up loopback and eth0 with addresses and default routes."""
    device = inside.link(DEVICE)
    if device is None:
        raise Failed(f"{DEVICE} of {port.instance} has vanished", "start the instance again")
    mac = gateway_mac(network.index)
    requests = [netlink.set_link(1, up=True), netlink.set_link(device.index, up=True)]
    for address, gateway in _with_prefixes(network, port):
        requests.append(netlink.set_retransmission(device.index, RETRANSMIT, ipv6=":" in gateway))
        everything = "::/0" if ":" in gateway else "0.0.0.0/0"
        requests += [
            netlink.add_address(device.index, address),
            netlink.add_neighbour(device.index, gateway, mac),
            netlink.add_route(everything, index=device.index, gateway=gateway),
        ]
    inside.execute(*requests)
