"""Send one packet, and tell where it was seen last: a witness of `insula verify`, or `insula trace --live`.

As probes are (probe.py), the packet is injected at the host's end of a port, so that nothing runs in an instance, and
is recognised by its random token. It is looked for at every device of the tenants that are given: arriving at a port
from its instance, on the router's side of a bridge, at the uplink, at the host's end of the uplink, and leaving a port
towards its instance. The host forwards no probe, so one to the outside is seen last at the host.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, Self

from insula.kernel.injection import Injector
from insula.kernel.netns import call_in
from insula.model.errors import Unavailable
from insula.network.addresses import gateway_mac
from insula.network.fabric import ProbePoints, RouterPoints, Station
from insula.network.packets import IP, IPV6, ProbeCodec, frame

_ALL, _OUTGOING = 3, 4  # ETH_P_ALL, PACKET_OUTGOING
_TIMEOUT: Final = 0.3
"""Seconds until a packet has passed all devices of a host, or is lost."""
_ORDER: Final = ("port", "router", "uplink", "host", "other", "arrived")


class Sighting(NamedTuple):
    """Where a packet was seen, in order of its way: at its own `port`, its `router`, the `uplink`, the `host`, the
    uplink of an `other` tenant, or `arrived` at a port. `name` is that of the instance or tenant."""

    where: str
    name: str

    @property
    def text(self) -> str:
        """The place in words."""
        return {
            "port": f"at the port of {self.name}",
            "router": f"at the router of {self.name}",
            "uplink": f"at the uplink of {self.name}",
            "host": f"at the host, from the uplink of {self.name}",
            "other": f"at the uplink of {self.name}",
            "arrived": f"at {self.name}, where it arrived",
        }[self.where]


class LivePacket(NamedTuple):
    """A packet to send: addresses, protocol (icmp, udp, tcp) and ports."""

    source: str
    target: str
    protocol: str
    source_port: int = 40000
    port: int = 9


class LiveTest:
    """Receivers at all devices of some tenants: `with LiveTest(points) as test: test.send(…)`. Unavailable if this
    kernel can't inject packets."""

    def __init__(self, points: Sequence[ProbePoints]) -> None:
        self._points = points
        self._codec = ProbeCodec()
        self._open = contextlib.ExitStack()
        self._poll = select.epoll()
        self._receivers: dict[int, tuple[socket.socket, Callable[[bool], Sighting | None]]] = {}
        self._uplinks: dict[str, socket.socket] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            self._open.callback(self._poll.close)
            try:
                self._injector = self._open.enter_context(Injector())
            except OSError as error:
                raise Unavailable(f"cannot inject packets: {error.strerror}", "see bpf(2)") from error
            for one in self._points:
                call_in(one.router.netns, lambda one=one: self._listen_inside(one))  # type: ignore[misc]
                tenant = one.router.tenant
                sock = self._listen(one.router.device, _at_host(tenant))
                if sock:
                    self._uplinks[tenant] = sock
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def from_port(self, station: Station, packet: LivePacket, macs: Iterable[str] = ()) -> list[Sighting]:
        """Send a packet as an instance would: to these MAC addresses, by default to its gateway's."""
        one = next(each for each in self._points if station in each.stations)
        data = self._packet(packet)
        to = list(macs) or [gateway_mac(station.endpoints[0].network)]

        def inject() -> None:
            for mac in to:
                with contextlib.suppress(OSError):
                    self._injector.inject(station.index, frame(mac, station.mac, data))

        call_in(one.router.netns, inject)
        return self._seen(data)

    def from_uplink(self, router: RouterPoints, packet: LivePacket) -> list[Sighting]:
        """Send a packet from the host into a tenant's uplink."""
        data = self._packet(packet)
        if sock := self._uplinks.get(router.tenant):
            kind = IPV6 if ":" in packet.target else IP
            with contextlib.suppress(OSError):
                sock.sendto(data, (router.device, kind, 0, 0, bytes.fromhex(router.mac.replace(":", ""))))
        return self._seen(data)

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _listen_inside(self, one: ProbePoints) -> None:
        for station in one.stations:
            self._listen(station.device, _at_port(station.key))
        for device in one.router.inside:
            self._listen(device, _at_router(one.router.tenant, device))

    def _listen(self, device: str, name: Callable[[bool], Sighting | None]) -> socket.socket | None:
        sock = self._open.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # no such device: nothing is seen there
            sock.bind((device, _ALL))
            self._receivers[sock.fileno()] = sock, name
            self._poll.register(sock, select.EPOLLIN)
            return sock
        return None

    def _packet(self, packet: LivePacket) -> bytes:
        made = self._codec.probe("", packet.protocol, packet.source, packet.target, packet.source_port, packet.port)
        return made.packet

    def _seen(self, sent: bytes) -> list[Sighting]:
        """Return where the packet is seen, in the order of its way."""
        wanted = self._codec.find(sent)
        found: set[Sighting] = set()
        end = time.monotonic() + _TIMEOUT
        while (left := end - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left):
                sock, name = self._receivers[fd]
                with contextlib.suppress(OSError):
                    while True:
                        data, origin = sock.recvfrom(2048)
                        probe = self._codec.find(data)
                        if probe is not wanted or probe is None or not probe.is_to_same(data):
                            continue  # an ICMP error quotes the packet
                        if at := name(origin[2] == _OUTGOING):
                            found.add(at)
        return sorted(found, key=lambda each: (_ORDER.index(each.where), each.name))


def in_words(seen: Sequence[Sighting]) -> str:
    """Return where a packet was seen last."""
    return f"seen last {seen[-1].text}" if seen else "seen nowhere"


def _at_port(key: str) -> Callable[[bool], Sighting | None]:
    return lambda leaving: Sighting("arrived" if leaving else "port", key)


def _at_router(tenant: str, device: str) -> Callable[[bool], Sighting | None]:
    """Return what a packet at a device of the router tells: the uplink is the first of its devices."""
    if device.startswith("uplink"):
        return lambda leaving: Sighting("uplink", tenant) if leaving else Sighting("router", tenant)
    return lambda leaving: None if leaving else Sighting("router", tenant)


def _at_host(tenant: str) -> Callable[[bool], Sighting | None]:
    return lambda leaving: Sighting("other" if leaving else "host", tenant)
