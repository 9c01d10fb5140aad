"""Find devices in an instance's namespace that bypass its port.

An instance has loopback and eth0, the other end of its port. It may make more devices, and connect them to namespaces
of its own (containers in a container). It can't make a device that leads to the host, to a tenant's router or to
another instance. If there is one, the two were joined from the host, and packets through it pass no rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.messages import Link
from insula.kernel.netns import call_in
from insula.model.objects import Port
from insula.network.linux import naming

_LOOPBACK = 1


def strange_devices(ports: Mapping[int, int], owners: Sequence[Port], tenants: Mapping[str, int]) -> list[str]:
    """Return the wrong devices inside instances, as text.

    `ports` has descriptors of the instances' namespaces by the index of the port, `tenants` those of the tenants'
    namespaces by name.
    """
    host = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        known = {"the host": host, **{f"tenant {name}": netns for name, netns in tenants.items()}}
        known |= {f"{port.tenant}/{port.instance}": ports[port.index] for port in owners}
        return [text for port in owners for text in _of_instance(port, ports[port.index], known)]
    finally:
        os.close(host)


def _of_instance(port: Port, netns: int, known: Mapping[str, int]) -> Iterator[str]:
    name = f"{port.tenant}/{port.instance}"
    with call_in(netns, Rtnl) as rtnl:
        router = known.get(f"tenant {port.tenant}")
        number = None if router is None else rtnl.namespace_number(router)
        others = [link for link in rtnl.links() if link.index != _LOOPBACK]
        own = [link for link in others if _is_own(link, port, number)]
        if not own:
            yield f"{name} has no device at the other end of {naming.port(port.index)}"
        for link in others:
            if link not in own and (where := _leads_to(link, rtnl, known)):
                yield f"device {link.name} in {name} leads to {where}"


def _is_own(link: Link, port: Port, router: int | None) -> bool:
    """Whether a link is the other end of the instance's port."""
    there = link.peer == naming.port_index(port.index) and link.namespace == router
    return link.kind == "veth" and router is not None and there


def _leads_to(link: Link, rtnl: Rtnl, known: Mapping[str, int]) -> str | None:
    """Return the owner of the namespace that a device leads to, if it is known; a physical device leads outside."""
    if not link.kind:
        return "the outside: it is a physical device"
    if link.namespace is None:
        return None
    return next((owner for owner, netns in known.items() if rtnl.namespace_number(netns) == link.namespace), None)
