"""What is taken back reaches connections that are open, whichever end sends next, and no other loses a packet.

Whoever is refused here is so by the set `paths`; for policies and the rest it is the same.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in
from insula.network.linux import rules
from insula.network.linux.epoch import Epoch
from tests.support.lab import Instance, Lab, isolated, two_tenants

BRIDGED = ("br1", "br1")
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


@contextmanager
def epoch(cloud: Lab) -> Iterator[Epoch]:
    """The epoch of the tenant acme, for changes besides those of the fabric."""
    inside = cloud.inside("acme")
    with call_in(inside, NftablesSocket) as nftables:
        found = Epoch(nftables, "lab")
        assert found.is_valid()
        yield found
    os.close(inside)


def address(instance: Instance, family: int) -> str:
    found = instance.port.address if family == socket.AF_INET else instance.port.address6
    assert found
    return found


@contextmanager
def connected(one: Instance, other: Instance, family: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a TCP connection, which `one` opens."""
    with other.socket(family, socket.SOCK_STREAM) as server, one.socket(family, socket.SOCK_STREAM) as client:
        server.bind((address(other, family), 4000))
        server.listen()
        client.settimeout(5)
        client.connect((address(other, family), 4000))
        peer, _ = server.accept()
        with peer:
            peer.settimeout(5)
            yield client, peer


def passes(sender: socket.socket, receiver: socket.socket) -> bool:
    """Whether data arrives; False if either end learns that the connection was refused."""
    try:
        sender.sendall(b"x")
        receiver.settimeout(0.5)
        return receiver.recv(1) == b"x"
    except OSError:
        return False


@isolated
@FAMILIES
def test_a_connection_ends_when_its_path_goes_and_another_does_not(family: int) -> None:
    with two_tenants() as cloud, epoch(cloud) as now:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        away, peer = cloud.instances["globex", "web"], cloud.instances["globex", "db"]
        with connected(web, db, family) as (client, server), connected(away, peer, family) as (c, s):
            assert passes(client, server) and passes(server, client) and passes(c, s)
            now.transact(*rules.delete("lab", {"inet bridges": [("br9",)]}))
            assert passes(server, client) and passes(client, server), "judged anew, and still allowed"
            now.transact(*rules.delete("lab", {"inet paths": [BRIDGED]}))
            assert not passes(server, client), "the end that did not open it"
            assert not passes(client, server)
            now.transact(*rules.add("lab", {"inet paths": [BRIDGED]}))
            assert passes(c, s) and passes(s, c)


@isolated
@FAMILIES
def test_answers_alone_end_too(family: int) -> None:
    """UDP in one direction only: the end that asked once and only listens since then."""
    with two_tenants() as cloud, epoch(cloud) as now:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        with web.socket(family, socket.SOCK_DGRAM) as asks, db.socket(family, socket.SOCK_DGRAM) as answers:
            answers.bind((address(db, family), 4000))
            answers.settimeout(5)
            asks.sendto(b"?", (address(db, family), 4000))
            _, where = answers.recvfrom(10)
            asks.settimeout(5)
            answers.sendto(b"1", where)
            assert asks.recv(10) == b"1"
            now.transact(*rules.delete("lab", {"inet paths": [BRIDGED]}))
            for _ in range(3):
                with contextlib.suppress(OSError):  # it was told
                    answers.sendto(b"2", where)
            asks.settimeout(0.5)
            with pytest.raises(OSError):
                asks.recv(10)
            now.transact(*rules.add("lab", {"inet paths": [BRIDGED]}))
            answers.sendto(b"3", where)
            asks.settimeout(5)
            assert asks.recv(10) == b"3", "the control"


@isolated
def test_an_open_connection_loses_nothing_while_epochs_follow_each_other() -> None:
    with two_tenants() as cloud, epoch(cloud) as now:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        with (
            web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sends,
            db.socket(socket.AF_INET, socket.SOCK_DGRAM) as gets,
        ):
            gets.bind((db.port.address, 4000))
            gets.settimeout(5)
            for number in range(300):
                sends.sendto(str(number).encode(), (db.port.address, 4000))
                now.transact(*rules.delete("lab", {"inet bridges": [("br9",)]}))
                assert gets.recv(10) == str(number).encode()


@isolated
def test_a_damaged_epoch_is_repaired_and_connections_live_on() -> None:
    with two_tenants() as cloud:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        inside = cloud.inside("acme")
        with connected(web, db, socket.AF_INET) as (client, server):
            for damage in (
                "flush set inet lab judged",
                "flush map inet lab epoch",
                "add element inet lab judged { 5 }",
            ):
                call_in(inside, functools.partial(subprocess.run, ["nft", damage], check=True))
                assert passes(client, server) and passes(server, client), "at worst each packet is judged"
                cloud.apply("acme")
                with epoch(cloud) as now:
                    assert now.is_valid()
                assert passes(client, server) and passes(server, client)
        os.close(inside)
