"""The devices in an instance's own namespace: what leads out of it beside its port.

An instance has loopback and eth0, the other end of its port. It may make more, and lead them into namespaces of its own
(containers in a container). A device that leads to the host, to a tenant's router or to another instance is nothing
that it could make: somebody has joined what should be apart, where no rule of ours sees the packets.
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
    """What is wrong with devices inside instances, as text. `ports` are descriptors of the instances' namespaces by the
    index of the port, `tenants` those of the tenants' namespaces."""
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
    """Whether it is the port's other end."""
    there = link.peer == naming.port_index(port.index) and link.namespace == router
    return link.kind == "veth" and router is not None and there


def _leads_to(link: Link, rtnl: Rtnl, known: Mapping[str, int]) -> str | None:
    """To whose namespace a device leads, if it is one of these; a device of hardware leads out of the host."""
    if not link.kind:
        return "the world: it is hardware"
    if link.namespace is None:
        return None
    return next((who for who, netns in known.items() if rtnl.namespace_number(netns) == link.namespace), None)
