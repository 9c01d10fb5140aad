"""`Shaper`: the tree of this host, through which tenants' packets pass between their uplinks and the host.

There is a device for each direction, `PREFIX-out` and `PREFIX-in`, an intermediate functional block (IFB). Filters on
the host's end of each uplink redirect what the tenant sends to the first, and what it gets to the second. So nothing is
changed on the host's own devices, and traffic of the host itself, or of other programs, is not shaped.

While no tenant of the host has a floor or a ceiling there are no such devices and no filters. While there are only
ceilings, only tenants that have one pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import ClassCounters, HtbClass
from insula.model.guarantees import Shaping
from insula.model.objects import Port
from insula.model.policies import Direction
from insula.network.fabric import Arrivals, Arrived, Queue
from insula.network.intent import TenantIntent
from insula.network.linux.guarantees import overlay, program, tree
from insula.network.linux.guarantees.destinations import DestinationCeilings
from insula.network.linux.guarantees.ports import Handles, PortShaper, has_floor
from insula.network.linux.naming import Naming
from insula.network.linux.underlay import Underlay

DIRECTIONS: Final = ("out", "in")
_PARENTS: Final = {"out": tc.INGRESS, "in": tc.EGRESS}  # as seen from the host's end of the uplink


class Shaper:
    """The shaping of one fabric's tenants. Calls may come from any thread; they raise OSError."""

    def __init__(self, naming: Naming, underlay: Underlay | None = None) -> None:
        self._naming = naming
        self._underlay = underlay
        self._destinations = DestinationCeilings(underlay) if underlay else None
        self._vnis: dict[int, Mapping[str, Sequence[int]]] = {}  # by the index of the tenant that was applied
        self._lock = threading.Lock()
        self._last: dict[int, Shaping | None] = {}  # what was applied, by the index of the tenant
        self._ports: dict[int, PortShaper] = {}
        self._with_more: set[int] | None = None  # tenants with classes of instances; None before the first look

    # -- changes -------------------------------------------------------------------------------------------------

    def apply(self, host: Rtnl, inside: Handles, intent: TenantIntent) -> None:
        """Make the shaping of a tenant equal to its intent's; None removes it. Only differences are changed. An
        incomplete intent removes nothing. Calls for one tenant run one after another."""
        if intent.shaping is not None or intent.complete:
            self._apply(host, intent)
            self._apply_ports(inside, intent)

    def _apply(self, host: Rtnl, intent: TenantIntent) -> None:
        tenant, shaping = intent.tenant.index, intent.shaping
        with self._lock:
            self._last[tenant] = shaping
            self._vnis[tenant] = {direction: _vnis(intent, direction) for direction in DIRECTIONS}
            uplink = host.index(self._naming.uplink(tenant))
            if shaping is None or uplink is None:
                self._remove(host, tenant, uplink)
                return
            devices = {direction: self._ensure_device(host, direction) for direction in DIRECTIONS}
            stale: list[Request] = []
            for direction, index in devices.items():
                have = self._classes(host, index, tenant, shaping)
                host.execute(*_changes(index, tenant, shaping, direction, have))
                if direction == "out" and self._destinations is not None:
                    self._destinations.apply(host, index, tenant, shaping, self._vnis[tenant]["out"], have)
                stale += _leftovers(index, tenant, shaping, direction, have)
            self._ensure_filters(host, uplink, tenant, shaping, devices)
            host.execute(*self._routes(tenant, uplink, shaping))
            self._apply_overlay(host, tenant, devices)
            host.execute(*stale)
            assert self._with_more is not None
            (self._with_more.add if shaping.ports else self._with_more.discard)(tenant)

    def _apply_overlay(self, host: Rtnl, tenant: int, devices: Mapping[str, int]) -> None:
        """Have packets of the tenant's networks between hosts pass its classes."""
        if self._underlay is None or (device := self._underlay_device(host)) is None:
            return
        version, port = self._underlay.version, self._underlay.port
        for direction, index in devices.items():
            vnis = self._vnis[tenant][direction]
            overlay.classify(host, index, tree.rest(tenant), vnis, version=version, port=port)
        overlay.redirect(host, device, devices, version=version, port=port)

    def limit_senders(self, host: Rtnl, receiver: str, ceilings: Mapping[int, int]) -> None:
        """Limit what tenants, by their indices, send to another host. It replaces what was set for that host."""
        if self._destinations is None:
            return
        with self._lock:
            concerned = self._destinations.set(receiver, ceilings)
            if (out := self._devices(host).get("out")) is None:
                return
            have = tc.classes(host, out)
            for tenant in concerned:
                shaping = self._last.get(tenant)
                if shaping is not None and tree.tenant(tenant) in have:
                    self._destinations.apply(host, out, tenant, shaping, self._vnis[tenant]["out"], have)

    def _underlay_device(self, host: Rtnl) -> int | None:
        """Return the index of the device that has this host's underlay address; None if none has it."""
        assert self._underlay is not None
        if self._underlay.device is not None:
            return host.index(self._underlay.device)
        mine = (each.index for each in host.addresses() if each.address.split("/")[0] == self._underlay.address)
        return next(mine, None)

    def _apply_ports(self, inside: Handles, intent: TenantIntent) -> None:
        tenant = intent.tenant.index
        if (shaper := self._ports.get(tenant)) is None or shaper.inside is not inside:
            shaper = self._ports[tenant] = PortShaper(self._naming, inside)
        shaper.apply(intent.shaping.ports if intent.shaping else {}, intent.ports)

    def plugged(self, inside: Handles, port: Port) -> None:
        """Apply the rates of a port that was just plugged."""
        if (shaper := self._ports.get(inside.tenant.index)) and shaper.inside is inside:
            shaper.plugged(port)

    def remove(self, host: Rtnl, tenant: int) -> None:
        """Remove classes and filters of a tenant, whose namespace is about to be removed."""
        self._ports.pop(tenant, None)
        with self._lock:
            self._last.pop(tenant, None)
            if self._destinations is not None:
                self._destinations.forget(tenant)
            self._remove(host, tenant, host.index(self._naming.uplink(tenant)))

    def sweep(self, host: Rtnl, keep: Iterable[int]) -> None:
        """Remove the classes of tenants whose indices are not in `keep`, and the devices if no class is left."""
        wanted = set(keep)
        with self._lock:
            for index in self._devices(host).values():
                gone = [
                    n for n in tc.classes(host, index) if (of := tree.tenant_index(n)) is not None and of not in wanted
                ]
                for tenant in {tree.tenant_index(number) for number in gone}:
                    assert tenant is not None
                    self._delete_classes(host, index, tenant)
            self._remove_unused(host)

    def _classes(self, host: Rtnl, index: int, tenant: int, shaping: Shaping) -> Mapping[int, HtbClass]:
        """Return the classes of a tenant. All of the device are read only if it has or gets more than its own two."""
        if self._with_more is None:
            every = [each for device in self._devices(host).values() for each in tc.classes(host, device).values()]
            more = (each for each in every if tree.is_instance(each.number) or tree.is_destination(each.number))
            self._with_more = {of for each in more if (of := tree.tenant_index(each.parent)) is not None}
        limited = self._destinations is not None and self._destinations.has(tenant)
        if shaping.ports or limited or tenant in self._with_more:
            return tc.classes(host, index)
        return tc.some_classes(host, index, (tree.root(), tree.tenant(tenant), tree.rest(tenant)))

    def _remove(self, host: Rtnl, tenant: int, uplink: int | None) -> None:
        if uplink is not None and has_filters(host, uplink):
            host.execute(tc.delete_clsact(uplink))
        devices = self._devices(host)
        if not any(tc.some_classes(host, index, [tree.tenant(tenant)]) for index in devices.values()):
            return
        for index in devices.values():
            self._delete_classes(host, index, tenant)
        self._remove_unused(host)

    def _delete_classes(self, host: Rtnl, index: int, tenant: int) -> None:
        """Delete the classes of a tenant. A class to which filters lead can't be deleted, so these go first."""
        have = tc.classes(host, index)
        if self._underlay is not None and self._destinations is not None:
            version, port = self._underlay.version, self._underlay.port
            overlay.classify(host, index, tree.rest(tenant), [], version=version, port=port)
            mine = {n for n, each in have.items() if tree.is_destination(n) and each.parent == tree.tenant(tenant)}
            self._destinations.delete(host, index, mine)
        host.execute(*_deletions(index, tenant, have))

    def _remove_unused(self, host: Rtnl) -> None:
        """Remove the devices if no tenant has a class. Filters are removed before classes, so none leads to them."""
        devices = self._devices(host)
        if not any(
            tree.tenant_index(number) is not None for index in devices.values() for number in tc.classes(host, index)
        ):
            if self._underlay is not None and (underlay := self._underlay_device(host)) is not None:
                overlay.stop(host, underlay)
            host.execute(*(netlink.delete_link(index=index) for index in devices.values()))

    def _ensure_device(self, host: Rtnl, direction: str) -> int:
        name = self.device(direction)
        link = host.link(name)
        if link and link.kind != "ifb":
            host.execute(netlink.delete_link(index=link.index))
        if link is None or link.kind != "ifb":
            host.execute(netlink.ifb(name))
            link = host.link(name)
            assert link
        if not link.up:
            host.execute(netlink.set_link(link.index, up=True))
        root = tc.qdisc(host, link.index)
        if root is None or (root.kind, root.number) != ("htb", tc.handle(1)):
            host.execute(tc.delete_root(link.index), tc.add_htb(link.index))
        return link.index

    def _ensure_filters(
        self, host: Rtnl, uplink: int, tenant: int, shaping: Shaping, devices: Mapping[str, int]
    ) -> None:
        present = has_filters(host, uplink)
        for direction, index in devices.items():
            code = self._program(tenant, shaping, direction)
            wanted = (program.name(code), index)
            have = tc.filters(host, uplink, _PARENTS[direction]) if present else []
            if [(each.name, each.to) for each in have] == [wanted]:
                continue
            with program.LoadedProgram(code) as descriptor:
                host.execute(
                    tc.add_clsact(uplink),
                    tc.set_bpf_filter(uplink, _PARENTS[direction], descriptor, wanted[0], index),
                )

    def _routes(self, tenant: int, uplink: int, shaping: Shaping) -> Iterator[Request]:
        """Yield requests for the routes to the addresses of instances with floors. They stay when a floor is removed,
        until the uplink is: connections that have begun go on with these addresses."""
        (_, four), (_, six) = self._naming.addresses(tenant)
        for each in shaping.ports.values():
            if has_floor(each):
                four_, six_ = self._naming.guaranteed_addresses(each.number)
                yield netlink.add_route(f"{four_}/32", index=uplink, gateway=four)
                yield netlink.add_route(f"{six_}/128", index=uplink, gateway=six)

    def _program(self, tenant: int, shaping: Shaping, direction: str) -> bytes:
        numbers = [n for n, rate in tree.instances(shaping, direction).items() if rate.floor is not None]
        addresses = {a: tree.instance(n) for n in numbers for a in self._naming.guaranteed_addresses(n)}
        return program.classifier(tree.rest(tenant), addresses, source=direction == "out")

    # -- reading back --------------------------------------------------------------------------------------------

    def device(self, direction: str) -> str:
        return f"{self._naming.uplinks[:-1]}{direction}"

    def _devices(self, host: Rtnl) -> dict[str, int]:
        found = {direction: host.index(self.device(direction)) for direction in DIRECTIONS}
        return {direction: index for direction, index in found.items() if index is not None}

    def drift(self, host: Rtnl, tenant: int) -> Iterator[str]:
        """Yield the differences of the installed state from what `apply` has installed, as text."""
        uplink, devices = host.index(self._naming.uplink(tenant)), self._devices(host)
        if uplink is None or tenant not in self._last:
            return
        shaping = self._last[tenant]
        if shaping is None:
            if has_filters(host, uplink):
                yield f"{self._naming.uplink(tenant)} has filters, and no guarantee"
            return
        if len(devices) == len(DIRECTIONS):
            yield from self._overlay_drift(host, devices)
        for direction in DIRECTIONS:
            index = devices.get(direction)
            if index is None:
                yield f"{self.device(direction)} is missing"
                continue
            have = tc.classes(host, index)
            for request in _changes(index, tenant, shaping, direction, have, queues=False):
                yield f"{self.device(direction)}: {request.what} is needed"
            for request in _leftovers(index, tenant, shaping, direction, have):
                yield f"{self.device(direction)}: {request.what} is needed"
            wanted = (program.name(self._program(tenant, shaping, direction)), index)
            if [(each.name, each.to) for each in tc.filters(host, uplink, _PARENTS[direction])] != [wanted]:
                yield f"{self._naming.uplink(tenant)} has not the filter for packets {direction}"

    def _overlay_drift(self, host: Rtnl, devices: Mapping[str, int]) -> Iterator[str]:
        if self._underlay is None or (underlay := self._underlay_device(host)) is None:
            return
        if not overlay.is_redirected(host, underlay, devices):
            yield "packets of the overlay are not redirected to the tree of guarantees"

    def queues(self, host: Rtnl, tenant: int, port: Port, direction: Direction, *, outside: bool) -> list[Queue]:
        """Return the queues of a port's packets, in their order: `Fabric.queues`."""
        own = self._ports[tenant].queue(port, direction) if tenant in self._ports else None
        beyond = self._outside_queue(host, tenant, port, direction) if outside else None
        found = [each for each in (own, beyond) if each]
        return found if direction == "out" else found[::-1]

    def _outside_queue(self, host: Rtnl, tenant: int, port: Port, direction: Direction) -> Queue | None:
        """Return the leaf between the tenant and the outside for a port's packets; None if they don't pass the tree."""
        shaping, uplink = self._last.get(tenant), host.index(self._naming.uplink(tenant))
        device = self._devices(host).get(direction)
        if shaping is None or uplink is None or device is None or not has_filters(host, uplink):
            return None
        if device not in [each.to for each in tc.filters(host, uplink, _PARENTS[direction])]:
            return None
        rates = shaping.ports.get(port.index)
        alone = rates is not None and (rates.out if direction == "out" else rates.in_).floor is not None
        number = tree.instance(rates.number) if rates and alone else tree.rest(tenant)
        found = tc.some_classes(host, device, (tree.root(), number))
        if number not in found or tree.root() not in found:
            return None
        leaf, capacity = found[number], found[tree.root()].ceiling
        floor = leaf.rate if leaf.rate > tree.LEAST else None
        ceiling = leaf.ceiling if leaf.ceiling < capacity else None
        name = f"{self.device(direction)} 1:{number & 0xFFFF:x}"
        return Queue("instance" if alone else "tenant", floor, ceiling, name)

    def dropped_arrivals(self, host: Rtnl) -> int | None:
        """Return how many packets for tenants were dropped here; None if no floor shares out what arrives."""
        if not any(shaping and shaping.link for shaping in [*self._last.values()]):
            return None
        device = self._devices(host).get("in")
        return None if device is None else tc.dropped(host, device)

    def arrivals(self, host: Rtnl) -> Arrivals | None:
        """Return what has arrived for tenants; None if no floor shares out what arrives."""
        last = {tenant: shaping for tenant, shaping in [*self._last.items()] if shaping and shaping.link}
        if not last or (device := self._devices(host).get("in")) is None:
            return None
        owners = {tree.instance(each.number): tenant for tenant, own in last.items() for each in own.ports.values()}
        owners |= {tree.rest(tenant): tenant for tenant in last}
        found: dict[int, Arrived] = {}
        for number, each in tc.class_counters(host, device).items():
            if (tenant := owners.get(number)) is not None:
                so_far = found.get(tenant, Arrived(0, 0, 0, 0))
                found[tenant] = Arrived(*(one + other for one, other in zip(so_far, each, strict=True)))
        floors = {tenant: own.in_.floor or 0 for tenant, own in last.items()}
        return Arrivals(max(own.link or 0 for own in last.values()), floors, found)

    def counters(self, host: Rtnl, tenant: int) -> dict[str, ClassCounters]:
        """Return the counters of a tenant's class for each direction; none if it isn't shaped."""
        found = {}
        for direction, index in self._devices(host).items():
            if counters := tc.class_counters(host, index).get(tree.tenant(tenant)):
                found[direction] = counters
        return found


