"""Frames to everybody in a network: to which devices a bridge copies them, and which of these rules let pass.

A bridge without multicast snooping copies such a frame to every device with the flag for it (bridge(8): bcast_flood,
mcast_flood). Each copy passes the hooks by itself, so a run has each destination once for every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from insula.kernel.netlink.messages import Link
from insula.network.interpreter.delivery import Delivery, NetworkPlace, PacketSource
from insula.network.interpreter.fields import TRANSLATED, host_order, new_connection
from insula.network.interpreter.space import NumberRange, Service, Space
from insula.network.interpreter.values import Symbolic
from insula.network.linux.interpreter.bytecode import device_name
from insula.network.linux.interpreter.forwarding import BRIDGED, FORWARD, POSTROUTING, PREROUTING, ROUTED, Forwarding
from insula.network.linux.interpreter.routes import is_group
from insula.network.linux.interpreter.stack import Stack

_BROADCAST, _MULTICAST = 1, 2  # PACKET_BROADCAST, PACKET_MULTICAST (linux/if_packet.h)
_EVERYBODY: Final = ((1 << 48) - 1, (1 << 48) - 1)
_MACS: Final = {4: (0x01005E000000, 0x01005E7FFFFF), 6: (0x333300000000, 0x3333FFFFFFFF)}  # RFC 1112, RFC 2464
_LIMITED: Final = (1 << 32) - 1  # 255.255.255.255
_LARGEST: Final = 1 << 20  # packet classes of one run; more devices and senders are run in groups


class Copy(NamedTuple):
    """A copy of frames to a group, for one device of the bridge."""

    group: NumberRange
    device: Link


class Flooding:
    """The groups of each network. `broadcasts` are those of networks by the name of their bridge."""

    def __init__(
        self,
        stack: Stack,
        version: int,
        places: Mapping[str, NetworkPlace],
        broadcasts: Mapping[str, int],
        space: Space,
    ) -> None:
        self._stack = stack
        self._version = version
        self._places = places
        self._broadcasts = broadcasts
        self._services: Sequence[Service] = space.services
        self._targets = space.targets

    def deliveries(self, senders: Sequence[tuple[Link, PacketSource]]) -> Iterator[Delivery]:
        """Yield whom the groups of each bridge are delivered to, from these senders."""
        for bridge in [link for link in self._stack.links.values() if link.kind == "bridge" and link.up]:
            here = [each for each in senders if each[0].master == bridge.index]
            groups, devices = self._groups(bridge), [link for link in self._stack.ports(bridge.index) if link.up]
            few = min(len(devices), 32)
            size = max(1, _LARGEST // max(1, few * len(groups) * len(self._services)))
            for first in range(0, len(here) if devices else 0, size):
                yield self._delivery(bridge, here[first : first + size], groups, devices, few)

    def _groups(self, bridge: Link) -> list[NumberRange]:
        own = self._broadcasts.get(bridge.name)
        return [each for each in self._targets if is_group(self._version, each) or (own, own) == each]

    def _delivery(
        self,
        bridge: Link,
        senders: Sequence[tuple[Link, PacketSource]],
        groups: Sequence[NumberRange],
        devices: Sequence[Link],
        few: int,
    ) -> Delivery:
        sources, size = [source for _, source in senders], len(groups) * len(self._services)
        whole = Delivery(self._version, sources, Space(len(sources), groups, self._services), to_groups=True)
        for first in range(0, len(devices), few):
            copies = [Copy(group, device) for device in devices[first : first + few] for group in groups]
            space = Space(len(sources), [copy.group for copy in copies], self._services)
            run = _CopyRun(self._stack, Delivery(self._version, sources, space), self._places)
            passing = run.of_copies([link for link, _ in senders], bridge, copies)
            whole.unknown |= run.machine.unknown
            for number, device in enumerate(devices[first : first + few]):
                place = self._places.get(device.name, NetworkPlace("device", device.name))
                for source in range(len(sources)):
                    here = passing >> space.cell(source, number * len(groups)) & (1 << size) - 1
                    whole.add(place, here << whole.space.cell(source, 0))
        return whole


class _CopyRun(Forwarding):
    """A run of frames that are copied. The destinations of its space are those of the copies."""

    def of_copies(self, devices: Sequence[Link], bridge: Link, copies: Sequence[Copy]) -> int:
        """Return the classes that leave by the device of their copy."""
        space, state = self.space, self.start(devices)
        kinds = [_BROADCAST if _is_broadcast(copy.group) else _MULTICAST for copy in copies]
        macs = [_EVERYBODY if kind == _BROADCAST else _MACS[self.version] for kind in kinds]
        state["pkttype"] = self._by_copy(1, [(kind, kind) for kind in kinds])
        state["dmac"] = self._by_copy(6, macs)
        live = self.machine.hook(BRIDGED, PREROUTING, state, self._copied(devices, copies))
        if live and self.stack.filters_bridged.get(self.version):
            inner = dict(state)
            self._arrive(inner, dict.fromkeys(range(space.sources), bridge))
            new_connection(inner, space)
            self.machine.own = self._own_of_arrival(inner)
            live = self.machine.hook(ROUTED[self.version], PREROUTING, inner, live)
            self.machine.own = None
            live &= ~inner[TRANSLATED].within(1, 1).must  # these are routed
            inner["oifname"], inner["oif"] = inner["iifname"], inner["iif"]
            live = self.machine.hook(ROUTED[self.version], FORWARD, inner, live)
        names, indices = [device_name(c.device.name) for c in copies], [host_order(c.device.index, 4) for c in copies]
        state["oifname"] = self._by_copy(16, [(each, each) for each in names])
        state["oif"] = self._by_copy(4, [(each, each) for each in indices])
        live = self.machine.hook(BRIDGED, FORWARD, state, live)
        return self.machine.hook(BRIDGED, POSTROUTING, state, live)

    def _by_copy(self, length: int, values: Sequence[tuple[int, int]]) -> Symbolic:
        return Symbolic(length, [(*value, self.space.of_target(number)) for number, value in enumerate(values)])

    def _copied(self, devices: Sequence[Link], copies: Sequence[Copy]) -> int:
        """Return the classes that the bridge makes a copy of: by its device's flags, not between isolated devices, and
        back to where they come from only if that device is in hairpin mode."""
        space, found = self.space, 0
        of_device: dict[int, list[int]] = {}
        for number, (group, device) in enumerate(copies):
            of_device.setdefault(device.index, []).append(number)
            if (device.broadcast if _is_broadcast(group) else device.multicast) is not False:
                found |= space.of_target(number)
        isolated = [number for number, copy in enumerate(copies) if copy.device.isolated]
        for number, link in enumerate(devices):
            without = [] if link.hairpin else of_device.get(link.index, [])
            for target in (*without, *(isolated if link.isolated else ())) if link.up else range(len(copies)):
                found &= ~(((1 << len(space.services)) - 1) << space.cell(number, target))
        return found


def _is_broadcast(group: NumberRange) -> bool:
    """Whether frames to a group have the MAC address of everybody."""
    return group == (_LIMITED, _LIMITED) or not is_group(4 if group.high <= _LIMITED else 6, group)
