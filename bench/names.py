"""Egress by DNS name: what it adds to a look-up, to a connection and to a stream, and whether first packets are lost.

A client, a router with a tenant's rules and gate, and an internet are network namespaces, and servers processes of
their own. The client has two addresses: that of an instance with name rules, and one that the router lets pass.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.lib import Bench, Table
from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.linux.host_rules import FIRST_DNS_PORT
from insula.network.names import wire
from insula.network.names.forwarder import RATE
from insula.network.names.rules import ClientRules, EgressRules
from insula.network.names.wire import Message, Record
from tests.support.internet import DNS4, NameServer, TcpServer, addresses_in, query_of
from tests.support.names_world import CLIENT4, GATEWAY4, NamesWorld, https
from tests.unit.test_names_checks import hello_of_openssl

PLAIN = "10.0.0.3"
NAME = "api.example.com"
SITE = "93.184.216.1"
SECONDS = 2.0
INSTANCES = 40
PAUSE = 1.1 / RATE  # seconds between look-ups of one instance
GOALS = {"look-up": 1.0, "connection": 0.3}  # milliseconds that may be added


def answer_any(query: Message, answer: Message, tcp: bool) -> Message:
    """`n7.example.com` has 93.184.100.7, and every other name `SITE`."""
    [question] = query.questions
    label = wire.labels_of(question.name)[0].lower()
    number = int(label[1:]) if label[1:].isdigit() else None
    packed = socket.inet_aton(SITE) if number is None else bytes((93, 184, 100 + (number >> 8), number & 255))
    answer.flags &= ~15
    answer.answers = [Record(question.name, wire.A, wire.IN, 60, packed)] if question.type == wire.A else []
    return answer


def respond(sock: socket.socket) -> None:
    """Send one byte for the first data, then swallow the rest."""
    if sock.recv(65536):
        sock.sendall(b"x")
    buffer = bytearray(1 << 20)
    while sock.recv_into(buffer):
        pass


@contextmanager
def world(bench: Bench) -> Iterator[NamesWorld]:
    w = NamesWorld(bench.scratch / "run", served=False)
    with call_in(w.client, Rtnl) as rtnl:
        rtnl.execute(netlink.add_address(rtnl.index("eth0") or 0, f"{PLAIN}/24"))
    call_in(
        w.internet, lambda: os.spawnlp(os.P_WAIT, "ip", "ip", "route", "add", "local", "93.184.0.0/16", "dev", "lo")
    )
    servers = os.fork()
    if servers == 0:
        NameServer(w.internet, (DNS4,), port=FIRST_DNS_PORT).change = answer_any
        for port in (443, 8443):
            TcpServer(w.internet, "0.0.0.0", port, respond)
        while True:
            signal.pause()
    try:
        w.nft.run(f"add element inet t open4 {{ {PLAIN} }}")
        w.allow(https("*.example.com", 443, 8443), addresses=[CLIENT4])
        yield w
    finally:
        w.gates.remove("acme")
        os.kill(servers, signal.SIGKILL)
        os.waitpid(servers, 0)


def bound(w: NamesWorld, kind: int, source: str) -> socket.socket:
    sock: socket.socket = call_in(w.client, lambda: socket.socket(socket.AF_INET, kind))
    sock.bind((source, 0))
    sock.settimeout(5)
    return sock


def look_up(w: NamesWorld, source: str, server: tuple[str, int], name: str = NAME) -> str:
    with bound(w, socket.SOCK_DGRAM, source) as sock:
        sock.connect(server)
        sock.send(query_of(name))
        return addresses_in(wire.parse(sock.recv(4096)))[0]


def connection(w: NamesWorld, source: str, hello: bytes) -> None:
    with bound(w, socket.SOCK_STREAM, source) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((SITE, 443))
        sock.sendall(hello)
        assert sock.recv(1) == b"x"


def stream(w: NamesWorld, source: str, hello: bytes, seconds: float) -> float:
    """Mbit/s from the client to the server."""
    with bound(w, socket.SOCK_STREAM, source) as sock:
        sock.connect((SITE, 443))
        sock.sendall(hello)
        assert sock.recv(1) == b"x"
        block, count, started = bytes(1 << 18), 0, time.perf_counter()
        while time.perf_counter() < started + seconds:
            count += sock.send(block)
        return count * 8 / (time.perf_counter() - started) / 1e6


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def lost(w: NamesWorld, count: int) -> int:
    """The first packets that are lost, of those sent in the moment of the answer; a retransmission comes after 1 s."""
    missing = 0
    for number in range(count):
        time.sleep(PAUSE)
        with bound(w, socket.SOCK_STREAM, CLIENT4) as probe:
            probe.settimeout(0.9)
            address = look_up(w, CLIENT4, (GATEWAY4, 53), f"n{number}.example.com")
            try:
                probe.connect((address, 8443))
            except OSError:
                missing += 1
    return missing


def rate(w: NamesWorld, seconds: float) -> float:
    """Look-ups a second, of many instances together: each sends its next query when it has an answer."""
    sources = [f"10.0.0.{number}" for number in range(10, 10 + INSTANCES)]
    with call_in(w.client, Rtnl) as rtnl:
        index = rtnl.index("eth0") or 0
        rtnl.execute(*(netlink.add_address(index, f"{source}/24") for source in sources))
    clients = {source: ClientRules((source,), (https("*.example.com"),)) for source in sources}
    w.apply(EgressRules({**w.rules.clients, **clients}, w.rules.servers, w.rules.own_servers, w.rules.own))
    sockets, count = [bound(w, socket.SOCK_DGRAM, source) for source in sources], 0
    poll = select.epoll()
    by_number = {sock.fileno(): sock for sock in sockets}
    for sock in sockets:
        sock.connect((GATEWAY4, 53))
        poll.register(sock, select.EPOLLIN)
        sock.send(query_of(NAME))
    started = time.perf_counter()
    while time.perf_counter() < started + seconds:
        for number, _ in poll.poll(1):
            count += by_number[number].recv(512)[3] & 15 == wire.NOERROR
            by_number[number].send(query_of(NAME))
    for sock in sockets:
        sock.close()
    return count / (time.perf_counter() - started)


def measure(bench: Bench) -> list[Table]:
    with world(bench) as w:
        hello, rounds = hello_of_openssl(NAME), bench.rounds(500)
        look_up(w, CLIENT4, (GATEWAY4, 53))
        times: dict[str, list[float]] = {f"{what} {how}": [] for what in GOALS for how in ("plain", "by name")}
        for _ in range(rounds):
            time.sleep(PAUSE)
            times["look-up plain"].append(milliseconds(lambda: look_up(w, PLAIN, (DNS4, FIRST_DNS_PORT))))
            times["look-up by name"].append(milliseconds(lambda: look_up(w, CLIENT4, (GATEWAY4, 53))))
            times["connection plain"].append(milliseconds(lambda: connection(w, PLAIN, hello)))
            times["connection by name"].append(milliseconds(lambda: connection(w, CLIENT4, hello)))
        streams: dict[str, list[float]] = {PLAIN: [], CLIENT4: []}
        for _ in range(bench.rounds(15)):
            for source, found in streams.items():
                found.append(stream(w, source, hello, 0.3 if bench.quick else SECONDS))
        link = (
            "tc",
            "qdisc",
            "add",
            "dev",
            "uplink",
            "root",
            "tbf",
            "rate",
            "1gbit",
            "burst",
            "256kb",
            "latency",
            "20ms",
        )
        call_in(w.router, lambda: os.spawnvp(os.P_WAIT, "tc", link))
        linked: dict[str, list[float]] = {PLAIN: [], CLIENT4: []}
        for _ in range(bench.rounds(15)):
            for source, found in linked.items():
                found.append(stream(w, source, hello, 0.3 if bench.quick else SECONDS))
        call_in(w.router, lambda: os.spawnlp(os.P_WAIT, "tc", "tc", "qdisc", "del", "dev", "uplink", "root"))
        count = 200 if bench.quick else 1000
        missing = lost(w, count)
        found_rate = rate(w, 1.0)  # within the burst that instances are allowed
    table = Table("Egress by DNS name", ["what", "plain", "by name", "difference", "goal"])
    for what, goal in GOALS.items():
        plain, named = (statistics.median(times[f"{what} {how}"]) for how in ("plain", "by name"))
        row = what, f"{plain:.2f} ms", f"{named:.2f} ms", f"+{named - plain:.2f} ms", f"≤ {goal} ms"
        table.rows.append(row)
    for where, measured in (("", streams), (" over a link of 1 Gbit/s", linked)):
        plain, named = (statistics.median(found) for found in measured.values())
        row = f"stream{where}, Mbit/s", f"{plain:.0f}", f"{named:.0f}", f"{named / plain:.2f} ×", "≥ 0.9 ×"
        table.rows.append(row)
    table.rows.append([f"look-ups a second, of {INSTANCES} instances", "", f"{found_rate:.0f}", "", "≥ 2000"])
    table.rows.append([f"first packets lost, of {count}", "", str(missing), "", "0"])
    table.notes.append("a connection is TCP, a ClientHello and the first byte of its answer, checked by the proxy")
    table.notes.append("without a link, processors are the limit: the proxy's work is beside that of client and server")
    return [table]
