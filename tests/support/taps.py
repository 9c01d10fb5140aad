"""Instances whose ports are those of virtual machines, without a machine.

The machine's side is a network namespace, with a device that has the MAC address and the addresses of the port.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

from insula.kernel import netlink, tap
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.objects import Network
from insula.network.addresses import gateway_mac
from insula.network.fabric import DeviceNic, Nic, TapNic
from insula.network.linux import sysctl
from insula.network.linux.interfaces import addresses_of
from tests.support.lab import Instance

DEVICE = 5
"""The index of eth0 inside."""
_FRAME = 1 << 16


class MachineInstance(Instance):
    """A machine. Its end takes its side of the port with it."""

    def plugged(self, network: Network) -> None:
        """Boot: its system sets addresses and routes, which the agent of a machine does, or DHCP."""
        port = self.port
        self.do(lambda: sysctl.write(sysctl.interface(ipv6=port.address6 is not None)))
        self.connect()
        with self.do(Rtnl) as rtnl:
            rtnl.execute(netlink.set_link(DEVICE, up=True, mac=port.mac))
            for each in addresses_of(network, port):
                rtnl.execute(netlink.add_address(DEVICE, each.with_prefix))
                rtnl.execute(netlink.add_neighbour(DEVICE, each.gateway, gateway_mac(network.index)))
                rtnl.execute(netlink.add_route(each.everything, index=DEVICE, gateway=each.gateway))

    def connect(self) -> None:
        """Have its device, eth0."""
        raise NotImplementedError

    def end(self) -> None:
        """End the machine: its side of the port goes."""
        raise NotImplementedError

    def remove(self) -> None:
        self.end()
        super().remove()


class TapInstance(MachineInstance):
    """A machine on a tap, whose descriptor is `tap`. Its device is a tap as well; frames are passed from one descriptor
    to the other, as a hypervisor does."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = tap.make()
        self._device = tap.make()
        self._ends, self._ended = os.pipe()
        self._relay = threading.Thread(target=self._pass_on, daemon=True)

    def nic(self) -> Nic:
        return TapNic(os.dup(self.tap))

    def connect(self) -> None:
        there = tap.namespace(self._device)
        with call_in(there, Rtnl) as rtnl:
            index = rtnl.index(tap.name(self._device))
            assert index is not None
            rtnl.execute(netlink.move_link(index, self.netns, name="eth0", new_index=DEVICE))
        os.close(there)
        self._relay.start()

    def _pass_on(self) -> None:
        other = {self.tap: self._device, self._device: self.tap}
        while True:
            ready, _, _ = select.select([*other, self._ends], [], [])
            if self._ends in ready:
                return
            for each in ready:
                with contextlib.suppress(OSError):  # the other end is down
                    os.write(other[each], os.read(each, _FRAME))

    def end(self) -> None:
        os.write(self._ended, b"x")  # a server, which is a fork, has copies of all descriptors
        self._relay.join()
        for fd in (self.tap, self._device, self._ends, self._ended):
            os.close(fd)


class DeviceInstance(MachineInstance):
    """A machine whose device, `device`, a hypervisor has made in the host's namespace: one end of a veth pair stands
    for it. The other end is the machine's."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self._own = f"vif{self.pid}.0", f"vif{self.pid}.1"

    def nic(self) -> Nic:
        with Rtnl() as rtnl:
            here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            rtnl.execute(netlink.veth(self.device, self._own, here))
            os.close(here)
        return DeviceNic(self.device)

    def connect(self) -> None:
        with Rtnl() as rtnl:
            own = rtnl.index(self._own)
            assert own is not None
            rtnl.execute(netlink.move_link(own, self.netns, name="eth0", new_index=DEVICE))

    def end(self) -> None:
        with self.do(Rtnl) as inside:
            inside.execute(netlink.delete_link(name="eth0"))
