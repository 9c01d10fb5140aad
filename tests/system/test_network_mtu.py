"""MTU of networks, and path MTU discovery (RFC 1191, RFC 8201): between networks of a router, and through NAT."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.network.intent import PolicyIntent
from tests.support.icmp_errors import reported
from tests.support.lab import Instance, Lab, World, isolated
from tests.support.policy_lab import policy

MTUS = (9000, 1500, 1280)
FAMILIES = (socket.AF_INET, socket.AF_INET6)
_DISCOVER = (0, 10)


def too_big(sender: Instance, there: str, size: int) -> tuple[int, str] | None:
    """Send a packet of this size that may not be fragmented; returns (MTU, router) of the error that comes back."""
    found = reported(sender, there, size=size)
    assert found, "neither a router nor the target has answered"
    return (found.mtu, found.by) if found.number == errno.EMSGSIZE else None  # the port is unreachable: it has arrived


def address(family: int, number: int, host: int) -> str:
    return f"10.{number}.0.{host}" if family == socket.AF_INET else f"fd00:{number}::{host}"


@contextlib.contextmanager
def different_mtus() -> Iterator[tuple[Lab, list[Instance]]]:
    """acme with networks of different MTU, and globex with others and the same addresses."""
    lab = Lab()
    for tenant, mtus in (("acme", MTUS), ("globex", (1500, 1500, 1500))):
        lab.tenant(tenant)
        for number, mtu in enumerate(mtus, 1):
            lab.network(tenant, f"10.{number}.0.0/24", f"fd00:{number}::/64", name=f"n{number}", mtu=mtu)
            lab.instance(tenant, f"i{number}", f"n{number}", 2)
        lab.router(tenant, "n1", "n2", "n3")
    yield lab, [lab.instances["acme", f"i{number}"] for number in (1, 2, 3)]


@isolated
def test_instances_have_the_mtu_of_their_network() -> None:
    with different_mtus() as (_, instances):
        for mtu, instance in zip(MTUS, instances, strict=True):
            with instance.do(Rtnl) as inside:
                link = inside.link("eth0")
                assert link and link.mtu == mtu


@isolated
def test_a_packet_that_is_too_big_is_reported_with_the_mtu_by_the_own_gateway() -> None:
    with different_mtus() as (lab, instances):
        for family in FAMILIES:
            for source, target in ((1, 2), (1, 3), (2, 3)):
                sender, smaller = instances[source - 1], MTUS[target - 1]
                there = address(family, target, 2)
                gateway = address(family, source, 1)
                assert too_big(sender, there, MTUS[source - 1]) == (smaller, gateway)
                assert too_big(sender, there, smaller + 1) == (smaller, gateway)
                assert too_big(sender, there, smaller) is None, "that fits"
            assert too_big(lab.instances["globex", "i1"], address(family, 3, 2), 1500) is None, "not in other tenants"


@isolated
def test_no_policy_keeps_such_a_report_back() -> None:
    """The sender may send, and nobody may send anything to it."""
    with different_mtus() as (lab, (one, _, three)):
        policies = [policy("out", {"app": "i1"}, "out any udp", directions=("in", "out"))]
        labels = {f"i{number}": {"app": f"i{number}"} for number in (1, 2, 3)}
        lab.apply("acme", policy=PolicyIntent(policies=policies, labels=labels))
        for family in FAMILIES:
            assert too_big(one, address(family, 3, 2), 1500) == (1280, address(family, 1, 1))
            assert not three.pings(address(family, 1, 2), 0.3), "the policy is in force"


@isolated
def test_packets_that_may_be_fragmented_arrive() -> None:
    with different_mtus() as (_, instances):
        seen = instances[2].sniffer()
        with instances[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(*_DISCOVER, 0)  # IP_PMTUDISC_DONT
            sock.sendto(bytes(5000) + b"the last fragment", ("10.3.0.2", 33434))
            assert seen.sees(b"the last fragment", 5), "the router fragments it"
        for family in FAMILIES:
            there = address(family, 3, 2)
            assert too_big(instances[0], there, 5000)
            assert instances[0].pings(there, 5, 5000), "then the sender does"


@isolated
def test_errors_come_back_through_nat() -> None:
    """From the own router if the uplink is too small, and from routers beyond."""
    world = World()
    with Rtnl() as host:
        wan = host.link("wan")
        assert wan
        host.execute(netlink.set_link(wan.index, mtu=1400))
    with different_mtus() as (_, instances):
        for family, there in zip(FAMILIES, (world.ADDRESS, world.ADDRESS6), strict=True):
            assert too_big(instances[0], there, 4000) == (1500, address(family, 1, 1))
            for instance in instances[:2]:
                found = too_big(instance, there, 1500)
                assert found and found[0] == 1400
            assert too_big(instances[2], there, 1280) is None


def echo(instance: Instance, port: int) -> None:
    """A TCP server that sends back what it gets, in a process of its own."""
    with instance.socket(socket.AF_INET6, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen(8)
        if os.fork() == 0:
            while True:
                accepted, _ = server.accept()
                with contextlib.suppress(OSError):
                    while data := accepted.recv(65536):
                        accepted.sendall(data)
                accepted.close()


def carries(client: Instance, there: str, port: int) -> bool:
    """Whether much data comes back by TCP in time."""
    family = socket.AF_INET6 if ":" in there else socket.AF_INET
    with client.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect((there, port))
        for _ in range(8):
            sock.sendall(b"x" * 32768)
            left = 32768
            while left:
                if not (data := sock.recv(left)):
                    return False
                left -= len(data)
    return True


@isolated
def test_tcp_works_between_all_of_them_and_the_outside() -> None:
    world = World()
    with Rtnl() as host:
        wan = host.link("wan")
        assert wan
        host.execute(netlink.set_link(wan.index, mtu=1400))
    echo(world.instance, 80)
    with different_mtus() as (_, instances):
        for instance in instances:
            echo(instance, 80)
        for family in FAMILIES:
            for source in instances:
                for number in (1, 2, 3):
                    there = address(family, number, 2)
                    assert carries(source, there, 80), (source.port.instance, there)
        for there in (world.ADDRESS, world.ADDRESS6):
            assert all(carries(instance, there, 80) for instance in instances)


@isolated
def test_segments_fit_without_any_error_message() -> None:
    """TCP's maximum segment size is lowered on the way, so that ends which get no ICMP work as well."""
    with different_mtus() as (_, instances):
        seen = instances[2].sniffer()
        for family, headers in zip(FAMILIES, (40, 60), strict=True):
            with instances[0].socket(family, socket.SOCK_STREAM) as sock:
                sock.setblocking(False)
                with pytest.raises(BlockingIOError):
                    sock.connect((address(family, 3, 2), 81))
                option = struct.pack("!BBH", 2, 4, 1280 - headers)
                assert seen.sees(option, 5)
