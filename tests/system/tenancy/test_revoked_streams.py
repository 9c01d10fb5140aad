"""Streams of a right that is taken: when the verb returns they have ended, and said why."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from insula.model.errors import NotFound
from tests.support.daemon import Daemon
from tests.support.wait import patiently
from tests.system.tenancy.conftest import Houses, People

STREAMS = 50
END = b"0\r\n\r\n"  # the last chunk (RFC 9112, 7.1)


@pytest.fixture(scope="module")
def talking(houses: Houses) -> Iterator[str]:
    """The path of an instance that says something now and then."""
    houses.acme.ok("run", "-d", "--name", "talking", "busybox", "sh", "-c", "while :; do echo tick; sleep 0.2; done")
    yield f"/v1/tenants/{houses.acme.tenant}/instances/talking"
    houses.acme.ok("rm", "-f", "talking")


@contextmanager
def following(daemon: Daemon, token: str, target: str) -> Iterator[tuple[socket.socket, bytes]]:
    """Open a stream; yields its connection and what has come, which is a part of the body at least."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patiently(60))
        sock.connect(str(daemon.run / "insulad.sock"))  # where a user may have as many connections as it likes
        sock.sendall(f"GET {target} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\r\n".encode())
        data = b""
        while b"tick" not in data:
            data += sock.recv(1 << 16)
        yield sock, data


def test_when_a_revocation_is_answered_all_streams_have_ended(
    daemon: Daemon, people: People, houses: Houses, talking: str
) -> None:
    person, other = (people.person("member", str(houses.acme.tenant)) for _ in range(2))
    with ExitStack() as stack:
        opened = [
            stack.enter_context(following(daemon, each.secret, f"{talking}/logs?follow=true"))[0]
            for each in (*[person] * STREAMS, other)
        ]
        people.operator.identities.revoke_token(person.secret.split("_")[1])
        *ended, control = (_waiting(sock) for sock in opened)
        assert [data.endswith(END) and b'"Unauthenticated"' in data for data in ended] == [True] * STREAMS
        assert not control.endswith(END), "that of another member goes on"
        while b"tick" not in control:
            control += opened[-1].recv(1 << 16)


def _waiting(sock: socket.socket) -> bytes:
    """What has arrived already."""
    sock.setblocking(False)
    data = bytearray()
    with contextlib.suppress(BlockingIOError):
        while piece := sock.recv(1 << 16):
            data += piece
    sock.settimeout(patiently(60))
    return bytes(data)


def test_who_does_not_read_holds_up_no_revocation_and_gets_no_more(
    daemon: Daemon, people: People, houses: Houses, talking: str
) -> None:
    """What was sent before is there to be read, and then the reason."""
    person = people.person("member", str(houses.acme.tenant))
    flood = ["sh", "-c", "echo tick; yes | head -c 30000000; echo tock; sleep 3600"]
    houses.acme.ok("run", "-d", "--name", "flood", "--log-size", "64m", "busybox", *flood)
    target = talking.replace("talking", "flood")
    with following(daemon, person.secret, f"{target}/logs?follow=true") as (sock, data):
        people.operator.identities.unbind(person.name, str(houses.acme.tenant))
        with pytest.raises(NotFound):
            person.client.instances.get(str(houses.acme.tenant), "flood")
        while not data.endswith(END) and (piece := sock.recv(1 << 16)):
            data += piece
    assert b'"NotFound"' in data[-1000:]
    assert b"tock" not in data and len(data) < 30_000_000
    houses.acme.ok("rm", "-f", "flood")


def test_the_end_of_a_stream_is_in_the_audit_log_with_its_reason(
    daemon: Daemon, people: People, houses: Houses, talking: str
) -> None:
    """And the revocation beside it has none."""
    person = people.person("member", str(houses.acme.tenant))
    identity = person.secret.split("_")[1]
    with following(daemon, person.secret, f"{talking}/logs?follow=true"):
        people.operator.identities.revoke_token(identity)
    entries: list[dict[str, Any]] = [*people.operator.host.audit()]
    ended = [e for e in entries if e.get("proof") == f"token {identity}" and e.get("phase") == "ended"]
    assert [(e["error"], e["status"]) for e in ended] == [("Unauthenticated", 200)]
    revoked = [e for e in entries if e.get("verb", "").startswith("DELETE /v1/tokens/") and e["proof"] == "socket"][-1]
    assert revoked["status"] < 300 and "error" not in revoked
