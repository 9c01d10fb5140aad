"""TCP throughput and round trips between two instances of one network, compared with a plain Linux bridge."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bench.lib import Bench, Table
from tests.support.machine import Namespaces

SECONDS = 2.0
ROUNDS = 5
PORT = 5201
SINK = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("ready", flush=True)
while True:
    peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if peer.recv(1) == b"e":
        while data := peer.recv(1):
            peer.sendall(data)
    else:
        buffer = bytearray(1 << 20)
        while peer.recv_into(buffer):
            pass
"""
SOURCE = """
import socket, sys, time
address, port, mode, seconds = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
peer = socket.create_connection((address, port), 5)
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
peer.sendall(mode[0].encode())
end = time.perf_counter() + seconds
started, count, block = time.perf_counter(), 0, bytes(1 << 18)
if mode == "echo":
    times = []
    while time.perf_counter() < end:
        before = time.perf_counter()
        peer.sendall(b"x")
        peer.recv(1)
        times.append(time.perf_counter() - before)
    print(sorted(times)[len(times) // 2] * 1e6)
else:
    while time.perf_counter() < end:
        count += peer.send(block)
    peer.close()
    print(count * 8 / (time.perf_counter() - started) / 1e6)
"""


class Pair:
    """Two network namespaces and the address of the second; a sink runs there."""

    def __init__(self, stack: ExitStack, source: str, target: str, address: str) -> None:
        self.source, self.address = source, address
        command = Namespaces.wrap(target, sys.executable, "-c", SINK, str(PORT))
        sink = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stack.callback(sink.wait)
        stack.callback(sink.kill)
        assert sink.stdout is not None
        assert sink.stdout.readline() == "ready\n"

    def measure(self, mode: str, seconds: float) -> float:
        words = (mode, str(seconds))
        command = Namespaces.wrap(self.source, sys.executable, "-c", SOURCE, self.address, str(PORT), *words)
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return float(done.stdout)


@contextmanager
def plain_bridge(stack: ExitStack) -> Iterator[Pair]:
    """A bridge in a namespace of its own, with two more namespaces on it by veth: no rules, no addresses."""
    one, two = Namespaces(), Namespaces()
    stack.callback(one.close)
    stack.callback(two.close)
    middle = one.outside
    one.ip(middle, "link add bridge0 type bridge")
    one.ip(middle, "link set bridge0 up")
    for number, end in ((1, one.host), (2, two.host)):
        pid = end.split("/")[2]
        one.ip(middle, f"link add port{number} type veth peer name eth0 netns {pid}")
        one.ip(middle, f"link set port{number} master bridge0 up")
        one.ip(end, f"address add 198.51.100.{number}/24 dev eth0")
        one.ip(end, "link set eth0 up")
    yield Pair(stack, one.host, two.host, "198.51.100.2")


@contextmanager
def instances(bench: Bench, stack: ExitStack) -> Iterator[Pair]:
    """Two instances on a network of Insula; the same programs run in their network namespaces."""
    cli = bench.cli
    for name in ("net1", "net2"):
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "3600")
        stack.callback(cli.ok, "rm", "-f", name)
    views = {view["instance"]["name"]: view for view in cli.json("ps")}
    one, two = (f"/proc/{views[name]['status']['pid']}/ns/net" for name in ("net1", "net2"))
    yield Pair(stack, one, two, views["net2"]["instance"]["ports"][0]["address"])


def measure(bench: Bench) -> list[Table]:
    with ExitStack() as stack:
        pairs = {
            "two instances": stack.enter_context(instances(bench, stack)),
            "plain Linux bridge": stack.enter_context(plain_bridge(stack)),
        }
        seconds, rounds = (0.5, 3) if bench.quick else (SECONDS, ROUNDS)
        streams: dict[str, list[float]] = {name: [] for name in pairs}
        trips: dict[str, list[float]] = {name: [] for name in pairs}
        for _ in range(rounds):
            for name, pair in pairs.items():
                streams[name].append(pair.measure("stream", seconds))
                trips[name].append(pair.measure("echo", seconds / 4))
    table = Table("Between two instances on one host", ["what", "TCP, Mbit/s", "TCP round trip, µs"])
    for name in pairs:
        table.rows.append([name, f"{statistics.median(streams[name]):.0f}", f"{statistics.median(trips[name]):.0f}"])
    table.notes.append("one stream, sender and receiver in Python; round trips of one byte with TCP_NODELAY")
    return [table]
