"""Ports of virtual machines: taps, which are moved into the tenant's namespace, and become ports of a bridge.

A machine configures its own end. Nothing of the port is in a namespace of the instance.
"""

from __future__ import annotations

import errno
import os

from insula.kernel import netlink, tap
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import Failed
from insula.model.objects import Network, Port
from insula.network.linux import naming, state
from insula.network.linux.deletion import is_gone

TAKEN = frozenset({errno.EEXIST, errno.EBUSY})
"""Errors of `move`: there is a device with the name, or with the index."""
_KIND = "tun"


def move(netns: int, port: Port, fd: int) -> None:
    """Move the device of a tap into the namespace `netns`, with the name and the index of the port. One of `TAKEN` if
    there is a device with one of them."""
    there = tap.namespace(fd)
    try:
        with call_in(there, Rtnl) as rtnl:
            index = rtnl.index(tap.name(fd))
            if index is None:
                raise Failed(f"the tap of {port.instance} is missing", "start the instance again")
            name, wanted = naming.port(port.index), naming.port_index(port.index)
            rtnl.execute(netlink.move_link(index, netns, name=name, new_index=wanted))
    finally:
        os.close(there)


def check(rtnl: Rtnl, port: Port) -> None:
    """Check that the port of a machine that runs has its tap. Failed: only another start makes one."""
    link = rtnl.link(naming.port(port.index))
    if link is None or is_gone(link.group) or link.kind != _KIND:
        raise Failed(f"the tap of {port.instance} is gone", "restart the instance")


def settings(network: Network, port: Port) -> list[Request]:
    """Return requests that make the device a port of its network's bridge, and set it up."""
    index, bridge = naming.port_index(port.index), naming.bridge_index(network.index)
    return [
        netlink.set_link(index, mtu=network.mtu, master=bridge, alias=port.instance),
        *state.port_settings(network, port),
        netlink.set_link(index, up=True),
    ]
