"""Floods of DNS queries, and data that leaves in names: neighbours are answered as before."""

from __future__ import annotations

import functools
import os
import socket
import struct

import pytest

from insula.kernel.netns import call_in
from insula.network.addresses import gateway_mac
from insula.network.linux import rules
from tests.support.frames import ethernet, udp
from tests.support.lab import Lab, World, isolated, query, two_tenants
from tests.support.wait import until
from tests.system.hostile.attack import town

IP = 0x0800


def question(name: str) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return os.urandom(2) + b"\1\0\0\1\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"


@isolated
@pytest.mark.parametrize("gateway", ["10.0.0.1", "fd00::1"])
def test_one_instance_can_not_use_up_the_queries_of_its_tenant(gateway: str) -> None:
    with two_tenants() as cloud:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        assert query(web.netns, gateway, "db.acme") is not None
        family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
        with web.socket(family, socket.SOCK_DGRAM) as sock:
            garbage = struct.pack("!HHHHHH", 1, 0, 0, 0, 0, 0)
            for _ in range(5 * rules.DNS_QUERIES_EACH):
                sock.sendto(garbage, (gateway, 53))
            assert query(db.netns, gateway, "web.acme") is not None, "its neighbour asks as before"


@isolated
def test_neighbours_are_answered_in_a_flood_of_queries() -> None:
    with town() as here:
        for what, payloads in {
            "names of the tenant": [question("db.acme.internal")],
            "names of nobody": [question(f"{number}.acme.internal") for number in range(1000)],
            "garbage": [os.urandom(40) for _ in range(1000)],
        }.items():
            packets = [udp("10.0.0.2", "10.0.0.1", payload, 40000, 53) for payload in payloads]
            here.contains(what, [ethernet(gateway_mac(1), here.web.port.mac, IP, packet) for packet in packets])


@isolated
def test_data_that_leaves_in_names_keeps_no_neighbour_from_the_names_outside() -> None:
    """The server of the attacker's domain answers nothing, so that each of its queries waits."""
    world = World()
    answers_all_but(world, b"tunnel")
    cloud = Lab(resolvers=(World.ADDRESS,))
    for tenant in ("acme", "globex"):
        cloud.tenant(tenant)
        cloud.network(tenant)
        for name in ("web", "db"):
            cloud.instance(tenant, name)
        cloud.apply(tenant)
    web = cloud.instances["acme", "web"]
    outside = cloud.instances["acme", "db"], cloud.instances["globex", "db"]
    for client in outside:
        first = functools.partial(query, client.netns, "10.0.0.1", "first.example.com")
        assert until(first, "an answer comes") == (0, ["192.0.2.7"])
    with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(2 * rules.DNS_QUERIES_EACH):
            sock.sendto(question(f"{number:04}{'x' * 50}.tunnel.example.com"), ("10.0.0.1", 53))
    for client in outside:
        answer = until(functools.partial(query, client.netns, "10.0.0.1", "second.example.com"), "an answer comes")
        assert answer == (0, ["192.0.2.7"]), f"{client.port.tenant}: no refusal"


def answers_all_but(world: World, silent: bytes) -> None:
    """A DNS server outside, in a process of its own: each name has 192.0.2.7; those with `silent` get no answer."""
    with call_in(world.instance.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server:
        server.bind(("0.0.0.0", 53))
        if os.fork() == 0:
            while True:
                asked, client = server.recvfrom(4096)
                if silent not in asked:
                    end = asked.index(b"\0", 12) + 5
                    answer = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4\xc0\0\2\7"
                    head = asked[:2] + b"\x81\x80\0\1\0\1\0\0\0\0"
                    server.sendto(head + asked[12:end] + answer, client)
