"""500 ports: from the first one that is plugged until an instance has an answer of each, beside a plain Linux bridge.

The namespaces are there before, and one client at a time plugs. The plain bridge has the least that any solution needs:
a veth pair, a link that is up, and an address. It has no rules, no tenants, and lets everybody forge everything.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from msgspec.structs import replace

from bench.lib import Bench, Table
from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in, call_in_new
from insula.network.fabric import NetnsNic
from tests.support.lab import Lab, checksum
from tests.support.policies import port_of

PORTS = 500
ROUNDS = 5
_FIRST = 100  # the number of the first address
_AGAIN = 0.1  # seconds after which whoever has not answered is asked again


def measure(bench: Bench) -> list[Table]:
    count, rounds = (50, 2) if bench.quick else (PORTS, ROUNDS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    times: dict[str, list[tuple[float, float]]] = {"Insula": [], "plain bridge": []}
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.fabric.teardown)
        for number in range(rounds):
            times["Insula"].append(_insula(lab, f"t{number}", count))
            times["plain bridge"].append(_plain(count))
    table = Table(f"{count} ports", ["what", "plugged, s", "all answer, s", "a port, ms"])
    medians = {name: [statistics.median(each) for each in zip(*some, strict=True)] for name, some in times.items()}
    for name, (plugged, answered) in medians.items():
        table.rows.append([name, f"{plugged:.2f}", f"{answered:.2f}", f"{plugged / count * 1e3:.2f}"])
    ratio = medians["Insula"][1] / medians["plain bridge"][1]
    table.notes.append(f"until all answer Insula takes {ratio:.1f} times as long")
    return [table]


def _insula(lab: Lab, tenant: str, count: int) -> tuple[float, float]:
    owner = lab.tenant(tenant)
    network = lab.network(tenant, "10.0.0.0/16", "fd00::/64")
    asks = lab.instance(tenant, "asks")
    namespaces = [_namespace() for _ in range(count)]
    ports = [
        replace(port_of(f"i{n}", network, _FIRST + n), tenant=tenant, index=owner.index * 10_000 + n, interface="eth0")
        for n in range(count)
    ]

    def plug() -> None:
        for port, netns in zip(ports, namespaces, strict=True):
            lab.fabric.plug(owner, network, port, NetnsNic(netns))

    try:
        return _timed(plug, asks.netns, [port.address for port in ports])
    finally:
        for port in ports:
            lab.fabric.unplug(owner, network, port)
        asks.remove()
        _close(namespaces)


def _plain(count: int) -> tuple[float, float]:
    bridge, asks, *namespaces = [_namespace() for _ in range(count + 2)]
    try:
        with call_in(bridge, Rtnl) as rtnl:
            rtnl.execute(netlink.bridge("br0", index=9, mac="02:00:00:00:00:01", mtu=1500))
            rtnl.execute(netlink.set_link(9, up=True))

            def connect(number: int, netns: int, address: str) -> None:
                rtnl.execute(netlink.veth(f"p{number}", "eth0", netns, index=1000 + number, master=9))
                rtnl.execute(netlink.set_link(1000 + number, up=True))
                with call_in(netns, Rtnl) as inside:
                    index = inside.index("eth0")
                    assert index
                    inside.execute(netlink.set_link(index, up=True), netlink.add_address(index, f"{address}/16"))

            addresses = [f"10.0.{(_FIRST + n) >> 8}.{(_FIRST + n) & 255}" for n in range(count)]
            connect(count, asks, "10.0.0.2")

            def plug() -> None:
                for number, (netns, address) in enumerate(zip(namespaces, addresses, strict=True)):
                    connect(number, netns, address)

            return _timed(plug, asks, addresses)
    finally:
        _close([bridge, asks, *namespaces])


def _timed(plug: Callable[[], None], asks: int, addresses: Iterable[str]) -> tuple[float, float]:
    """Seconds until all are plugged, and until all have answered an echo request."""
    begin = time.monotonic()
    plug()
    plugged = time.monotonic() - begin
    missing, token = {*addresses}, os.urandom(8)
    body = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + token
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    with call_in(asks, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        sock.settimeout(_AGAIN)
        while missing:
            for address in missing:
                sock.sendto(body, (address, 0))
            with contextlib.suppress(TimeoutError):
                while missing:
                    packet, (sender, _) = sock.recvfrom(2048)
                    if packet[20] == 0 and token in packet:
                        missing.discard(sender)
    return plugged, time.monotonic() - begin


def _namespace() -> int:
    return call_in_new(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))


def _close(namespaces: Iterable[int]) -> None:
    for netns in namespaces:
        os.close(netns)
