"""Answers guests that ask for their configuration: DHCP, DHCPv6 and router solicitations, in all tenants' namespaces.

`network.dhcp` makes the answers; here are the sockets. Containers don't ask, since they are configured from outside;
virtual machines do. dnsmasq is not used for this: it would need CAP_NET_ADMIN and raw sockets in the tenant's
namespace, and a start for each new network. One thread serves all tenants. Only ports' own MAC addresses get answers,
and the rules limit what a port may ask. While insulad is not running nobody answers; leases outlast that by days.

Requests arrive at UDP sockets, so packets for others cost nothing. Answers leave as frames to the MAC address of the
port, because the client has no address yet that the kernel could send to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from insula.kernel import descriptors
from insula.kernel.netns import call_in
from insula.model.objects import Network, Port
from insula.model.routers import Router
from insula.network.addresses import gateway_mac, link_local, mac_of
from insula.network.dhcp import advertisement, frames, v4, v6
from insula.network.dhcp.lease import PortLease, lease_of
from insula.network.linux import naming

log = logging.getLogger("insula.network")
_PKTINFO4, _RECVPKTINFO6, _PKTINFO6, _ICMP6_FILTER, _SOLICITATION = 8, 49, 50, 1, 133  # linux/in.h, in6.h, icmpv6.h
_INFO4: Final = struct.Struct("=I4s4s")  # struct in_pktinfo, ip(7)
_INFO6: Final = struct.Struct("=16sI")  # struct in6_pktinfo, RFC 3542
_LARGEST: Final = 1500
_BURST: Final = 64  # messages of one socket before others have their turn
_NOBODY: Final = "::"
_PAUSE: Final = 3.0  # seconds between advertisements to all nodes of a network (MIN_DELAY_BETWEEN_RAS, RFC 4861, 10)


class TenantGuests:
    """The guests of one tenant, with its sockets."""

    def __init__(self, netns: int) -> None:
        self.sockets: list[tuple[socket.socket, Callable[[bytes, int, str], None]]] = []
        self._ports: dict[int, tuple[Network, Port]] = {}  # by index
        self._by_mac: dict[tuple[int, str], tuple[Network, Port]] = {}  # by the index of the bridge
        self._of_instance: dict[str, dict[int, Port]] = {}  # by name, and index
        self._routers: Mapping[str, tuple[Router, list[Network]]] = {}
        self._networks: Mapping[int, Network] = {}  # by the index of the bridge
        self._advertised: dict[int, float] = {}
        call_in(netns, self._open)

    def _open(self) -> None:
        """Open the sockets. Runs in the tenant's namespace."""
        self._link = _socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        four = _socket(socket.AF_INET, socket.SOCK_DGRAM)
        four.setsockopt(socket.IPPROTO_IP, _PKTINFO4, 1)
        four.bind(("", v4.SERVER))
        self.sockets.append((four, self._answer4))
        with contextlib.suppress(OSError):  # a kernel without IPv6
            six = self._six = _socket(socket.AF_INET6, socket.SOCK_DGRAM)
            six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            six.bind(("::", v6.SERVER))
            raw = _socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
            blocked = (1 << 256) - 1 & ~(1 << _SOLICITATION)
            raw.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, blocked.to_bytes(32, "little"))
            for sock, handler in ((six, self._answer6), (raw, self._solicited)):
                sock.setsockopt(socket.IPPROTO_IPV6, _RECVPKTINFO6, 1)
                self.sockets.append((sock, handler))
        for sock, _ in self.sockets:
            sock.setblocking(False)

    def close(self) -> None:
        for sock, _ in self.sockets:
            sock.close()
        self._link.close()

    # -- what is known -------------------------------------------------------------------------------------------

    def set(self, networks: Iterable[Network], routers: Iterable[Router], ports: Iterable[Port]) -> None:
        """Replace everything; called with each intent."""
        named = {network.name: network for network in networks}
        self._routers = {
            name: (router, [named[each] for each in router.networks if each in named])
            for router in routers
            for name in router.networks
        }
        self._networks = {naming.bridge_index(network.index): network for network in named.values()}
        known = [port for port in ports if port.network in named]
        for index in self._ports.keys() - {port.index for port in known}:
            self._forget(index)
        for port in known:
            self.add(named[port.network], port)
        self._join()

    def add(self, network: Network, port: Port) -> None:
        """Add a port that has been plugged."""
        if self._ports.get(port.index) != (network, port):
            self._forget(port.index)
            self._ports[port.index] = network, port
            self._of_instance.setdefault(port.instance, {})[port.index] = port
        self._by_mac[naming.bridge_index(network.index), port.mac] = network, port

    def remove(self, port: Port) -> None:
        """Remove a port that has been unplugged."""
        self._forget(port.index)

    def _forget(self, index: int) -> None:
        if (found := self._ports.pop(index, None)) is None:
            return
        network, port = found
        key = naming.bridge_index(network.index), port.mac
        if self._by_mac.get(key) == found:  # another port may have the address by now
            del self._by_mac[key]
        beside = self._of_instance[port.instance]
        del beside[index]
        if not beside:
            del self._of_instance[port.instance]

    def _is_first(self, port: Port) -> bool:
        """Whether it is the instance's first port. Runs beside changes."""
        return port.index == min([*self._of_instance.get(port.instance, {}).values(), port], key=_number).index

    def _join(self) -> None:
        """Receive what is sent to all DHCPv6 servers of each network."""
        for bridge, network in self._networks.items():
            if network.gateway6:
                group = socket.inet_pton(socket.AF_INET6, v6.GROUP) + struct.pack("=I", bridge)
                with contextlib.suppress(OSError):  # it has joined before
                    self._six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)

    def _lease(self, bridge: int, mac: str) -> PortLease | None:
        if (found := self._by_mac.get((bridge, mac))) is None:
            return None
        network, port = found
        router, joined = self._routers.get(network.name, (None, []))
        return lease_of(network, port, router, joined, self._is_first(port))

    # -- messages ------------------------------------------------------------------------------------------------

    def _answer4(self, data: bytes, bridge: int, _: str) -> None:
        found = v4.answer(data, lambda mac: self._lease(bridge, mac))
        if found:
            lease, answer = found
            ends = (lease.gateway, answer.target)
            self._send(bridge, frames.udp(_macs(lease), ends, (v4.SERVER, v4.CLIENT), answer.payload))

    def _answer6(self, data: bytes, bridge: int, sender: str) -> None:
        lease = self._of_neighbour(bridge, sender)
        if lease and (answer := v6.answer(data, lease)):
            ends = (link_local(lease.gateway_mac), sender)
            self._send(bridge, frames.udp(_macs(lease), ends, (v6.SERVER, v6.CLIENT), answer))

    def _solicited(self, data: bytes, bridge: int, sender: str) -> None:
        if not advertisement.is_solicitation(data) or not (network := self._networks.get(bridge)):
            return
        if sender == _NOBODY:
            self.advertise(bridge, network, _PAUSE)
        elif lease := self._of_neighbour(bridge, sender):
            self._advertise(bridge, network, _macs(lease)[1], sender)

    def _of_neighbour(self, bridge: int, address: str) -> PortLease | None:
        """The lease of the port that has this link-local address."""
        return self._lease(bridge, mac) if (mac := mac_of(address)) else None

    def advertise_all(self) -> None:
        """Advertise in each network, unless that was done lately."""
        for bridge, network in [*self._networks.items()]:
            self.advertise(bridge, network, advertisement.EVERY)

    def advertise(self, bridge: int, network: Network, pause: float) -> None:
        """Advertise to all nodes of a network, unless that was done within `pause` seconds."""
        now = time.monotonic()
        if network.gateway6 and now - self._advertised.get(bridge, -pause) >= pause:
            self._advertised[bridge] = now
            self._advertise(bridge, network, advertisement.ALL_NODES_MAC, advertisement.ALL_NODES)

    def _advertise(self, bridge: int, network: Network, mac: str, address: str) -> None:
        if network.subnet6 and network.gateway6:
            ours, domain = gateway_mac(network.index), f"{network.tenant}.internal"
            message = advertisement.advertisement(ours, network.mtu, network.subnet6, network.gateway6, domain)
            self._send(bridge, frames.icmpv6((ours, mac), (link_local(ours), address), message))

    def _send(self, bridge: int, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # the bridge is gone, or its queue is full: the client asks again
            self._link.sendto(frame, (naming.bridge(bridge - naming.bridge_index(0)), 0))


def _socket(family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Open a socket whose descriptor is none of the few that libnftables needs."""
    made = socket.socket(family, kind, protocol)
    return socket.socket(family, kind, protocol, fileno=descriptors.move_above_select_limit(made.detach()))


def _macs(lease: PortLease) -> tuple[str, str]:
    return lease.gateway_mac, lease.mac


def _number(port: Port) -> int:
    return int(port.interface.removeprefix("eth"))


class GuestServer:
    """A thread that serves the guests of all tenants."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._poll: select.epoll | None = None  # None: the thread doesn't run
        self._tenants: set[TenantGuests] = set()
        self._handlers: dict[int, tuple[socket.socket, Callable[[bytes, int, str], None]]] = {}

    def _start(self) -> select.epoll:
        self._poll = select.epoll()
        self._wake, self._woken = os.pipe()
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, args=[self._poll], name="guests", daemon=True)
        self._thread.start()
        return self._poll

    def close(self) -> None:
        """End the thread, and close all sockets. `serve` starts it again."""
        if self._poll is None:
            return
        os.write(self._woken, b"x")  # that it is closed would not do: a forked process may have it, too
        self._thread.join()
        for tenant in [*self._tenants]:
            self.forget(tenant)
        self._poll.close()
        os.close(self._wake)
        os.close(self._woken)
        self._poll = None

    def serve(self, netns: int) -> TenantGuests:
        """Serve the guests of a tenant, whose namespace is behind the descriptor. OSError."""
        tenant = TenantGuests(netns)
        with self._lock:
            poll = self._poll or self._start()
            self._tenants.add(tenant)
            for sock, handler in tenant.sockets:
                self._handlers[sock.fileno()] = sock, handler
                poll.register(sock, select.EPOLLIN)
        return tenant

    def forget(self, tenant: TenantGuests) -> None:
        """Close a tenant's sockets, which keep its namespace."""
        with self._lock:
            if tenant in self._tenants and self._poll:
                self._tenants.remove(tenant)
                for sock, _ in tenant.sockets:
                    del self._handlers[sock.fileno()]
                    self._poll.unregister(sock)
                tenant.close()

    def _run(self, poll: select.epoll) -> None:
        due = 0.0
        while True:
            ready = poll.poll(max(0.0, due - time.monotonic()))
            if any(fd == self._wake for fd, _ in ready):
                return
            with self._lock:
                for fd, _ in ready:
                    self._receive(fd)
                if time.monotonic() >= due:
                    due = time.monotonic() + 10.0
                    for tenant in self._tenants:
                        tenant.advertise_all()

    def _receive(self, fd: int) -> None:
        if (found := self._handlers.get(fd)) is None:
            return
        sock, handler = found
        with contextlib.suppress(OSError):  # nothing is left
            for _ in range(_BURST):
                data, ancillary, _, sender = sock.recvmsg(_LARGEST, 256)
                bridge = _received_by(ancillary)
                if bridge is None or not naming.is_bridge_index(bridge):
                    continue
                try:
                    handler(data, bridge, sender[0].partition("%")[0])
                except Exception:  # one client's message must not end the answers for all
                    log.exception("a guest's message could not be answered")


def _received_by(ancillary: Iterable[tuple[int, int, bytes]]) -> int | None:
    """Return the index of the interface that a message was received by."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _PKTINFO4):
            return int(_INFO4.unpack_from(data)[0])
        if (level, kind) == (socket.IPPROTO_IPV6, _PKTINFO6):
            return int(_INFO6.unpack_from(data)[1])
    return None
