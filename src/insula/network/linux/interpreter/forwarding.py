"""The way of packets through one network stack: hooks, bridges and routes, for all packet classes at once.

The order is that of the kernel (Documentation/networking/bridge.rst, nftables' netfilter hooks): a frame from a port
of a bridge passes the bridge's prerouting hook. It is bridged to another port, or goes up to the router, which
delivers it to this stack or forwards it by a route to a device: the uplink, or a bridge, where the neighbour's entry
tells the MAC address and the forwarding entry the port.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from insula.kernel.netlink.messages import Link
from insula.network.interpreter.delivery import Delivery, NetworkPlace, translated
from insula.network.interpreter.fields import (
    TRANSLATED,
    TRANSLATION,
    HeaderFields,
    State,
    host_order,
    initial,
    new_connection,
)
from insula.network.interpreter.machine import Machine, Passage
from insula.network.interpreter.program import AddressType, RouteDevice
from insula.network.interpreter.space import BITS, NumberRange
from insula.network.interpreter.values import Symbolic
from insula.network.linux.interpreter.bytecode import device_name
from insula.network.linux.interpreter.routes import LOCAL, NextHop, is_group, is_link_local
from insula.network.linux.interpreter.stack import Stack

PREROUTING, INPUT, FORWARD, OUTPUT, POSTROUTING = range(5)
ROUTED: Final = {4: ("inet", "ip"), 6: ("inet", "ip6")}
BRIDGED: Final = ("bridge",)
_KINDS: Final = range(1, 12)  # of routes: RTN_UNICAST to RTN_XRESOLVE (linux/rtnetlink.h)


class Forwarding:
    """One run through a stack. `places` names the devices that packets end at; others are strange.

    `delivery` has the senders and the packet classes, and gets the results. `translated` are the addresses that packets
    have after translation.
    """

    def __init__(
        self,
        stack: Stack,
        delivery: Delivery,
        places: Mapping[str, NetworkPlace],
        *,
        trace: bool = False,
        translated: NumberRange | None = None,
    ) -> None:
        self.stack = stack
        self.delivery = delivery
        self.space = delivery.space
        self.version = delivery.version
        self._places = places
        self._translated = translated
        self._routing = stack.routing[self.version]
        self.fields = HeaderFields(self.version, self.space, self._route_part, stack.program.choices)
        self.machine = Machine(stack.program, self.space, self.fields)
        self.routes: list[tuple[NumberRange, NextHop | None, int]] = []  # taken: to where, by which hop, which classes
        self._nameless: str | None = None  # the device of packets that arrive by none
        if trace:
            self.machine.passages = list[Passage]()

    # -- entering ----------------------------------------------------------------------------------------------------

    def start(self, devices: Sequence[Link | None]) -> State:
        """Return the fields of packets that arrive from the senders, each through one device."""
        senders = self.delivery.senders
        state = initial(self.space, self.version)
        size = BITS[self.version] // 8
        state["saddr"] = self.space.by_source(size, [each.address for each in senders])
        state["daddr"] = self.space.by_target(size)
        macs = [None if s.mac is None else NumberRange(*[int(s.mac.replace(":", ""), 16)] * 2) for s in senders]
        state["smac"] = self.space.by_source(6, macs)
        self._arrive(state, {number: link for number, link in enumerate(devices) if link})
        state["oifname"] = Symbolic.constant(16, 0, self.space.all)
        state["oif"] = Symbolic.constant(4, 0, self.space.all)
        return state

    def _arrive(self, state: State, devices: Mapping[int, Link]) -> None:
        names = [device_name(devices[n].name) if n in devices else 0 for n in range(self.space.sources)]
        indices = [host_order(devices[n].index, 4) if n in devices else 0 for n in range(self.space.sources)]
        state["iifname"] = self.space.by_source(16, [NumberRange(each, each) for each in names])
        state["iif"] = self.space.by_source(4, [NumberRange(each, each) for each in indices])

    def from_bridge_ports(self, devices: Sequence[Link], owners: Mapping[int, Sequence[str]]) -> None:
        """Run frames that arrive at ports of bridges. `owners` are the MAC addresses of the destinations."""
        state = self.start(devices)
        live = self.machine.hook(BRIDGED, PREROUTING, state, self.space.all)
        bridges = [self.stack.links.get(link.master) if link.master else None for link in devices]
        on_bridge = sum(self.space.of_source(number) for number, bridge in enumerate(bridges) if bridge and bridge.up)
        up = sum(self.space.of_source(number) for number, link in enumerate(devices) if link.up)
        live &= on_bridge & up
        known = {number: bridge for number, bridge in enumerate(bridges) if bridge}
        self._bridge(dict(state), live, devices, known, owners)
        state["priority"] = self.fields.unknown(4)  # a router sets it by the sender's type of service
        live = self.machine.hook(BRIDGED, INPUT, state, live)
        self._arrive(state, known)
        self.route(state, live)
        self._finish()

    def from_devices(self, devices: Sequence[Link | None]) -> None:
        """Run packets that arrive at devices with addresses of this stack's own."""
        self.route(self.start(devices), self.space.all)
        self._finish()

    def sent_here(self) -> None:
        """Run packets that programs of this stack send."""
        self._nameless = "lo"
        state = self.start([None] * self.space.sources)
        new_connection(state, self.space)
        for hops, live in self._routed(state, self.space.all):
            if isinstance(hops, NextHop):
                self._leave(dict(state), live, hops, OUTPUT)
        self._finish()

    # -- bridged -----------------------------------------------------------------------------------------------------

    def _bridge(
        self,
        state: State,
        live: int,
        devices: Sequence[Link],
        bridges: Mapping[int, Link],
        owners: Mapping[int, Sequence[str]],
    ) -> None:
        """Bridge frames to the MAC addresses of the destination's owners."""
        out: dict[int, int] = {}  # classes by device
        of_bridge: dict[int, int] = {}  # by the sender's
        back: dict[int, int] = {}
        for number, link in enumerate(devices):
            back[link.index] = back.get(link.index, 0) | self.space.of_source(number)
        for number, bridge in bridges.items():
            of_bridge[bridge.index] = of_bridge.get(bridge.index, 0) | self.space.of_source(number)
        for number, target in enumerate(self.space.targets):
            macs = owners.get(target.low, ()) if target.low == target.high else ()
            to = self.space.of_target(number) & live if macs else 0
            for mac, (index, sources) in itertools.product(macs, of_bridge.items()):
                for port in self._ports_to(index, mac):  # a bridge sends no frame back (no hairpin)
                    out[port] = out.get(port, 0) | to & sources & ~back.get(port, 0)
        live = 0
        names, indices = [], []
        for port, classes in out.items():
            live |= classes
            names.append((device_name(self.stack.links[port].name), classes))
            indices.append((host_order(port, 4), classes))
        if not live:
            return
        if self.stack.filters_bridged.get(self.version):
            inner = dict(state)
            self._arrive(inner, bridges)
            new_connection(inner, self.space)
            self.machine.own = self._own_of_arrival(inner)
            live = self.machine.hook(ROUTED[self.version], PREROUTING, inner, live)
            self.machine.own = None
            moved = inner[TRANSLATED].within(1, 1)
            self._onward(dict(inner), live & moved.may)  # br_nf_pre_routing_finish
            live &= ~moved.must
            inner["oifname"], inner["oif"] = inner["iifname"], inner["iif"]
            live = self.machine.hook(ROUTED[self.version], FORWARD, inner, live)
        state["oifname"] = Symbolic(16, [(name, name, classes) for name, classes in names])
        state["oif"] = Symbolic(4, [(index, index, classes) for index, classes in indices])
        live = self.machine.hook(BRIDGED, FORWARD, state, live)
        live = self.machine.hook(BRIDGED, POSTROUTING, state, live)
        for port, classes in out.items():
            self._end(self.stack.links[port], live & classes, state)

    def _ports_to(self, bridge: int, mac: str) -> list[int]:
        """Return the devices that a bridge sends frames to a MAC address to: those with an entry, else all that are
        flooded."""
        entries = self.stack.forwarding.get(bridge, {}).get(mac)
        if entries:
            return sorted(entries)
        return [link.index for link in self.stack.ports(bridge) if link.flood]

    # -- routed ------------------------------------------------------------------------------------------------------

    def route(self, state: State, live: int) -> None:
        """Run packets that a device has given to the router."""
        new_connection(state, self.space)
        self.machine.own = self._own_of_arrival(state)
        live = self.machine.hook(ROUTED[self.version], PREROUTING, state, live)
        self.machine.own = None
        self._onward(state, live)

    def _onward(self, state: State, live: int) -> None:
        """Run packets that have passed the first hook of the router."""
        self.delivery.unrouted |= live
        for hop, classes in self._routed(state, live):
            if hop is not None:
                self.delivery.unrouted &= ~classes
            if hop is None:
                here = self.machine.hook(ROUTED[self.version], INPUT, dict(state), classes)
                self.delivery.add(NetworkPlace("router"), here)
            else:
                self._leave(dict(state), classes, hop, FORWARD)

    def _own_of_arrival(self, state: State) -> Symbolic:
        """Return the address of the device that packets have arrived by: redirected packets go there."""
        parts, known = [], 0
        for index, _, bits in state["iif"].parts:
            address = self.stack.addresses.get((self.version, host_order(index, 4)))
            if address is not None:
                parts.append((address, address, bits))
                known |= bits
        return Symbolic(BITS[self.version] // 8, parts, self.space.all & ~known)

    def _routed(self, state: State, live: int) -> list[tuple[NextHop | None, int]]:
        """Return the next hops of packets, each with the classes that may go there; None is this stack itself."""
        found: dict[NextHop | None, int] = {}
        for device, arrived in self._arrivals(state, live):
            for low, high, bits in state["daddr"].parts:
                if not (classes := bits & arrived):
                    continue
                if is_group(self.version, NumberRange(low, high)):  # no router sends these on
                    found[None] = found.get(None, 0) | classes
                    continue
                strict = self._link_of(device) if is_link_local(self.version, NumberRange(low, high)) else None
                for route in self._routing.lookup(NumberRange(low, high), device):
                    hops: Sequence[NextHop | None] = [None] if route.local else route.hops
                    for hop in hops:
                        if strict is not None and hop is not None and hop.device != strict:
                            continue
                        found[hop] = found.get(hop, 0) | classes
                        self.routes.append((NumberRange(low, high), hop, classes))
        if unknown := state["daddr"].unknown & live:  # translated to an address that is not known: anywhere
            for route in self._routing.routes:
                for hop in [None] if route.local else route.hops:
                    found[hop] = found.get(hop, 0) | unknown
        return list(found.items())

    def _link_of(self, device: str | None) -> int | None:
        """Return the index of a device by which packets have arrived; None if it is not known which that is."""
        link = self.stack.by_name.get(device or "")
        return link.index if link else None

    def _arrivals(self, state: State, live: int) -> list[tuple[str | None, int]]:
        """Return the devices by which packets have arrived, each with its classes; None is any."""
        found: list[tuple[str | None, int]] = []
        for low, _, bits in state["iifname"].parts:
            if classes := bits & live:
                name = low.to_bytes(16, "big").rstrip(b"\0").decode(errors="replace")
                found.append((name or self._nameless, classes))
        return found

    def _leave(self, state: State, live: int, hop: NextHop, hook: int) -> None:
        """Run packets that leave through a device."""
        link = self.stack.links.get(hop.device)
        if link is None or not link.up:
            return
        state["oifname"] = Symbolic.constant(16, device_name(link.name), self.space.all)
        state["oif"] = Symbolic.constant(4, host_order(link.index, 4), self.space.all)
        live = self.machine.hook(ROUTED[self.version], hook, state, live)
        before = state["saddr"]
        own = self.stack.addresses.get((self.version, link.index))
        self.machine.own = Symbolic.constant(before.length, own, self.space.all) if own is not None else None
        live = self.machine.hook(ROUTED[self.version], POSTROUTING, state, live)
        self.machine.own = None
        if link.kind == "bridge":
            self._into_bridge(state, live, hop, link)
        elif (place := self._places.get(link.name)) and place.kind == "uplink":
            own = state["saddr"].within(*self._translated).must if self._translated else 0
            self.delivery.add(place, live & own)
            for low, high, bits in state["saddr"].parts:
                address = translated(self.version, NumberRange(low, high))
                self.delivery.add(NetworkPlace("untranslated", place.name, address), live & ~own & bits)
            self.delivery.add(NetworkPlace("untranslated", place.name), live & ~own & state["saddr"].unknown)
        else:
            self._end(link, live, state)

    def _into_bridge(self, state: State, live: int, hop: NextHop, bridge: Link) -> None:
        """Run packets that the router sends into a bridge, to the neighbour's MAC address."""
        out: dict[int, list[tuple[int, int, int]]] = {}  # parts of the destination, by port
        for low, high, bits in state["daddr"].parts:
            address = low if hop.gateway is None else hop.gateway
            if not (classes := bits & live) or (low != high and hop.gateway is None):
                continue
            mac = self.stack.neighbours.get((self.version, bridge.index, address))
            for port in self._ports_to(bridge.index, mac) if mac else ():
                out.setdefault(port, []).append((low, high, classes))
        unknown = state["daddr"].unknown & live
        if unknown:
            for link in self.stack.ports(bridge.index):
                out.setdefault(link.index, [])
        for port, parts in out.items():
            link, each = self.stack.links[port], dict(state)
            each["daddr"] = Symbolic(each["daddr"].length, parts, unknown, each["daddr"].several)
            classes = each["daddr"].present
            each["iifname"] = Symbolic.constant(16, 0, self.space.all)
            each["oifname"] = Symbolic.constant(16, device_name(link.name), self.space.all)
            each["oif"] = Symbolic.constant(4, host_order(link.index, 4), self.space.all)
            classes = self.machine.hook(BRIDGED, OUTPUT, each, classes)
            self._end(link, self.machine.hook(BRIDGED, POSTROUTING, each, classes), each)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _end(self, link: Link, classes: int, state: State) -> None:
        if not (link.up and classes):
            return
        place = self._places.get(link.name, NetworkPlace("device", link.name))
        if place.kind in ("port", "tenant", "peer") and TRANSLATED in state:
            moved = state[TRANSLATED].within(1, 1)
            for address, bits in self._translations(state, classes & moved.may):
                self.delivery.add(place._replace(address=address), bits)
            classes &= ~moved.must
        self.delivery.add(place, classes)

    def _translations(self, state: State, classes: int) -> Iterator[tuple[str, int]]:
        """Yield the destinations of translated packets, each with its classes."""
        for value, _, bits in state[TRANSLATION].parts if TRANSLATION in state else ():
            host, port = value >> 16, value & 0xFFFF
            found = bits & classes & state["daddr"].within(host, host).may  # others go to another device
            yield translated(self.version, NumberRange(host, host), NumberRange(port, port)), found
        if TRANSLATION in state:  # the others were translated in another way, and what they may be is combined
            known = Symbolic(1, state[TRANSLATION].parts).present & ~state[TRANSLATION].unknown
            classes &= ~known
        with_ports = self.space.of_services(sum(1 << n for n, each in enumerate(self.space.services) if each.has_ports))
        for low, high, bits in state["daddr"].parts if classes else ():
            here, address = bits & classes, NumberRange(low, high)
            if not here:
                continue
            yield translated(self.version, address), here & ~with_ports
            for first, last, some in state["dport"].parts:
                if found := here & some & with_ports:
                    yield translated(self.version, address, NumberRange(first, last)), found
            yield "an unknown port", here & with_ports & state["dport"].unknown
        yield "an unknown address", classes & state["daddr"].unknown

    def _finish(self) -> None:
        self.delivery.unknown |= self.machine.unknown

    def _route_part(self, term: RouteDevice | AddressType, state: State) -> Symbolic:
        """Return what nft's `fib` tells of a route."""
        address = state["saddr" if term.reverse else "daddr"]
        return self._route_kind(address) if isinstance(term, AddressType) else self._route_device(term, address, state)

    def _route_kind(self, address: Symbolic) -> Symbolic:
        """Return the kinds of routes; those that are not of this stack's own addresses are not told apart."""
        parts, several = list[tuple[int, int, int]](), address.several
        for low, high, bits in address.parts:
            routes = self._routing.lookup(NumberRange(low, high))
            own = bool(routes) and all(route.kind == LOCAL for route in routes)
            kinds = [LOCAL] if own else [kind for kind in _KINDS if kind != LOCAL]
            parts += [(host_order(kind, 4), host_order(kind, 4), bits) for kind in kinds]
            several |= 0 if own else bits
        return Symbolic(4, parts, address.unknown, several)

    def _route_device(self, term: RouteDevice, address: Symbolic, state: State) -> Symbolic:
        """Return the device of a route, or whether there is one."""
        parts: list[tuple[int, int, int]] = []
        unknown = address.unknown
        for low, high, bits in address.parts:
            routes = self._routing.lookup(NumberRange(low, high))
            hops = {hop.device for route in routes for hop in route.hops if not route.local}
            if len(hops) > 1:
                unknown |= bits
                continue
            device = next(iter(hops), 0)
            right = bits
            if term.incoming:
                right = state["iif"].within(*[host_order(device, 4)] * 2).must & bits if device else 0
            found = 1 if term.present else host_order(device, 4)
            parts += [(found, found, right if device else 0), (0, 0, bits & ~right if device else bits)]
        return Symbolic(term.length, parts, unknown, address.several)
