"""Where packets end: the result of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Literal, NamedTuple

from insula.network.interpreter.space import BITS, NumberRange, Service, Space


class NetworkPlace(NamedTuple):
    """Where packets come from or end.

    A ``port`` of an instance, the tenant's ``router`` itself, its ``uplink`` to the host (``untranslated`` if packets
    leave with another source address than the tenant's), the ``host``, the ``outside`` beyond it, another ``tenant``, a
    ``peer`` (a tenant that this one has agreed with), the ``overlay`` of a network with ports on other hosts, or a
    strange ``device``.

    `address` is that of packets which are translated: at a port, a peer or a tenant their destination with its port, as
    `translated` writes them, and if they leave untranslated their source.
    """

    kind: Literal["port", "router", "uplink", "untranslated", "host", "outside", "tenant", "peer", "overlay", "device"]
    name: str = ""
    address: str = ""


def translated(version: int, address: NumberRange, port: NumberRange | None = None) -> str:
    """Return an address as packets have it after translation, with the port or ports of TCP and UDP, as in
    10.0.0.2:80."""
    text = str(ip_address(address.low.to_bytes(BITS[version] // 8, "big"))) + (
        "" if address.low == address.high else " and more"
    )
    if port is None:
        return text
    head = f"[{text}]" if version == 6 else text
    return f"{head}:{port.low}" + ("" if port.low == port.high else f"-{port.high}")


class PacketSource(NamedTuple):
    """A source of packets: where it is, and the addresses that it sends from; None is any."""

    place: NetworkPlace
    address: NumberRange | None
    mac: str | None = None


class Flow(NamedTuple):
    """Packets of one class, from one address to another, and where they end."""

    sender: PacketSource
    target: NumberRange
    service: Service
    end: NetworkPlace


@dataclass
class Delivery:
    """Whom senders reach: `ends` has the classes that may come to each place, `unrouted` those that no route leads
    elsewhere for. `to_groups`: the destinations are broadcasts and multicasts of the senders' network."""

    version: int
    senders: Sequence[PacketSource]
    space: Space
    ends: dict[NetworkPlace, int] = field(default_factory=dict)
    unrouted: int = 0
    to_groups: bool = False
    unknown: set[str] = field(default_factory=set)

    def add(self, place: NetworkPlace, classes: int) -> None:
        if classes:
            self.ends[place] = self.ends.get(place, 0) | classes

    def flows(self, place: NetworkPlace, classes: int) -> Iterator[Flow]:
        """Yield these classes as flows that end at `place`."""
        for source, target, service in self.space.classes(classes):
            yield Flow(self.senders[source], self.space.targets[target], self.space.services[service], place)
