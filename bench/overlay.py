"""TCP throughput and round trips between two instances on different hosts, compared with plain kernel VXLAN.

Hosts are network namespaces of this machine, joined by a bridge. The peer has the same devices, a VXLAN device on a
bridge and a veth(4) pair to the program, made by ip(8) with the usual options: no rules, and no connection tracking.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from contextlib import ExitStack

from bench.lib import Bench, Table
from bench.network import ROUNDS, SECONDS, Pair
from insula.kernel.netns import OWN, call_in_new
from tests.support.hosts import Cloud, Machine

MTU = 1450


def measure(bench: Bench) -> list[Table]:
    with ExitStack() as stack:
        cloud = Cloud(2, mtu=1500)
        stack.callback(close, cloud)
        pairs = {"two instances on two hosts": _instances(cloud, stack), "plain kernel VXLAN": _plain(stack)}
        seconds, rounds = (0.5, 3) if bench.quick else (SECONDS, ROUNDS)
        streams: dict[str, list[float]] = {name: [] for name in pairs}
        trips: dict[str, list[float]] = {name: [] for name in pairs}
        for number in range(rounds):
            for name in sorted(pairs, reverse=bool(number % 2)):
                streams[name].append(pairs[name].measure("stream", seconds))
                trips[name].append(pairs[name].measure("echo", seconds / 4))
    table = Table("Between two instances on two hosts", ["what", "TCP, Mbit/s", "TCP round trip, µs"])
    for name in pairs:
        table.rows.append([name, f"{statistics.median(streams[name]):.0f}", f"{statistics.median(trips[name]):.0f}"])
    ratio = statistics.median(a / b for a, b in zip(*streams.values(), strict=True))
    table.notes.append(f"throughput is {ratio:.2f} of plain VXLAN; one stream, sender and receiver in Python")
    table.notes.append("hosts are network namespaces of this machine, joined by a bridge; MTU 1450 in 1500")
    return [table]


def _instances(cloud: Cloud, stack: ExitStack) -> Pair:
    cloud.tenant("acme")
    cloud.network("acme", mtu=MTU)
    one, two = cloud.instance("acme", "one", 1), cloud.instance("acme", "two", 2)
    stack.callback(one.remove)
    stack.callback(two.remove)
    return Pair(stack, f"/proc/{one.pid}/ns/net", f"/proc/{two.pid}/ns/net", two.port.address)


def _plain(stack: ExitStack) -> Pair:
    """Two hosts without Insula, each with a namespace for the program."""
    hosts = [Machine(number, 4, 1500) for number in (11, 12)]
    ends = [call_in_new(lambda: os.open(OWN, os.O_RDONLY)) for _ in hosts]
    for host, end, other in zip(hosts, ends, reversed(hosts), strict=True):
        number = host.number - 10
        for command in (
            "ip link add b0 type bridge",
            f"ip link add x0 mtu {MTU} type vxlan id 77 local {host.address} dstport 4789 nolearning",
            "ip link set x0 master b0 up",
            f"bridge fdb append 00:00:00:00:00:00 dev x0 dst {other.address}",
            "ip link set b0 up",
            f"ip link add v0 mtu {MTU} type veth peer name eth0 mtu {MTU} netns /proc/{os.getpid()}/fd/{end}",
            "ip link set v0 master b0 up",
        ):
            _run(host.netns, command)
        _run(end, f"ip address add 198.18.77.{number}/24 dev eth0")
        _run(end, "ip link set eth0 up")
    one, two = (f"/proc/{os.getpid()}/fd/{end}" for end in ends)
    for descriptor in (*ends, *(host.netns for host in hosts)):
        stack.callback(os.close, descriptor)
    return Pair(stack, one, two, "198.18.77.2")


def _run(netns: int, command: str) -> None:
    subprocess.run(["nsenter", f"--net=/proc/{os.getpid()}/fd/{netns}", *command.split()], check=True)


def close(cloud: Cloud) -> None:
    for host in cloud.hosts:
        host.do(host.fabric.teardown)
        os.close(host.netns)
    subprocess.run(["ip", "link", "delete", "switch"], check=True)
