"""Floods of connections: an instance that opens too many is stopped, and its neighbours open theirs as before."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Sequence

import pytest

from insula.kernel.netns import call_in
from insula.network.addresses import gateway_mac
from insula.network.linux import rules, sysctl
from insula.network.packets import checksum
from tests.support.frames import ethernet, syn, udp
from tests.support.lab import Instance, World, eventually, isolated, two_tenants
from tests.support.wait import patiently
from tests.system.hostile.attack import town

IP, IPV6 = 0x0800, 0x86DD


def opens_many(instance: Instance, family: int, target: str) -> None:
    """Send a datagram to more ports than an instance may have connections."""
    with instance.socket(family, socket.SOCK_DGRAM) as flood:
        for port in range(1, rules.CONNECTIONS_EACH + 100):
            with contextlib.suppress(OSError):  # nobody listens there, as it is told now and then
                flood.sendto(b"x", (target, port))


@isolated
@pytest.mark.parametrize(
    ("family", "source", "target"),
    [(socket.AF_INET, "10.0.0.2", "10.0.0.3"), (socket.AF_INET6, "fd00::2", "fd00::3")],
    ids=["ipv4", "ipv6"],
)
def test_one_instance_can_not_fill_the_table_of_connections(family: int, source: str, target: str) -> None:
    with two_tenants() as cloud:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        with web.socket(family, socket.SOCK_STREAM) as early, db.socket(family, socket.SOCK_STREAM) as server:
            server.bind((target, 60000))
            server.listen()
            early.connect((target, 60000))
            accepted, _ = server.accept()

            def full() -> bool:
                """Whether no new one opens. The first ones of a slow flood end before its last: it is repeated."""
                opens_many(web, family, target)
                return not web.pings(target, 0.5)

            eventually(full)
            accepted.settimeout(patiently(5))
            early.sendall(b"2")
            assert accepted.recv(10) == b"2", "those that are open live on"
            assert db.pings(source), "the neighbour is not the one that opened them"
            assert cloud.instances["globex", "web"].pings(target)


@isolated
def test_an_instance_is_refused_near_its_limit_and_not_before_three_quarters_of_it() -> None:
    most = rules.CONNECTIONS_EACH
    with two_tenants() as cloud:
        web, inside = cloud.instances["acme", "web"], cloud.inside("acme")
        call_in(inside, lambda: sysctl.write({"netfilter/nf_conntrack_udp_timeout": "600"}))  # however long it takes

        def tracked() -> int:
            return int(call_in(inside, lambda: sysctl.read("netfilter/nf_conntrack_count")) or 0)

        before, destinations = tracked(), random.sample(range(1, 1 << 16), 2 * most)
        with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:

            def opens(ports: Sequence[int]) -> None:
                for port in ports:
                    with contextlib.suppress(OSError):  # nobody listens there
                        sock.sendto(b"x", ("10.0.0.3", port))

            opens(destinations[: most * 3 // 4])
            assert before + most * 3 // 4 <= tracked() <= before + most * 3 // 4 + 20
            opens(destinations[most * 3 // 4 :])
            assert 0.9 * most < tracked() - before <= most + 20


def datagram(source: str, target: str, sport: int, dport: int) -> bytes:
    return udp(source, target, b"", sport, dport)


@isolated
def test_neighbours_go_on_in_a_flood_of_connections() -> None:
    """To a neighbour, to the gateway, and to the outside: connections half open, and datagrams to any port."""
    world = World()
    with town() as here:
        a, router = here.web.port.mac, gateway_mac(1)
        ports = range(1024, 2048 + rules.CONNECTIONS_EACH)
        for what, to, source, target, make in (
            ("SYN to a neighbour", here.db.port.mac, "10.0.0.2", "10.0.0.3", syn),
            ("UDP to a neighbour by IPv6", here.db.port.mac, "fd00::2", "fd00::3", datagram),
            ("SYN to the gateway", router, "10.0.0.2", "10.0.0.1", syn),
            ("UDP to the outside", router, "10.0.0.2", World.ADDRESS, datagram),
            ("SYN to the outside by IPv6", router, "fd00::2", World.ADDRESS6, syn),
        ):
            kind = IPV6 if ":" in source else IP
            here.contains(what, [ethernet(to, a, kind, make(source, target, port, 80)) for port in ports])
        for tenant, name in (("acme", "third"), ("globex", "web")):
            client = here.cloud.instances[tenant, name]
            assert client.pings(World.ADDRESS) and client.pings(World.ADDRESS6), f"{tenant} reaches the outside"
        assert world.instance.pings(World.HOST)


FEW = 40


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "CONNECTIONS", 2 * FEW)
    monkeypatch.setattr(rules, "CONNECTIONS_EACH", FEW)


@isolated
def test_one_instance_can_not_use_up_its_tenant_s_connections_to_the_outside(few: None) -> None:
    """Not with all its addresses together either."""
    World()
    with two_tenants() as cloud:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        for family, target in ((socket.AF_INET, World.ADDRESS), (socket.AF_INET6, World.ADDRESS6)):
            with web.socket(family, socket.SOCK_DGRAM) as sock:
                for port in range(1, 2 * FEW):
                    with contextlib.suppress(OSError):
                        sock.sendto(b"x", (target, port))
        assert not web.pings(World.ADDRESS, 0.5), "the control: it has no more"
        assert db.pings(World.ADDRESS) and db.pings(World.ADDRESS6)
        assert cloud.instances["globex", "web"].pings(World.ADDRESS)


@isolated
def test_pings_of_the_gateway_do_not_fill_the_table_either(few: None) -> None:
    """Each identifier is a connection."""
    with two_tenants() as cloud:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        for address in ("10.0.0.1", "fd00::1"):
            six = ":" in address
            family, protocol = (
                (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
            )
            with web.socket(family, socket.SOCK_RAW, protocol) as sock:
                for number in range(1000, 1000 + 3 * FEW):
                    message = struct.pack("!BBHHH", 128 if six else 8, 0, 0, number, 1)
                    message = message[:2] + struct.pack("!H", 0 if six else checksum(message)) + message[4:]
                    sock.sendto(message, (address, 0))
            assert not web.pings(address, 0.5) and db.pings(address), address
        count = int(call_in(cloud.inside("acme"), lambda: sysctl.read("netfilter/nf_conntrack_count")) or 0)
        assert FEW < count < 4 * FEW, "the control: some were answered"
