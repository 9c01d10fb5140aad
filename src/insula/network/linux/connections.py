"""The devices of ports: a veth(4) pair into an instance's namespace, or a machine's, on the bridge of a network.

A device that is there is repaired if it leads to the same instance, else replaced.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from insula.kernel import netlink
from insula.kernel.netlink import NetlinkError, Request, Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import Conflict
from insula.model.objects import Network, Port
from insula.network.fabric import DeviceNic, TapNic
from insula.network.linux import interfaces, machine_ports, naming, neighbours, state, sysctl
from insula.network.linux.deletion import is_gone
from insula.network.linux.interfaces import addresses_of
from insula.network.linux.naming import Naming


class PortConnections:
    """Connects ports in a tenant's namespace, in which `rtnl` is. `delete_marked` deletes marked devices, and returns
    whether there are more; `replace_elements` makes the set elements of a port's device those of the port."""

    def __init__(
        self,
        names: Naming,
        rtnl: Rtnl,
        procfs: sysctl.Procfs,
        delete_marked: Callable[[], bool],
        replace_elements: Callable[[Port], None],
    ) -> None:
        self._prefix = names.prefix
        self._rtnl = rtnl
        self._procfs = procfs
        self._delete_marked = delete_marked
        self._replace_elements = replace_elements

    def enter(self, network: Network, port: Port, netns: int) -> Rtnl:
        """Write settings and rules in the instance's namespace, and return a socket there for the rest."""

        def work() -> Rtnl:
            new = neighbours.bound(self._prefix, interfaces.gateways(network, port))
            settings = sysctl.interface(ipv6=port.address6 is not None)
            sysctl.write({**sysctl.INSTANCE, **settings} if new else settings, self._procfs)
            return Rtnl()

        return call_in(netns, work)

    def veth(self, network: Network, port: Port, netns: int, inside: Rtnl) -> None:
        """Connect the namespace `netns`, in which the socket `inside` is."""
        try:
            self._connect(network, port, netns)
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            self._reconnect(network, port, netns, inside)
            self._replace_elements(port)

    def machine(self, network: Network, port: Port, nic: TapNic | DeviceNic, netns: int) -> None:
        """Move the device of a virtual machine into the tenant's namespace `netns`, in place of what is left of an
        earlier one. That of a machine which runs must be there."""
        if nic in (TapNic(None), DeviceNic(None)):
            machine_ports.check(self._rtnl, port, nic)
        else:
            try:
                machine_ports.move(netns, port, nic)
            except NetlinkError as error:
                if error.errno not in machine_ports.TAKEN:
                    raise
                self._rtnl.execute(netlink.delete_link(name=naming.port(port.index)))
                self._replace_elements(port)
                machine_ports.move(netns, port, nic)
        self._on_bridge(network, machine_ports.settings(network, port))

    def _connect(self, network: Network, port: Port, netns: int) -> None:
        """Make the veth pair in one batch. EEXIST if a device has one of the names; Conflict as of `_on_bridge`."""
        pair = netlink.veth(
            naming.port(port.index),
            port.interface,
            netns,
            index=naming.port_index(port.index),
            peer_mac=port.mac,
            mtu=network.mtu,
            master=naming.bridge_index(network.index),
        )
        self._on_bridge(network, [pair, *state.port_settings(network, port)])

    def _on_bridge(self, network: Network, requests: Sequence[Request]) -> None:
        """Execute requests that add a port to a bridge. Conflict if the bridge is full."""
        try:
            self._rtnl.execute(*requests)
        except NetlinkError as error:
            if error.errno != errno.EXFULL:
                raise
            while self._delete_marked():  # marked ports are still counted
                pass
            try:
                self._rtnl.execute(*requests)
            except NetlinkError as still:
                if still.errno != errno.EXFULL:
                    raise
                what = f"network {network.name} has as many ports as a bridge can have, {naming.MAX_PORTS}"
                raise Conflict(what, "make another network for more instances") from None

    def _reconnect(self, network: Network, port: Port, netns: int, inside: Rtnl) -> None:
        """Repair an existing device if it leads to this namespace, else replace it."""
        ours, theirs = self._rtnl.link(naming.port(port.index)), inside.link(port.interface)
        index = naming.port_index(port.index)
        if ours and is_gone(ours.group):
            ours = None
        if ours and theirs and (ours.index, ours.peer) == (theirs.peer, theirs.index) == (index, theirs.index):
            repair = netlink.set_link(
                index, up=True, mtu=network.mtu, master=naming.bridge_index(network.index), alias=port.instance
            )
            self._rtnl.execute(repair, *state.port_settings(network, port))
            inside.execute(netlink.set_link(theirs.index, mac=port.mac, mtu=network.mtu))
            wanted = {each.with_prefix for each in addresses_of(network, port)}
            present = [a for a in inside.addresses() if a.index == theirs.index and not a.link_local]
            inside.execute(
                *(netlink.delete_address(theirs.index, a.address) for a in present if a.address not in wanted)
            )
            return
        self._rtnl.execute(netlink.delete_link(name=naming.port(port.index)))
        inside.execute(netlink.delete_link(name=port.interface))
        self._connect(network, port, netns)