def has_filters(host: Rtnl, device: int) -> bool:
    """Return whether a device has the discipline clsact."""
    found = tc.qdisc(host, device, tc.CLSACT)
    return found is not None and found.kind == "clsact"


def _vnis(intent: TenantIntent, direction: str) -> list[int]:
    """Return the VNIs of what a tenant sends to other hosts ("out"), or receives from there: those of its networks, and
    of peerings that of the receiving end."""
    ends = [each.peer_vni if direction == "out" else each.vni for each in intent.peerings]
    return [*(network.vni for network in intent.networks), *(vni for vni in ends if vni is not None)]


def _changes(
    index: int, tenant: int, shaping: Shaping, direction: str, have: Mapping[int, HtbClass], *, queues: bool = True
) -> list[Request]:
    """Return requests for classes of a tenant, and for the root, that are missing or different."""
    root = tree.root_class(shaping.link)
    changed = tree.changed({root.number: root, **tree.tenant_classes(tenant, shaping, direction)}, have)
    requests = [tc.set_class(index, each) for each in changed]
    if queues:
        leaves = [each for each in changed if each.number not in (tree.root(), tree.tenant(tenant))]
        requests += [tc.set_bfifo(index, each.number, tree.queue(each.ceiling)) for each in leaves]
    return requests


def _leftovers(
    index: int, tenant: int, shaping: Shaping, direction: str, have: Mapping[int, HtbClass]
) -> list[Request]:
    """Return requests that delete classes of instances that have no floor any more."""
    wanted = tree.tenant_classes(tenant, shaping, direction)
    mine = (n for n, each in have.items() if each.parent == tree.tenant(tenant) and not tree.is_destination(n))
    return [tc.delete_class(index, number) for number in mine if number not in wanted]


def _deletions(index: int, tenant: int, have: Mapping[int, HtbClass]) -> list[Request]:
    """Return requests that delete all classes of a tenant, leaves first."""
    parent = tree.tenant(tenant)
    leaves = [number for number, each in have.items() if each.parent == parent]
    return [tc.delete_class(index, each) for each in (*leaves, *([parent] if parent in have else []))]
