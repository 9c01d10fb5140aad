"""A tenant's network namespace on this host: handles into it, and what is made through them.

The handles (a descriptor, an rtnetlink socket, an nftables context) are opened inside once and kept, so that a port
costs no change of namespace on the tenant's side.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Final

from insula.kernel import descriptors, netlink, nfelements
from insula.kernel.injection import Injector
from insula.kernel.netlink import NetlinkError, Rtnl
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.errors import Conflict, Failed
from insula.model.objects import Network, Port, Tenant
from insula.network.addresses import gateway_mac, uplink_mac
from insula.network.linux import naming, rules, sysctl
from insula.network.linux.deletion import group_of, is_gone
from insula.network.linux.naming import Naming
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
        self.netns = descriptors.high(netns)
        # the third is for what takes long, and would keep others waiting for the first
        self.rtnl, self.nft, self._slow = call_in(self.netns, lambda: (Rtnl(), Nft(), Rtnl()))
        self._deleting = threading.Lock()
        self._closed = False
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
        for theirs, ours, everything, prefix in pairs:
            # neighbours are fixed: nobody has to ask, and the host's rules may drop whatever a tenant sends to it
            host.execute(
                netlink.add_address(far.index, f"{theirs}/{prefix}"), netlink.add_neighbour(far.index, ours, our_mac)
            )
            self.rtnl.execute(
                netlink.set_link(1, up=True),
                netlink.set_link(near.index, up=True),
                netlink.add_address(near.index, f"{ours}/{prefix}"),
                netlink.add_neighbour(near.index, theirs, host_mac),
                netlink.add_route(everything, index=near.index, gateway=theirs),
            )
        host.settle(name)
        self.rtnl.settle(naming.UPLINK)

    # -- networks ------------------------------------------------------------------------------------------------

    def ensure_network(self, network: Network) -> None:
        """The bridge with the gateway's addresses and exactly those."""
        name, index, mac = naming.bridge(network.index), naming.bridge_index(network.index), gateway_mac(network.index)
        link = self.rtnl.link(name)
        if link and (link.kind != "bridge" or link.index != index):
            self.rtnl.execute(netlink.delete_link(index=link.index))
            link = None
        if link is None:
            self.rtnl.execute(netlink.bridge(name, index=index, mac=mac, mtu=network.mtu))
        settings = {f"ipv6/conf/{name}/disable_ipv6": "0" if network.gateway6 else "1"}
        call_in(self.netns, lambda: sysctl.write(settings))
        wanted = gateways(network)
        present = [a.address for a in self.rtnl.addresses() if a.index == index and not a.link_local]
        self.rtnl.execute(
            netlink.set_link(index, up=True, mac=mac, mtu=network.mtu, alias=network.name),
            *(netlink.delete_address(index, address) for address in present if address not in wanted),
            *(netlink.add_address(index, address) for address in wanted),
        )
        self._replace_elements(name, rules.of_network(network), "inet")

    def remove_network(self, index: int) -> None:
        """The bridge and its elements."""
        self.rtnl.execute(netlink.delete_link(name=naming.bridge(index)))
        self._replace_elements(naming.bridge(index), {}, "inet")

    # -- ports ---------------------------------------------------------------------------------------------------

    def attach(self, network: Network, port: Port, netns: int) -> None:
        """Connect the namespace `netns`; what is there already and right stays, what is wrong is replaced."""
        with contextlib.ExitStack() as undo:
            inside = call_in(netns, lambda: _enter(port))
            try:
                undo.callback(self.detach, network, port)
                try:
                    self._connect(network, port, netns)
                    self.nft.run(rules.add(self.naming.prefix, rules.of_port(port)))
                except NetlinkError as error:
                    if error.errno != errno.EEXIST:
                        raise
                    self._reconnect(network, port, netns, inside)
                    self._replace_elements(naming.port(port.index), rules.of_port(port), "bridge")
                _configure(inside, network, port)
                self.rtnl.settle(naming.port(port.index))
                inside.settle(DEVICE)
                self._announce(port)
                undo.pop_all()
            except OSError as error:
                raise Failed(f"port of {port.instance} on network {network.name}: {error.strerror or error}") from error
            finally:
                inside.close()

    def _announce(self, port: Port) -> None:
        """Tell neighbours of addresses that another MAC address had before; they would send there for half a minute."""
        moved = [address for address in addresses(port) if self._before.pop(address, port.mac) != port.mac]
        if moved and self._injector:
            inject, index = self._injector.inject, naming.port_index(port.index)
            frames = [announcement(port.mac, address) for address in moved]
            call_in(self.netns, lambda: [inject(index, frame) for frame in frames])

    def detach(self, network: Network, port: Port) -> None:
        """Remove what the port was allowed; both its ends are only marked, to be deleted by `delete_marked`."""
        bridge = naming.bridge_index(network.index)
        self.nft.run(rules.delete(self.naming.prefix, rules.of_port(port)))
        group, self._departed = group_of(self._departed), self._departed + 1
        self.rtnl.execute(
            netlink.mark_link(naming.port_index(port.index), group),
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
            self.rtnl.execute(pair, *_port_settings(network, port))
        except NetlinkError as error:
            if error.errno != errno.EXFULL:
                raise
            while self.delete_marked():  # those that are marked have their places still
                pass
            try:
                self.rtnl.execute(pair, *_port_settings(network, port))
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
            self.rtnl.execute(repair, *_port_settings(network, port))
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

    def remove_port(self, index: int) -> None:
        """A port of which only the index is known."""
        self.rtnl.execute(netlink.delete_link(name=naming.port(index)))
        self._replace_elements(naming.port(index), {}, "bridge")

    def sweep(self, networks: set[int], ports: list[Port]) -> None:
        """Remove networks and ports that are not in these, and all that is left of such."""
        indices = {port.index for port in ports}
        for link in self.rtnl.links():
            network, index = naming.number(link.name, "br"), naming.number(link.name, "p")
            if is_gone(link.group):
                self._gone.add(link.group)  # its turn comes
            elif (network is not None and network not in networks) or (index is not None and index not in indices):
                self.rtnl.execute(netlink.delete_link(index=link.index))
        keep = {naming.bridge(index) for index in networks} | {naming.port(index) for index in indices}
        if not self._devices(*FAMILIES).keys() <= keep:
            stale = {name: [e for e in some if e[0] not in keep] for name, some in self.elements().items()}
            self.nft.run(rules.delete(self.naming.prefix, stale))
        known = {address for port in ports for address in addresses(port)}
        for family in (socket.AF_INET, socket.AF_INET6):
            for entry in self.rtnl.neighbours(family):
                if entry.permanent and entry.address and entry.address not in known and _is_bridge(entry.index):
                    self.rtnl.execute(netlink.delete_neighbour(entry.index, entry.address))

    # -- elements ------------------------------------------------------------------------------------------------

    def _devices(self, *families: str) -> Counter[str]:
        """All that the sets of these families say something of, and how much."""

        def read() -> Counter[bytes]:
            names = ((family, name) for family, name in rules.SETS if family in families)
            listed = (nfelements.keys(family, self.naming.prefix, name) for family, name in names)
            return Counter(key[: nfelements.IFNAME] for keys in listed for key in keys)

        found = call_in(self.netns, read)
        return Counter({name.rstrip(b"\0").decode(): number for name, number in found.items()})

    def elements(self, families: Sequence[str] = FAMILIES) -> dict[str, set[tuple[str, ...]]]:
        """All elements of our sets, by "family set"."""
        table = self.naming.prefix
        listed = {family: self.nft.elements(family, table) for family in families}
        return {f"{family} {name}": some for family, sets in listed.items() for name, some in sets.items()}

    def _replace_elements(self, device: str, wanted: rules.Elements, family: str) -> None:
        """Make `wanted` all that is said of the device: of ports in one family, of bridges in the other."""
        if commands := rules.add(self.naming.prefix, wanted):
            self.nft.run(commands)
        if self._devices(family)[device] == sum(len(list(some)) for some in wanted.values()):
            return
        stale = {
            name: [element for element in present if element[0] == device and element not in wanted.get(name, ())]
            for name, present in self.elements((family,)).items()
        }
        self.nft.run(rules.delete(self.naming.prefix, stale))


@functools.lru_cache(maxsize=1024)
def _prefix(subnet: str) -> int:
    return ip_network(subnet).prefixlen


def _is_bridge(index: int) -> bool:
    return naming.bridge_index(0) <= index < naming.port_index(0)


def gateways(network: Network) -> list[str]:
    """The gateway's addresses with prefix lengths."""
    found = [f"{network.gateway}/{_prefix(network.subnet)}"]
    if network.gateway6 and network.subnet6:
        found.append(f"{network.gateway6}/{_prefix(network.subnet6)}")
    return found


def addresses(port: Port) -> list[str]:
    """What the port has."""
    return [port.address, *([port.address6] if port.address6 else [])]


def _with_prefixes(network: Network, port: Port) -> list[tuple[str, str]]:
    """(address with prefix length, gateway) of each IP version that the port has."""
    found = [(f"{port.address}/{_prefix(network.subnet)}", network.gateway)]
    if port.address6 and network.subnet6 and network.gateway6:
        found.append((f"{port.address6}/{_prefix(network.subnet6)}", network.gateway6))
    return found


def _port_settings(network: Network, port: Port) -> list[netlink.Request]:
    """Where its MAC and IP addresses are is written down, not learned: nobody can claim another's by sending."""
    index, bridge = naming.port_index(port.index), naming.bridge_index(network.index)
    return [
        netlink.set_bridge_port(index, learning=False, flood=False),
        netlink.set_link(index, alias=port.instance),
        netlink.add_forwarding(index, port.mac),
        *(netlink.add_neighbour(bridge, address, port.mac) for address in addresses(port)),
    ]


def _enter(port: Port) -> Rtnl:
    """In the instance's namespace: its settings, and a socket to do the rest from outside."""
    sysctl.write(sysctl.instance(ipv6=port.address6 is not None))
    return Rtnl()


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
