"""Measure reachability with packets: which packets the installed data plane lets through.

Every source sends a probe (ICMP echo, UDP, TCP SYN) to the address of every endpoint. It also sends a broadcast, to
find wrongly joined segments: two instances may have the same address, and unicast reaches only one of them.

An instance must neither learn other instances' addresses from probes nor be able to influence the result. So nothing
runs inside instances:

- A probe of an instance is *injected* at the host's end of its port (`kernel.injection`). It passes the port's rules as
  if the instance had sent it.
- A probe to an instance is captured at the host's end of the target's port, as a frame that leaves there; frames that
  the instance sends are incoming there.
- A captured probe counts if it is unchanged, and comes from the port of its source or from a router, not from another
  instance that repeats it.

An instance does receive the probes that reach it, which come from endpoints that may send to it.

A probe to an address in the source's subnet is sent to the MAC address of the target; a probe to any other address is
also sent to the gateway's MAC address, to be routed. A negative result needs positive controls:

    receiver   the tenant's router sends a packet to each instance, which must be captured at its port
    sender     at least one packet of the source must be captured behind its port

Probes of the host and of the outside are sent into the tenant's uplink. Probes to the outside have a documentation
address (RFC 5737) as their target; they are captured, and dropped, at the host's end of the uplink.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from insula.kernel.injection import Injector
from insula.kernel.netns import call_in
from insula.model.errors import Unavailable
from insula.network.addresses import gateway_mac
from insula.network.endpoints import Endpoint
from insula.network.fabric import RouterPoints, Station
from insula.network.packets import (
    ALL_NODES,
    BROADCAST,
    IP,
    IPV6,
    PROTOCOLS,
    UDP_PORT,
    ProbeCodec,
    frame,
    is_tcp,
    sender,
)

_EVERYBODY = {4: ("255.255.255.255", BROADCAST), 6: ("ff02::1", ALL_NODES)}
_ALL = 0x0003  # ETH_P_ALL
_OUTGOING = 4  # PACKET_OUTGOING
_SO_RCVBUFFORCE = 33
_BUFFER = 16 << 20
_ATTEMPTS = 3  # at probes that should arrive: on a flooded network some are lost
_TIMEOUT = 1.0  # seconds to wait for those of an attempt
_GRACE = 0.2  # seconds to wait after that for probes that should not


@dataclass
class ProbeResult:
    """The result for a source and a target. `reached` is None if it is unknown, `detail` says why; `control` is True if
    both controls worked."""

    reached: bool | None
    control: bool
    detail: str | None = None
    protocols: list[str] = field(default_factory=list)


Sent = tuple[str, str]
"""The sender, as `_sender` names it, and the target address."""


class Measurement:
    """A measurement: `with Measurement(…) as measurement: results = measurement.measure(pairs)`.

    `wanted` tells whether a source should reach a target: such probes are waited for. Unavailable if this kernel can't
    inject packets.
    """

    def __init__(
        self,
        stations: Sequence[Station],
        routers: Sequence[RouterPoints],
        wanted: Callable[[Endpoint, Endpoint], bool],
        others: Sequence[Station] = (),
    ) -> None:
        """`others` are the probe points of further instances, which neither send nor receive probes."""
        self._wanted = wanted
        self._routers = {router.tenant: router for router in routers}
        self._stations = {s.key: s for s in stations if s.endpoints[0].tenant in self._routers}
        self._ports: dict[str, set[str]] = defaultdict(set)  # by MAC address; two networks may have the same one
        for station in (*stations, *others):
            self._ports[station.mac].add(station.key)
        self._codec = ProbeCodec()
        self._senders: set[str] = set()
        self._errors: dict[Sent, str] = {}
        self._seen: dict[str, dict[Sent, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._echoed: set[Sent] = set()
        self._returned: set[tuple[str, str]] = set()  # (instance, source address of a packet that it received)
        self._sockets: list[socket.socket] = []
        self._poll = select.epoll()
        self._receivers: dict[int, tuple[str, bool, socket.socket]] = {}  # (receiver, for outgoing frames, socket)
        self._raw: dict[tuple[str, int], socket.socket] = {}
        self._injector: Injector

    def __enter__(self) -> Measurement:
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            try:
                self._injector = Injector()
            except OSError as error:
                raise Unavailable(f"cannot inject packets: {error.strerror}", "see bpf(2)") from error
            for router in self._routers.values():
                call_in(router.netns, lambda router=router: self._open(router))  # type: ignore[misc]
                uplink = self._listen(f"uplink {router.tenant}", router.device)
                self._raw[f"uplink {router.tenant}", 0] = uplink
                for host in router.hosts:
                    self._serve(host)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        if hasattr(self, "_injector"):
            self._injector.close()
        with ThreadPoolExecutor(16) as pool:  # closing a packet socket waits for an RCU grace period: close all at once
            list(pool.map(socket.socket.close, self._sockets))

    def measure(self, pairs: Sequence[tuple[Endpoint, Endpoint]], *, beyond: bool = True) -> list[ProbeResult]:
        """Return results in the order of `pairs`. `beyond` False: send nothing through the host's own namespace."""
        asked = [(source, target) for source, target in pairs if beyond or self._is_near(source, target)]
        missing = asked
        for _ in range(_ATTEMPTS):
            self._probe(missing)
            if not (missing := self._wait(asked)):
                break
        routers = (self._seen[f"router {tenant}"] for tenant in self._routers)
        self._senders = {who for seen in routers for (who, _), protocols in seen.items() if protocols}
        known = set(asked)
        return [
            self._evaluate(source, target)
            if (source, target) in known
            else ProbeResult(None, False, "not probed: the host's rules are not installed")
            for source, target in pairs
        ]

    def _probe(self, pairs: Sequence[tuple[Endpoint, Endpoint]]) -> None:
        """Send the controls, and the probes of these pairs."""
        self._controls()
        due: dict[Endpoint, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for source, target in pairs:
            due[source][target.address] |= self._macs(source, target)
        for router in self._routers.values():
            mine = {source: to for source, to in due.items() if source.tenant == router.tenant}
            call_in(router.netns, lambda router=router, mine=mine: self._send(router, mine))  # type: ignore[misc]

    # -- sockets -------------------------------------------------------------------------------------------------

    def _open(self, router: RouterPoints) -> None:
        """Open receivers, and raw sockets for packets with their own IP header. Runs in the router's namespace."""
        for device in router.inside:
            self._listen(f"router {router.tenant}", device)
        for station in self._stations.values():
            if station.endpoints[0].tenant == router.tenant:
                self._listen(station.key, station.device, leaving=True)
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            with contextlib.suppress(OSError):  # a kernel without IPv6
                raw = self._keep(socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW))
                raw.setblocking(False)
                self._raw[f"router {router.tenant}", version] = raw

    def _listen(self, key: str, device: str, *, leaving: bool = False) -> socket.socket:
        """Open a packet socket on one device, which receives IP packets with the sender's MAC address."""
        sock = self._keep(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        with contextlib.suppress(OSError):  # no such device: nothing is received there
            sock.bind((device, _ALL))
            self._watch(key, sock, leaving=leaving)
        return sock

    def _serve(self, host: Endpoint) -> None:
        """Open a UDP socket at the host's address. No probe of an instance may reach it, only the host's control."""
        family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
        sock = self._keep(socket.socket(family, socket.SOCK_DGRAM))
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host.address, UDP_PORT))
            self._watch(_host_receiver(host), sock)

    def _watch(self, key: str, sock: socket.socket, *, leaving: bool = False) -> None:
        self._receivers[sock.fileno()] = (key, leaving, sock)
        self._poll.register(sock, select.EPOLLIN)

    def _keep(self, sock: socket.socket) -> socket.socket:
        self._sockets.append(sock)
        return sock

    # -- sending -------------------------------------------------------------------------------------------------

    def _controls(self) -> None:
        for station in self._stations.values():
            for endpoint in station.endpoints:
                gateway = next((g for g in station.gateways if (":" in g) == (endpoint.version == 6)), None)
                raw = self._raw.get((f"router {endpoint.tenant}", endpoint.version))
                if gateway and raw:
                    probe = self._codec.probe(_CONTROL, "icmp", gateway, endpoint.address)
                    with contextlib.suppress(OSError):
                        raw.sendto(probe.packet, (endpoint.address, 0))
        for router in self._routers.values():
            for host in router.hosts:
                family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
                probe = self._codec.probe(_CONTROL, "udp", host.address, host.address)
                with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.bind((host.address, 0))
                    sock.sendto(probe.packet, (host.address, UDP_PORT))

    def _macs(self, source: Endpoint, target: Endpoint) -> set[str]:
        """Return the destination MAC addresses of an instance's frames to the target: the target's, the router's."""
        if source.kind != "instance":
            return set()
        station = self._stations[source.label]
        router = gateway_mac(source.network)
        if target.kind in ("host", "outside"):
            return {router}
        near = any(ip_address(target.address) in ip_network(subnet) for subnet in station.subnets)
        mac = self._stations[target.label].mac if target.kind == "instance" else gateway_mac(target.network)
        return {mac} if near else {mac, router}

    def _send(self, router: RouterPoints, due: dict[Endpoint, dict[str, set[str]]]) -> None:
        """Send all probes of one tenant's endpoints. Runs in the router's namespace."""
        for source, addresses in due.items():
            for address, macs in addresses.items():
                for protocol in PROTOCOLS:
                    packet = self._codec.probe(_sender(source), protocol, source.address, address).packet
                    if source.kind == "instance":
                        self._inject(source, address, macs, packet)
                    else:
                        self._put_on_uplink(source, address, router, packet)
                self._receive(0)
            if source.kind == "instance":
                address, mac = _EVERYBODY[source.version]
                packet = self._codec.probe(_sender(source), "udp", source.address, address).packet
                self._inject(source, address, {mac}, packet)

    def _inject(self, source: Endpoint, address: str, macs: Iterable[str], packet: bytes) -> None:
        station = self._stations[source.label]
        for mac in macs:
            try:
                self._injector.inject(station.index, frame(mac, station.mac, packet))
            except OSError as error:
                self._errors[_sender(source), address] = str(error.strerror)

    def _put_on_uplink(self, source: Endpoint, address: str, router: RouterPoints, packet: bytes) -> None:
        kind = IPV6 if source.version == 6 else IP
        try:
            sock = self._raw[f"uplink {router.tenant}", 0]
            sock.sendto(packet, (router.device, kind, 0, 0, bytes.fromhex(router.mac.replace(":", ""))))
        except OSError as error:
            self._errors[_sender(source), address] = str(error.strerror)

    # -- receiving -----------------------------------------------------------------------------------------------

    def _wait(self, pairs: Sequence[tuple[Endpoint, Endpoint]]) -> list[tuple[Endpoint, Endpoint]]:
        """Receive until all expected probes have arrived or `_TIMEOUT` is over, and then for `_GRACE`. Return the pairs
        whose expected probes have not arrived."""
        due = [(source, target) for source, target in pairs if self._wanted(source, target)]
        end = time.monotonic() + _TIMEOUT
        while due and time.monotonic() < end:
            self._receive(0.02)
            due = [(s, t) for s, t in due if not self._arrivals(s, t) >= set(_expected(t))]
        end = time.monotonic() + _GRACE
        while (left := end - time.monotonic()) > 0:
            self._receive(left)
        return due

    def _receive(self, timeout: float) -> None:
        for fd, _ in self._poll.poll(timeout):
            key, leaving, sock = self._receivers[fd]
            with contextlib.suppress(OSError):  # no more packets, or the device is gone
                for _ in range(256):
                    packet, origin = sock.recvfrom(2048)
                    if sock.family != socket.AF_PACKET:
                        self._take(key, packet, None)
                    elif (origin[2] == _OUTGOING) == leaving:
                        self._take(key, packet, origin[4].hex(":"))

    def _take(self, key: str, packet: bytes, mac: str | None) -> None:
        """Record a packet received by `key` from the MAC address `mac`; `mac` is None for a socket of the host."""
        probe = self._codec.find(packet)
        if mac is None:
            if probe:
                self._seen[key][probe.sender, probe.address].add(probe.protocol)
            return
        if (source := sender(packet)) is None:
            return
        if probe is None:
            if is_tcp(packet):
                self._returned.add((key, source))
            return
        who, sent = probe.sender.partition(" ")[0], (probe.sender, probe.address)
        if mac in self._ports and who not in self._ports[mac]:
            return  # an instance has repeated a probe that it received
        if probe.is_to_same(packet) if key.startswith("uplink ") else probe.is_same(packet):
            self._seen[key][sent].add(probe.protocol)
            return
        if key == who and source == probe.address:
            self._returned.add((key, source))
            if probe.is_answer(packet):
                self._echoed.add(sent)

    # -- evaluating ----------------------------------------------------------------------------------------------

    def _evaluate(self, source: Endpoint, target: Endpoint) -> ProbeResult:
        came = self._arrivals(source, target)
        left, receives = self._left(source), self._receives(target)
        error = self._errors.get((_sender(source), target.address))
        if came:
            return ProbeResult(True, left and receives, None, sorted(came))
        if left and receives:
            return ProbeResult(False, True, error)
        reason = "the receiver got no control packet" if left else "no packet of the source was captured"
        return ProbeResult(None, False, f"{reason}: {error}" if error else reason)

    def _arrivals(self, source: Endpoint, target: Endpoint) -> set[str]:
        """Return the protocols by which the source reached the target."""
        sent = _sender(source), target.address
        if target.kind == "instance":
            return self._seen[target.label][sent] | self._strays(source, target, target.label)
        if target.kind == "outside":
            return self._seen[f"uplink {target.tenant}"][sent]
        if target.kind == "host":
            spoke = (source.label, target.address) in self._returned
            return self._seen[_host_receiver(target)][sent] | ({"answer"} if spoke else set())
        if target.tenant == source.tenant:  # the router's receivers capture everything: a reply is what counts
            return {"icmp"} if sent in self._echoed else set()
        router = f"router {target.tenant}"
        return self._seen[router][sent] | self._strays(source, target, router)

    def _strays(self, source: Endpoint, target: Endpoint, receiver: str) -> set[str]:
        """Return {"broadcast"} if the source's broadcast reached a target that it should not reach."""
        sent = _sender(source), _EVERYBODY[source.version][0]
        return {"broadcast"} if self._seen[receiver][sent] and not self._wanted(source, target) else set()

    def _is_near(self, source: Endpoint, target: Endpoint) -> bool:
        """Whether packets to the target should stay in the tenant's namespace."""
        return source.kind != "instance" or (self._wanted(source, target) and target.kind != "outside")

    def _left(self, source: Endpoint) -> bool:
        """Whether a packet of the source was captured at a router (the sender's control)."""
        return _sender(source) in self._senders

    def _receives(self, target: Endpoint) -> bool:
        """Whether the target's receiver got a packet that it should get (the receiver's control)."""
        if target.kind == "instance":
            return bool(self._seen[target.label][_CONTROL, target.address])
        if target.kind == "host":
            return bool(self._seen[_host_receiver(target)][_CONTROL, target.address])
        return bool(self._seen[f"{'uplink' if target.kind == 'outside' else 'router'} {target.tenant}"])


_CONTROL = "control"


def _sender(source: Endpoint) -> str:
    """Return a name that is unique for each endpoint."""
    return f"{source.label} {source.tenant} {source.address}"


def _host_receiver(host: Endpoint) -> str:
    return f"host {host.address}"


def _expected(target: Endpoint) -> tuple[str, ...]:
    return ("icmp",) if target.kind == "gateway" else PROTOCOLS
