"""A tenant's way out for a program of the host: a network namespace that is connected to the tenant's router.

Its packets are forwarded to the uplink by the rules for instances, with the same limit of connections. It reaches the
DNS port of the gateways, and nothing else: not the router, not the tenant's instances, and no other namespace of this
kind. It has a loopback of its own, no IPv6, and no address of the tenant's networks. Its addresses are link-local
(RFC 3927): no network of a tenant can have them, and the router translates them.

The namespace has no name. When no process and no descriptor refers to it any more, also after a crash, it ends with its
devices.
"""

from __future__ import annotations

import errno
import os
from ipaddress import IPv4Network

from insula.kernel import netlink
from insula.kernel.netlink import NetlinkError, Rtnl
from insula.kernel.netns import OWN, call_in, call_in_new
from insula.model.errors import Failed, Unavailable
from insula.network.linux import naming, sysctl
from insula.network.linux.tenant import TenantNamespace

_RANGE = IPv4Network("169.254.64.0/24")
_LOOPBACK = 1
DEVICE = "eth0"
_SETTINGS = {
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
    "ipv4/tcp_syn_retries": "2",  # packets that may not pass are dropped: give up after seconds, not minutes
}


def connect(namespace: TenantNamespace) -> int:
    """Make a namespace that is connected to the router in `namespace`; returns a descriptor, which the caller closes.

    Unavailable if there are too many, Failed.
    """
    try:
        return _connect(namespace)
    except OSError as error:
        what = f"the network of tenant {namespace.tenant.name} can't be used: {error.strerror or error}"
        raise Failed(what, "try again; see insulad's log") from error


def _connect(namespace: TenantNamespace) -> int:
    netns = call_in_new(lambda: os.open(OWN, os.O_RDONLY | os.O_CLOEXEC))
    try:
        number = _link(namespace.rtnl, netns)
        router, ours = _addresses(number)
        near = namespace.rtnl.index(naming.egress(number))
        assert near is not None
        namespace.rtnl.execute(netlink.set_link(near, link_local=False), netlink.add_address(near, f"{router}/31"))
        call_in(netns, lambda: _configure(ours, router))
        namespace.rtnl.sync_carrier(naming.egress(number))
    except BaseException:
        os.close(netns)
        raise
    return netns


def _link(rtnl: Rtnl, netns: int) -> int:
    """Make the pair of devices, and return its number: the first that no other pair has."""
    for number in range(_RANGE.num_addresses // 2):
        try:
            rtnl.execute(netlink.veth(naming.egress(number), DEVICE, netns, mtu=naming.MTU))
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            return number
    raise Unavailable("too many images are fetched and sent in this tenant", "try again later")


def _addresses(number: int) -> tuple[str, str]:
    """Return the router's address and that of the other end (RFC 3021)."""
    return str(_RANGE[2 * number]), str(_RANGE[2 * number + 1])


def _configure(address: str, router: str) -> None:
    """Set up the device. Runs in the new namespace."""
    sysctl.write(_SETTINGS)
    with Rtnl() as rtnl:
        index = rtnl.index(DEVICE)
        assert index is not None
        rtnl.execute(
            netlink.set_link(_LOOPBACK, up=True),
            netlink.set_link(index, up=True),
            netlink.add_address(index, f"{address}/31"),
            netlink.add_route("0.0.0.0/0", index=index, gateway=router),
        )
        rtnl.sync_carrier(DEVICE)
