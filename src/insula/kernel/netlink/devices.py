"""Move network devices to another network namespace (network_namespaces(7)) with their addresses.

RTM_NEWLINK with IFLA_NET_NS_FD (rtnetlink(7)) moves a device, but sets it down and drops its addresses. When a
namespace ends, the kernel moves physical devices back to the initial namespace, and removes virtual ones.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from insula.kernel import syscalls
from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink.messages import (
    ADDR,
    IFA_FLAGS,
    IFF_UP,
    IFLA_IFNAME,
    IFLA_NET_NS_FD,
    LINK,
    RTM_GETADDR,
    RTM_NEWADDR,
    RTM_NEWLINK,
)
from insula.kernel.netlink.rtnetlink import Rtnl
from insula.kernel.netlink.socket import CREATE, REPLACE, Request

_IFA_PERMANENT = 0x80
_IFA_KEPT = 0x02 | 0x200  # IFA_F_NODAD, IFA_F_NOPREFIXROUTE
_IFA_COPIED = (1, 2, 4)  # IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST
_UNIVERSE = 0


class Moved(NamedTuple):
    """The result of a move: the device's new name, and whether it was up before."""

    name: str
    was_up: bool


class NamespaceSocket(Rtnl):
    """An rtnetlink socket in the network namespace behind `fd`; the calling thread enters it to open the socket."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.setns(fd, syscalls.CLONE_NEWNET)
            try:
                super().__init__()
            finally:
                syscalls.setns(own, syscalls.CLONE_NEWNET)
        finally:
            os.close(own)

    def permanent_addresses(self, index: int) -> list[bytes]:
        """Return the permanent addresses of global scope, as bodies of requests without a device's index.

        These are the addresses that the runtime-spec requires to be kept (config-linux.md, "Network devices").
        """
        found = []
        for body in self.dump(RTM_GETADDR, ADDR.pack(0, 0, 0, 0, 0)):
            family, prefix, short_flags, scope, at = ADDR.unpack_from(body)
            attributes = rtattr.parse(body[ADDR.size :])
            flags = rtattr.integer(attributes[IFA_FLAGS]) if IFA_FLAGS in attributes else short_flags
            if at == index and scope == _UNIVERSE and flags & _IFA_PERMANENT:
                copied = [(kind, attributes[kind]) for kind in _IFA_COPIED if kind in attributes]
                kept = rtattr.attributes(*copied, (IFA_FLAGS, rtattr.u32(flags & _IFA_KEPT)))
                found.append(bytes((family, prefix, 0, scope)) + kept)
        return found


def move(source: NamespaceSocket, name: str, target: NamespaceSocket, new_name: str, *, up: bool = True) -> Moved:
    """Move the device `name`; `new_name` may contain ``%d``. If its addresses can't be set, it is moved back.

    OSError: ENODEV if there is no such device, EEXIST if the new name is in use.
    """
    link = source.link(name)
    if link is None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)
    before = {each.index: each.name for each in target.links()}
    if new_name in before.values():
        raise OSError(errno.EEXIST, f"the network namespace has a device {new_name} already", name)
    addresses = source.permanent_addresses(link.index)
    attributes = rtattr.attributes((IFLA_NET_NS_FD, rtattr.u32(target.fd)), (IFLA_IFNAME, rtattr.text(new_name)))
    request = LINK.pack(0, 0, link.index, 0, 0) + attributes
    source.execute(Request(f"move {name}", RTM_NEWLINK, 0, request))
    arrived = next(each for each in target.links() if each.index not in before)
    try:
        target.execute(
            *(
                Request(f"add an address of {name}", RTM_NEWADDR, CREATE | REPLACE, _at(body, arrived.index))
                for body in addresses
            ),
            Request(f"set {name} up", RTM_NEWLINK, 0, LINK.pack(0, 0, arrived.index, IFF_UP if up else 0, IFF_UP)),
        )
    except OSError:
        move(target, arrived.name, source, name, up=link.up)
        raise
    return Moved(arrived.name, link.up)


def _at(body: bytes, index: int) -> bytes:
    return body[:4] + rtattr.u32(index) + body[4:]
