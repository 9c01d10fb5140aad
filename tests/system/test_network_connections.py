"""An instance that opens connections without end is stopped, and its neighbours open theirs as before."""

from __future__ import annotations

import contextlib
import socket

import pytest

from insula.network.linux import rules
from tests.support.lab import Instance, eventually, isolated, two_tenants
from tests.support.wait import patiently


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
