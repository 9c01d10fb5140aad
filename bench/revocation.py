"""How fast streams end when their right is revoked: a token with a thousand of them."""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import statistics
import time
from typing import Any

from bench.lib import Bench, Table
from insula.client import Client

STREAMS = 1000
ROUNDS = 10
MEMBER = "revoked"
GOAL = 0.1  # seconds
_TARGETS = {
    "events": "/v1/events",
    "logs --follow": "/v1/tenants/default/instances/talker/logs?follow=true",
}


def measure(bench: Bench) -> list[Table]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    daemon, streams = bench.daemon, 100 if bench.quick else STREAMS
    daemon.stop()
    daemon.configure('[quotas]\nrequests = "none"\nuser_requests = "none"\nuser_streams = "none"\nstreams = "none"\n')
    daemon.start()
    operator = Client(str(daemon.run / "insulad.sock"), timeout=60)
    talk = ["sh", "-c", "echo hello; exec sleep 3600"]
    operator.instances.run("default", name="talker", image="busybox", command=talk, networks=[])
    operator.identities.create_user(MEMBER)
    operator.identities.bind(MEMBER, "member", "default")
    table = Table(
        f"A token is revoked that has {streams} open streams",
        [
            "streams",
            "from the request: median ms",
            "99 %, ms",
            "until the answer, ms",
            "from the answer: 99 %, ms",
            "last",
        ],
    )
    for name, target in _TARGETS.items():
        ends: list[float] = []
        after: list[float] = []
        answers = []
        for _ in range(bench.rounds(ROUNDS)):
            token = operator.identities.create_token(MEMBER)
            with contextlib.ExitStack() as stack:
                sockets = [stack.enter_context(_stream(daemon.run, target, token["token"])) for _ in range(streams)]
                answered, ended = _revoke(daemon.run, str(token["id"]), sockets)
            answers.append(answered)
            ends += ended
            after += (max(0.0, each - answered) for each in ended)
        last = [statistics.quantiles(times, n=100)[98] for times in (ends, after)]
        cells = (statistics.median(ends), last[0], statistics.median(answers), last[1], max(after))
        table.rows.append([name, *(f"{each * 1e3:.1f}" for each in cells)])
    table.notes += [
        "until the end of each stream, of all rounds; from the answer: one that ended before it counts as 0. The goal "
        f"is {GOAL * 1e3:g} ms",
        "the client reads all streams in one process on the same processors",
    ]
    operator.instances.remove("default", "talker", force=True)
    return [table]


def _stream(run: Any, target: str, token: str) -> socket.socket:
    """Open a stream; returns its connection when the answer has begun: that of logs begins with their first line."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(str(run / "insulad.sock"))
    sock.sendall(f"GET {target} HTTP/1.1\r\nhost: insula\r\nauthorization: Bearer {token}\r\n\r\n".encode())
    answer = sock.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 200"), answer
    sock.setblocking(False)
    return sock


def _revoke(run: Any, token_id: str, sockets: list[socket.socket]) -> tuple[float, list[float]]:
    """Revoke the token; returns the seconds until the answer, and until the end of each stream."""
    with selectors.EpollSelector() as selector, socket.socket(socket.AF_UNIX) as operator:
        operator.connect(str(run / "insulad.sock"))
        for sock in (*sockets, operator):
            selector.register(sock, selectors.EVENT_READ)
        begun = time.perf_counter()
        operator.sendall(f"DELETE /v1/tokens/{token_id} HTTP/1.1\r\nhost: insula\r\n\r\n".encode())
        answered: float | None = None
        ended: dict[int, float] = {}
        while answered is None or len(ended) < len(sockets):
            for key, _ in selector.select(10):
                stream = key.fileobj
                assert isinstance(stream, socket.socket)
                data = stream.recv(1 << 16)
                if stream is operator:
                    assert data.startswith(b"HTTP/1.1 20"), data
                    answered = time.perf_counter()
                    selector.unregister(stream)
                elif not data or data.endswith(b"0\r\n\r\n"):
                    ended[stream.fileno()] = time.perf_counter()
                    selector.unregister(stream)
        return answered - begun, [each - begun for each in ended.values()]
