"""Published ports and balancers: how long 20,000 ports take to publish, and one backend more or less of a balancer;
throughput and connections beside plain nftables DNAT.

The peer is what one would write by hand: a veth pair, and one rule. The host of both is a namespace of its own.
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from bench.lib import Bench, Table
from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.objects import PublishedPort
from insula.network.intent import BalancerIntent, BalancerListener, Forward, OutsideIntent
from insula.network.linux.state import addresses
from tests.support.lab import Instance, Lab, World, isolated

ROUNDS = 7
BYTES = 256 << 20
CONNECTIONS = 1000
Row = Sequence[str]


def measure(bench: Bench) -> list[Table]:
    file = bench.scratch / "outside.json"
    rounds = 2 if bench.quick else ROUNDS

    def measured() -> None:
        file.write_bytes(msgspec.json.encode(_rows(rounds)))

    isolated(measured)()
    changes, ways = msgspec.json.decode(file.read_bytes(), type=tuple[list[Row], list[Row]])
    first = Table("Published ports and balancers: changes, with the whole of `Fabric.apply`", ["change", "ms"], changes)
    second = Table("Published ports and balancers: packets", ["way", "Insula", "peer", "ratio"], ways)
    second.notes.append(
        "the peer is a DNAT rule to an instance; inside a network it is a connection without a balancer"
    )
    return [first, second]


def publishing(lab: Lab, rounds: int) -> list[Row]:
    """The time of `Fabric.apply` with and without a range of 20,000 ports."""
    rows: list[Row] = []
    to = addresses(lab.instances["acme", "web"].port)
    equal = PublishedPort(port=20000, target=20000, count=20000)
    shifted = PublishedPort(port=20000, target=10000, count=20000)
    one = PublishedPort(port=80, target=80)
    for name, published in (
        ("one port is published", one),
        ("20,000 ports, to the same ones", equal),
        ("20,000 ports, to others", shifted),
    ):
        took = []
        for _ in range(rounds):
            lab.apply("acme", outside=OutsideIntent())
            started = time.perf_counter()
            lab.apply("acme", outside=OutsideIntent(forwards=[Forward(published=published, addresses=to)]))
            took.append(time.perf_counter() - started)
        rows.append([name, f"{1000 * statistics.median(took):.1f}"])
    return rows


def rebalancing(lab: Lab, rounds: int) -> list[Row]:
    """The time of `Fabric.apply` when one backend of a balancer fails, and when it is back."""
    rows: list[Row] = []
    for count in (2, 10, 100):
        backends = [(f"10.0.0.{2 + number}", 90) for number in range(count)]

        def apply(some: list[tuple[str, int]]) -> float:
            listeners = [BalancerListener(address=None, port=8091)]
            balancer = BalancerIntent(index=1, listeners=listeners, backends=some)
            started = time.perf_counter()
            lab.apply("acme", outside=OutsideIntent(balancers=[balancer]))
            return time.perf_counter() - started

        apply(backends)
        pairs = [(apply(backends[1:]), apply(backends)) for _ in range(rounds)]
        out, back = (1000 * statistics.median(each) for each in zip(*pairs, strict=True))
        rows += [[f"one of {count} backends fails", f"{out:.1f}"], ["the same is back", f"{back:.1f}"]]
    return rows


def sink(instance: Instance, port: int) -> None:
    """A server that discards what it gets, and says "x" at the end of each connection's data."""
    server = instance.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", port))
    server.listen(1024)
    if os.fork() == 0:
        while True:
            accepted, _ = server.accept()
            threading.Thread(target=_discard, args=(accepted,), daemon=True).start()
    server.close()


def _discard(accepted: socket.socket) -> None:
    with accepted:
        buffer = bytearray(1 << 20)
        while accepted.recv_into(buffer):
            pass
        accepted.sendall(b"x")


def throughput(client: Instance, address: str, port: int) -> float:
    """Bytes a second of one connection."""
    with client.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.connect((address, port))
        data, started = bytes(1 << 20), time.perf_counter()
        for _ in range(BYTES >> 20):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
        return BYTES / (time.perf_counter() - started)


def connecting(client: Instance, address: str, port: int) -> float:
    """Connections a second, one after the other."""
    started = time.perf_counter()
    for _ in range(CONNECTIONS):
        with client.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.connect((address, port))
    return CONNECTIONS / (time.perf_counter() - started)


def plain(peer: Instance) -> None:
    """The peer: a namespace behind the host, and one DNAT rule to it."""
    with Rtnl() as host:
        host.execute(netlink.veth("peer0", "eth0", peer.netns))
        near = host.index("peer0")
        assert near
        host.execute(netlink.add_address(near, "192.168.77.1/24"))
        with call_in(peer.netns, Rtnl) as far:
            eth0 = far.index("eth0")
            assert eth0
            far.execute(
                netlink.set_link(1, up=True),
                netlink.set_link(eth0, up=True),
                netlink.add_address(eth0, "192.168.77.2/24"),
                netlink.add_route("0.0.0.0/0", index=eth0, gateway="192.168.77.1"),
            )
    with Nft() as nft:
        nft.run(
            "table ip peer {\n chain c {\n type nat hook prerouting priority -100;\n"
            f" ip daddr {World.HOST} tcp dport 9090 dnat to 192.168.77.2:90\n }}\n}}\n"
        )


def compare(what: str, unit: float, rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> Row:
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    one, other = (statistics.median(each) for each in zip(*pairs, strict=True))
    return [what, f"{one / unit:.2f}", f"{other / unit:.2f}", f"{one / other:.2f}"]


def _rows(rounds: int) -> tuple[list[Row], list[Row]]:
    """The rows of both tables, measured in this network namespace."""
    world, lab = World(), Lab()
    lab.tenant("acme")
    lab.network("acme", subnet6="fd00::/64")
    web = lab.instance("acme", "web")
    lab.instance("acme", "client")
    changes = [*publishing(lab, rounds), *rebalancing(lab, rounds)]
    sink(web, 90)
    peer = Instance()
    plain(peer)
    sink(peer, 90)
    forward = Forward(published=PublishedPort(port=8090, target=90), addresses=addresses(web.port))
    balancer = BalancerIntent(
        index=1, listeners=[BalancerListener(address=None, port=8091)], backends=[(web.port.address, 90)]
    )
    inner = BalancerListener(address="10.0.0.200", port=8092, network="net")
    internal = BalancerIntent(index=2, listeners=[inner], backends=[(web.port.address, 90)])
    lab.apply("acme", outside=OutsideIntent(forwards=[forward], balancers=[balancer, internal]))
    client, host = world.instance, World.HOST

    def per_byte(port: int) -> Callable[[], float]:
        return lambda: throughput(client, host, port)

    def directly() -> float:
        return connecting(lab.instances["acme", "client"], web.port.address, 90)

    def by_balancer() -> float:
        return connecting(lab.instances["acme", "client"], "10.0.0.200", 8092)

    def per_connection(port: int) -> Callable[[], float]:
        return lambda: connecting(client, host, port)

    return changes, [
        compare("published port, Gbyte/s", 1e9, rounds, per_byte(8090), per_byte(9090)),
        compare("published port, connections/s", 1, rounds, per_connection(8090), per_connection(9090)),
        compare("balancer, connections/s", 1, rounds, per_connection(8091), per_connection(9090)),
        compare("balancer inside a network, connections/s", 1, rounds, by_balancer, directly),
    ]
