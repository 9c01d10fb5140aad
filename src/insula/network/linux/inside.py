"""Find devices in an instance's namespace that bypass its ports.

An instance has loopback and the other ends of its ports, eth0 and so on. It may make more devices, and connect them to
namespaces of its own (containers in a container). It can't make a device that leads to the host, to a tenant's router
or to another instance. If there is one, the two were joined from the host, and packets through it pass no rules.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.messages import Link
from insula.kernel.netns import call_in
from insula.model.objects import Port
from insula.network.linux import namespaces, naming
from insula.network.linux.naming import Naming

_LOOPBACK = 1


def strange_devices(ports: Mapping[int, int], owners: Sequence[Port], names: Naming) -> list[str]:
    """Return the wrong devices inside instances, as text. `ports` has descriptors of the instances' namespaces by the
    index of the port."""
    with contextlib.ExitStack() as stack:
        tenants: dict[str, int] = {}
        for name in {port.tenant for port in owners}:
            if (netns := namespaces.open_named(names.namespace(name))) is not None:
                stack.callback(os.close, netns)
                tenants[name] = netns
        return _strange_devices(ports, owners, tenants)


def _strange_devices(ports: Mapping[int, int], owners: Sequence[Port], tenants: Mapping[str, int]) -> list[str]:
    """`tenants` has descriptors of the tenants' namespaces by name."""
    host = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        known = {"the host": host, **{f"tenant {name}": netns for name, netns in tenants.items()}}
        instances: dict[tuple[str, str], list[Port]] = defaultdict(list)
        for port in owners:
            instances[port.tenant, port.instance].append(port)
        known |= {"/".join(name): ports[some[0].index] for name, some in instances.items()}
        return [text for name, some in instances.items() for text in _of_instance(*name, some, known)]
    finally:
        os.close(host)


def _of_instance(tenant: str, instance: str, ports: Sequence[Port], known: Mapping[str, int]) -> Iterator[str]:
    name = f"{tenant}/{instance}"
    with call_in(known[name], Rtnl) as rtnl:
        router = known.get(f"tenant {tenant}")
        number = None if router is None else rtnl.namespace_number(router)
        others = [link for link in rtnl.links() if link.index != _LOOPBACK]
        own = {port.index: link for port in ports for link in others if _is_own(link, port, number)}
        for port in ports:
            if port.index not in own:
                yield f"{name} has no device at the other end of {naming.port(port.index)}"
        for link in others:
            if link not in own.values() and (where := _leads_to(link, rtnl, known)):
                yield f"device {link.name} in {name} leads to {where}"


def _is_own(link: Link, port: Port, router: int | None) -> bool:
    """Whether a link is the other end of a port."""
    there = link.peer == naming.port_index(port.index) and link.namespace == router
    return link.kind == "veth" and router is not None and there


def _leads_to(link: Link, rtnl: Rtnl, known: Mapping[str, int]) -> str | None:
    """Return the owner of the namespace that a device leads to, if it is known; a physical device leads outside."""
    if not link.kind:
        return "the outside: it is a physical device"
    if link.namespace is None:
        return None
    return next((owner for owner, netns in known.items() if rtnl.namespace_number(netns) == link.namespace), None)
