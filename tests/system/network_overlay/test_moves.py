"""An instance moves to another host: its addresses are there at once, and no packet goes to the old host."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from typing import Any

import msgspec
import pytest

from insula.network.intent import PolicyIntent
from tests.support.hosts import Cloud, Host
from tests.support.lab import SOON, Instance, Sniffer, eventually, isolated
from tests.support.wait import patiently
from tests.system.network_overlay.test_policies import LABELS, POLICY

GAP = patiently(1.0)


class Stream:
    """Datagrams with numbers, one every few milliseconds, from one instance to an address."""

    def __init__(self, source: Instance, target: str) -> None:
        self._sock = source.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM)
        self._target = target
        self._ended = threading.Event()
        self.sent: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for number in itertools.count():
            if self._ended.wait(0.005):
                return
            self.sent[number] = time.monotonic()
            self._sock.sendto(b"number %08d" % number, (self._target, 5000))

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self._sock.close()


def received(sniffer: Sniffer) -> set[int]:
    """The numbers that have arrived; the socket is emptied."""
    found: set[int] = set()
    sniffer.socket.setblocking(False)
    while True:
        try:
            frame, (_, _, kind, *_) = sniffer.socket.recvfrom(65536)
        except BlockingIOError:
            return found
        at = frame.find(b"number ")
        if at >= 0 and kind != 4:  # PACKET_OUTGOING
            found.add(int(frame[at + 7 : at + 15]))


def move(cloud: Cloud, name: str, to: Host) -> Instance:
    """The instance ends on its host, and one with the same port begins on another; the hosts are told one by one."""
    old, source = cloud.instances["acme", name], cloud.places["acme", name]
    cloud.unplug(old, source)
    new = Instance()
    new.port = old.port
    cloud.instances["acme", name], cloud.places["acme", name] = new, to
    cloud.plug(new)
    cloud.apply("acme", [to, source])
    cloud.apply("acme", [host for host in cloud.hosts if host not in (to, source)])
    return new


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_packets_follow_an_instance_that_moves(version: int) -> None:
    cloud = Cloud()
    cloud.tenant("acme")
    cloud.network("acme")
    web, db = cloud.instance("acme", "web", 1), cloud.instance("acme", "db", 2)
    cloud.instance("acme", "log", 2)
    cloud.instance("acme", "other", 3)
    target = str(db.port.address6 if version == 6 else db.port.address)
    assert web.pings(target)
    stream = Stream(web, target)
    try:
        for to in (3, 1, 2):  # to a third host, to the sender's, and back
            there = cloud.hosts[to - 1]
            old = cloud.places["acme", "db"]
            begun = time.monotonic()
            new = move(cloud, "db", there)
            wire, spy, done = old.sniffer(), new.sniffer(), time.monotonic()
            seen: set[int] = set()

            def follows(spy: Sniffer = spy, seen: set[int] = seen, done: float = done) -> bool:
                seen.update(received(spy))
                return any(stream.sent[number] > done for number in seen)

            eventually(follows)
            first = min(stream.sent[number] for number in seen)
            assert first - begun < GAP, f"dark for {first - begun:.2f} s"
            time.sleep(0.1)
            late = [number for number in received(wire) if stream.sent[number] > done]
            assert not late or old is cloud.places["acme", "web"], "packets to the old host"
            assert new.pings(str(web.port.address)) and web.pings(target)
    finally:
        stream.end()
    assert cloud.drift() == []


@isolated
def test_an_instance_that_moves_has_its_old_entries_replaced_in_any_order_of_events() -> None:
    """The old host is told before its instance ends, or the new one before it begins."""
    cloud = Cloud(2)
    cloud.tenant("acme")
    cloud.network("acme")
    web, db = cloud.instance("acme", "web", 1), cloud.instance("acme", "db", 2)
    cloud.instance("acme", "log", 2)
    first, second = cloud.hosts
    new = Instance()
    new.port = db.port
    cloud.instances["acme", "db"], cloud.places["acme", "db"] = new, first
    cloud.apply("acme")  # both hosts, before the port is plugged on the new one and unplugged on the old one
    cloud.plug(new)
    cloud.unplug(db, second)
    log = cloud.instances["acme", "log"]
    for address in (new.port.address, str(new.port.address6)):
        assert web.pings(address) and log.pings(address), address
    cloud.apply("acme")
    assert cloud.drift() == []
    both = cloud.intent("acme", second)
    assert [remote.instance for remote in both.remotes] == ["web", "db"]
    moving = cloud.intent("acme", first, remotes=[*both.remotes])
    errors = first.do(lambda: first.fabric.apply(moving))
    assert errors == {} and web.pings(new.port.address), "a port that is plugged here is not elsewhere"


@isolated
def test_a_connection_outlives_a_repair() -> None:
    cloud = Cloud(2)
    cloud.tenant("acme")
    cloud.network("acme")
    web, db = cloud.instance("acme", "web", 1), cloud.instance("acme", "db", 2)
    with db.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("", 80))
        server.listen()
        with web.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(SOON)
            client.connect((db.port.address, 80))
            connection, _ = server.accept()
            for _ in range(5):
                cloud.apply("acme")
                word = os.urandom(16)
                client.send(word)
                assert connection.recv(16) == word


@pytest.mark.parametrize("judged", [False, True], ids=["no policy", "policy"])
@pytest.mark.parametrize("version", [4, 6])
def test_connections_move_with_the_namespace_of_an_instance(version: int, judged: bool) -> None:
    """As those of a virtual machine do that moves while it runs: its kernel has them, and goes on. Where a policy lets
    only one side open connections, the other one is heard again when that one has sent something."""

    @isolated
    def test() -> None:
        cloud = Cloud()
        cloud.tenant("acme")
        cloud.network("acme")
        web, db = cloud.instance("acme", "web", 1), cloud.instance("acme", "db", 2)
        cloud.instance("acme", "other", 3)
        both = msgspec.structs.replace(POLICY, directions=["in", "out"])
        parts: dict[str, Any] = {"policy": PolicyIntent(policies=[both], labels=LABELS)} if judged else {}
        cloud.apply("acme", **parts)
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        target = str(db.port.address6 if version == 6 else db.port.address)
        with db.socket(family, socket.SOCK_STREAM) as server, web.socket(family, socket.SOCK_STREAM) as client:
            server.bind(("", 80))
            server.listen()
            client.settimeout(patiently(10))
            client.connect((target, 80))
            connection, _ = server.accept()
            connection.settimeout(patiently(10))
            for instance, to in ((db, 3), (web, 2), (db, 1), (web, 1)):
                name, there = instance.port.instance, cloud.hosts[to - 1]
                source = cloud.places["acme", name]
                cloud.unplug(instance, source)
                cloud.places["acme", name] = there
                cloud.plug(instance)
                cloud.apply("acme", [there, source], **parts)
                cloud.apply("acme", **parts)
                for sender, receiver in ((client, connection), (connection, client)):
                    word = os.urandom(16)
                    sender.send(word)
                    assert receiver.recv(16) == word, (name, to)

    test()
