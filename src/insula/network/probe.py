"""Real packets between namespaces: what the data plane lets through, as opposed to what it is told to.

Every source sends a probe (ICMP echo, UDP, TCP SYN) to every address that any endpoint has; the token in it names
source and address. Receivers are packet sockets (packet(7)) in the instances' namespaces, so a packet that arrives at
another tenant's instance with the same address is told apart. A broadcast from each source finds segments that are
joined where unicast would go to the right one of two equal addresses by chance. Nothing is trusted without a
positive control:

    receiver   the tenant's router sends to each instance: its receiver must see that
    sender     something that the source sent must be seen outside it, at its router

Packets that stand for the host or the outside are put on the tenant's uplink itself and nowhere else. What instances
send to the outside goes to a documentation address and is seen, and dropped, on the host's side of the uplink.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from insula.network.intent import Endpoint, wanted
from insula.network.linux.namespaces import call_in
from insula.network.packets import PROTOCOLS, UDP_PORT, Minter, tcp_sender

_EVERYBODY = {4: "255.255.255.255", 6: "ff02::1"}
_ALL, _IP, _IPV6 = 0x0003, 0x0800, 0x86DD  # if_ether.h
_SOL_PACKET, _IGNORE_OUTGOING = 263, 23
_BUFFER = 16 << 20
_PATIENCE = 1.0  # how long what should arrive may take
_GRACE = 0.2  # how long after that we listen for what should not


@dataclass(frozen=True)
class Station:
    """An instance, with a descriptor of its network namespace."""

    endpoints: tuple[Endpoint, ...]
    netns: int
    gateways: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.endpoints[0].label


@dataclass(frozen=True)
class Router:
    """A tenant's router and its namespace; `device` is its uplink's end on the host, `mac` that of the other end."""

    tenant: str
    netns: int
    gateways: tuple[Endpoint, ...]
    hosts: tuple[Endpoint, ...]
    outsides: tuple[Endpoint, ...]
    device: str
    mac: str


@dataclass
class Result:
    """`reached` is None when it can't be told, because of `detail`; `control`: both controls worked."""

    reached: bool | None
    control: bool
    detail: str | None = None
    protocols: list[str] = field(default_factory=list)


