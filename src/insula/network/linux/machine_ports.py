"""Ports of virtual machines: devices, which are moved into the tenant's namespace, and become ports of a bridge.

Such a device is a tap, or one of the host's namespace that a hypervisor has made (a vif of Xen). A machine configures
its own end. Nothing of the port is in a namespace of the instance. A vif has no kind (rtnl_link_ops of Linux), and
nobody but the hypervisor can delete it: it goes with its machine.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace

from insula.kernel import netlink, tap
from insula.kernel.netlink import NetlinkError, Request, Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import Failed
from insula.model.objects import Network, Port
from insula.network.fabric import DeviceNic, TapNic
from insula.network.linux import naming, state
from insula.network.linux.deletion import is_gone

TAKEN = frozenset({errno.EEXIST, errno.EBUSY})
"""Errors of `move`: there is a device with the name, or with the index."""
_TAP = "tun"


def move(netns: int, port: Port, nic: TapNic | DeviceNic) -> None:
    """Move a device into the namespace `netns`, with the name and the index of the port. One of `TAKEN` if there is a
    device with one of them."""
    if isinstance(nic, TapNic):
        assert nic.fd is not None
        there = tap.namespace(nic.fd)
        try:
            with call_in(there, Rtnl) as rtnl:
                _move(rtnl, tap.name(nic.fd), netns, port)
        finally:
            os.close(there)
    else:
        assert nic.name is not None
        with Rtnl() as rtnl:
            _move(rtnl, nic.name, netns, port)


def _move(rtnl: Rtnl, device: str, netns: int, port: Port) -> None:
    index = rtnl.index(device)
    if index is None:
        raise Failed(f"the network device {device} of {port.instance} is missing", "start the instance again")
    name, wanted = naming.port(port.index), naming.port_index(port.index)
    rtnl.execute(netlink.move_link(index, netns, name=name, new_index=wanted))


def check(rtnl: Rtnl, port: Port, nic: TapNic | DeviceNic) -> None:
    """Check that the port of a machine that runs has its device. Failed: only another start makes one."""
    link, is_tap = rtnl.link(naming.port(port.index)), isinstance(nic, TapNic)
    if link is None or is_gone(link.group) or (is_tap and link.kind != _TAP):
        what = "tap" if is_tap else "network device"
        raise Failed(f"the {what} of {port.instance} is gone", "restart the instance")


def delete_group(rtnl: Rtnl, group: int) -> None:
    """Delete the devices of a group. Those of a hypervisor, which stay until their machines end, are blocked."""
    try:
        rtnl.execute(netlink.delete_links(group))
    except NetlinkError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        for link in rtnl.links():
            if link.group == group:
                rtnl.execute(netlink.delete_link(index=link.index) if link.kind else block(link.index))


def block(index: int) -> Request:
    """Return a request that takes a device from its bridge, and sets it down; no error if it is gone."""
    return replace(netlink.set_link(index, up=False, master=0), ignore=frozenset({errno.ENODEV}))


def settings(network: Network, port: Port) -> list[Request]:
    """Return requests that make the device a port of its network's bridge, and set it up."""
    index, bridge = naming.port_index(port.index), naming.bridge_index(network.index)
    return [
        netlink.set_link(index, mtu=network.mtu, master=bridge, alias=port.instance),
        *state.port_settings(network, port),
        netlink.set_link(index, up=True),
    ]