class Probe:
    """One measurement. Use: `with Probe(…) as probe: results = probe.measure(pairs)`."""

    def __init__(self, stations: Sequence[Station], routers: Sequence[Router]) -> None:
        self._stations = {station.key: station for station in stations}
        self._routers = {router.tenant: router for router in routers}
        self._mint = Minter()
        self._numbers: list[tuple[str, str]] = []  # token number → (source's label and tenant, address)
        self._known: dict[tuple[str, str], int] = {}
        self._errors: dict[int, str] = {}
        self._seen: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._echoed: set[tuple[int, str]] = set()  # (number, who answered the echo)
        self._returned: set[tuple[str, int | str, str]] = set()  # (receiver, number or "tcp", from whom)
        self._senders: dict[str, set[str]] = defaultdict(set)  # tenant → who was seen at its router
        self._sockets: list[socket.socket] = []
        self._poll = select.epoll()
        self._receivers: dict[int, tuple[str, socket.socket]] = {}
        self._raw: dict[tuple[str, int], socket.socket] = {}

    def __enter__(self) -> Probe:
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            for key, station in self._stations.items():
                call_in(station.netns, lambda key=key: self._open(key))  # type: ignore[misc]
            for router in self._routers.values():
                call_in(router.netns, lambda router=router: self._open(f"router {router.tenant}"))  # type: ignore[misc]
                self._listen(f"uplink {router.tenant}", router.device)
                self._raw[f"uplink {router.tenant}", 0] = self._packet_socket(router.device, socket.SOCK_DGRAM, 0)
                for host in router.hosts:
                    self._serve(host)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        with ThreadPoolExecutor(16) as pool:  # closing a packet socket waits for the kernel's RCU: wait for all at once
            list(pool.map(socket.socket.close, self._sockets))

    def measure(self, pairs: Sequence[tuple[Endpoint, Endpoint]], *, beyond: bool = True) -> list[Result]:
        """Results in the order of `pairs`. `beyond` False: send nothing that would have to pass the host."""
        self._controls()
        sent = set()
        for source, target in pairs:
            if (source, target.address) not in sent and (beyond or self._is_near(source, target)):
                sent.add((source, target.address))
                self._send(source, target.address)
                if len(sent) % 16 == 0:
                    self._receive(0)
        asked = [pair for pair in pairs if (pair[0], pair[1].address) in sent]
        self._wait(asked)
        for tenant in self._routers:
            arrived = self._seen[f"router {tenant}"]
            self._senders[tenant] = {self._numbers[number][0] for number, protocols in arrived.items() if protocols}
        return [
            self._judge(source, target)
            if (source, target.address) in sent
            else Result(None, False, "not probed: the host's rules are not in place")
            for source, target in pairs
        ]

    # -- sockets -------------------------------------------------------------------------------------------------

    def _open(self, key: str) -> None:
        """In a namespace: a receiver on all devices, and raw sockets whose packets bring their own IP header."""
        self._listen(key, None)
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            with contextlib.suppress(OSError):  # no IPv6 here
                raw = self._keep(socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW))
                raw.setblocking(False)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                self._raw[key, version] = raw

    def _listen(self, key: str, device: str | None) -> None:
        receiver = self._packet_socket(device, socket.SOCK_DGRAM, _ALL)
        receiver.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
        receiver.setsockopt(socket.SOL_SOCKET, 33, _BUFFER)  # SO_RCVBUFFORCE
        self._watch(key, receiver)

    def _packet_socket(self, device: str | None, kind: int, protocol: int) -> socket.socket:
        sock = self._keep(socket.socket(socket.AF_PACKET, kind, socket.htons(protocol)))
        sock.setblocking(False)
        if device is not None:
            sock.bind((device, protocol))
        return sock

    def _serve(self, host: Endpoint) -> None:
        """A UDP socket at the host's address: it must stay silent, although it works (it hears the host itself)."""
        family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
        with contextlib.suppress(OSError):
            sock = self._keep(socket.socket(family, socket.SOCK_DGRAM))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host.address, UDP_PORT))
            self._watch(f"host {host.address}", sock)

    def _watch(self, key: str, sock: socket.socket) -> None:
        self._receivers[sock.fileno()] = (key, sock)
        self._poll.register(sock, select.EPOLLIN)

    def _keep(self, sock: socket.socket) -> socket.socket:
        self._sockets.append(sock)
        return sock

    # -- sending -------------------------------------------------------------------------------------------------

    def _controls(self) -> None:
        for station in self._stations.values():
            for endpoint in station.endpoints:
                gateway = next((g for g in station.gateways if (":" in g) == (endpoint.version == 6)), None)
                if gateway:
                    key = f"router {endpoint.tenant}"
                    self._transmit(
                        key, ("icmp",), gateway, endpoint.address, self._number(f"control {key}", endpoint.address)
                    )
        for router in self._routers.values():
            for host in router.hosts:
                family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
                number = self._number(f"control host {host.address}", host.address)
                packet = self._mint.packet("udp", host.address, host.address, number)
                with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.bind((host.address, 0))
                    sock.sendto(packet, (host.address, UDP_PORT))

    def _send(self, source: Endpoint, address: str) -> None:
        number = self._number(_sender(source), address)
        if source.kind == "instance":
            self._transmit(source.label, PROTOCOLS, source.address, address, number)
            if (_sender(source), everybody := _EVERYBODY[source.version]) not in self._known:
                broadcast = self._number(_sender(source), everybody)
                self._transmit(source.label, ("udp",), source.address, everybody, broadcast)
            return
        router = self._routers[source.tenant]
        uplink = self._raw[f"uplink {source.tenant}", 0]
        for protocol in PROTOCOLS:
            packet = self._mint.packet(protocol, source.address, address, number)
            kind = _IPV6 if source.version == 6 else _IP
            try:
                uplink.sendto(packet, (router.device, kind, 0, 0, bytes.fromhex(router.mac.replace(":", ""))))
            except OSError as error:
                self._errors[number] = str(error.strerror)

    def _transmit(self, key: str, protocols: Iterable[str], source: str, address: str, number: int) -> None:
        raw = self._raw.get((key, 6 if ":" in address else 4))
        for protocol in protocols:
            try:
                if raw is None:
                    raise OSError(0, "no IP of this version in the namespace")
                raw.sendto(self._mint.packet(protocol, source, address, number), (address, 0))
            except OSError as error:  # no route, or the queue of an address that doesn't answer is full
                self._errors[number] = str(error.strerror)

    def _number(self, sender: str, address: str) -> int:
        if (sender, address) not in self._known:
            self._known[sender, address] = len(self._numbers)
            self._numbers.append((sender, address))
        return self._known[sender, address]

    def _is_near(self, source: Endpoint, target: Endpoint) -> bool:
        """Whether a packet to the target's address stays in the tenant's namespace, by what is wanted."""
        return source.kind != "instance" or (wanted(source, target) and target.kind != "outside")

    # -- receiving -----------------------------------------------------------------------------------------------

    def _wait(self, pairs: Sequence[tuple[Endpoint, Endpoint]]) -> None:
        """Until everything that should arrive has, or patience ends; then a little longer for what should not."""
        due = [(source, target) for source, target in pairs if wanted(source, target)]
        end = time.monotonic() + _PATIENCE
        while due and time.monotonic() < end:
            self._receive(0.02)
            due = [(s, t) for s, t in due if not self._arrivals(s, t) >= set(_expected(t))]
        end = time.monotonic() + _GRACE
        while (left := end - time.monotonic()) > 0:
            self._receive(left)

    def _receive(self, timeout: float) -> None:
        for fd, _ in self._poll.poll(timeout):
            key, sock = self._receivers[fd]
            seen = self._seen[key]
            with contextlib.suppress(BlockingIOError):
                for _ in range(256):
                    packet = sock.recv(2048)
                    found = self._mint.read(packet)
                    if found is not None and found.number < len(self._numbers):
                        seen[found.number].add(found.protocol)
                        self._returned.add((key, found.number, found.source))
                        if found.reply:
                            self._echoed.add((found.number, found.source))
                    elif (sender := tcp_sender(packet)) is not None:
                        self._returned.add((key, "tcp", sender))

    # -- judging -------------------------------------------------------------------------------------------------

    def _judge(self, source: Endpoint, target: Endpoint) -> Result:
        came = self._arrivals(source, target)
        left, receives = self._left(source), self._receives(target)
        error = self._errors.get(self._known[_sender(source), target.address])
        if came:
            return Result(True, left and receives, None, sorted(came))
        if left and receives:
            return Result(False, True, error)
        reason = "the receiver saw no control packet" if left else "nothing that the source sent was seen"
        return Result(None, False, f"{reason}: {error}" if error else reason)

    def _arrivals(self, source: Endpoint, target: Endpoint) -> set[str]:
        """By which protocols the source reached the target."""
        number = self._known[_sender(source), target.address]
        if target.kind == "instance":
            return self._seen[target.label][number] | self._strays(source, target, target.label)
        if target.kind == "outside":
            return self._seen[f"uplink {target.tenant}"][number]
        if target.kind == "host":
            spoke = {(source.label, what, target.address) for what in (number, "tcp")} & self._returned
            return self._seen[f"host {target.address}"][number] | ({"answer"} if spoke else set())
        if target.tenant == source.tenant:  # the router sees everything: what counts is that it answers
            return {"icmp"} if (number, target.address) in self._echoed else set()
        router = f"router {target.tenant}"
        return self._seen[router][number] | self._strays(source, target, router)

    def _strays(self, source: Endpoint, target: Endpoint, receiver: str) -> set[str]:
        """Whether the source's broadcast came to a target that it should not reach."""
        number = self._known.get((_sender(source), _EVERYBODY[source.version]))
        stray = number is not None and bool(self._seen[receiver][number]) and not wanted(source, target)
        return {"broadcast"} if stray else set()

    def _left(self, source: Endpoint) -> bool:
        """Whether anything from the source was seen at its router."""
        return _sender(source) in self._senders[source.tenant]

    def _receives(self, target: Endpoint) -> bool:
        """Whether the target's receiver saw a packet that it should see."""
        if target.kind == "instance":
            control = self._known.get((f"control router {target.tenant}", target.address))
            return control is not None and bool(self._seen[target.label][control])
        if target.kind == "host":
            control = self._known.get((f"control host {target.address}", target.address))
            return control is not None and bool(self._seen[f"host {target.address}"][control])
        if target.kind == "outside":
            return bool(self._seen[f"uplink {target.tenant}"])
        return bool(self._seen[f"router {target.tenant}"])


def _sender(source: Endpoint) -> str:
    """What tells a source from another: each of its addresses sends by itself."""
    return f"{source.label} {source.tenant} {source.address}"


def _expected(target: Endpoint) -> tuple[str, ...]:
    return ("icmp",) if target.kind == "gateway" else PROTOCOLS
