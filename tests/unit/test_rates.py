"""Token buckets, their use for requests and failed authentications, and time limits for what clients send.

The clock of the buckets is the tests' own.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import secrets
import select
import socket
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.api import access, patience, streams
from insula.api.access import AccessMiddleware
from insula.api.audit import AuditedRequest
from insula.api.outbox import Outbox
from insula.api.patience import Patient
from insula.api.peer import Peer
from insula.api.sources import network_of
from insula.api.tls.record import ClientRecord
from insula.control.allocation.rates import BURST, Buckets, Rates
from insula.control.identities.cache import IdentityCache
from insula.control.identities.tokens import generate
from insula.control.keys import PRINCIPALS, TOKENS
from insula.model.errors import TooManyRequests
from insula.model.principals import Principal, Token
from tests.support.wait import patiently
from tests.unit.conftest import StubDaemon

STRANGER, NEIGHBOUR, ROOT = Peer(1, 1000, 1000), Peer(2, 1001, 1001), Peer(3, 0, 0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# -- buckets -------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    buckets = Buckets(clock=clock)
    assert [buckets.take("a", 2.0, 3.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert buckets.take("b", 2.0, 3.0) == 0.0, "another has its own"
    clock.now += 0.25
    assert buckets.take("a", 2.0, 3.0) == 0.25, "the seconds until there is a token"
    clock.now += 0.25
    assert (buckets.take("a", 2.0, 3.0), buckets.take("a", 2.0, 3.0)) == (0.0, 0.5)
    clock.now += 3600
    assert [buckets.take("a", 2.0, 3.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5], "it is never more than full"


@given(st.lists(st.floats(0, 5), max_size=60), st.floats(0.1, 10), st.floats(1, 20))
def test_no_more_events_pass_than_the_bucket_has_had(pauses: list[float], rate: float, burst: float) -> None:
    """And none is refused without need: after the seconds that a refusal names, one passes."""
    clock = Clock()
    buckets, passed, begun = Buckets(clock=clock), 0, clock.now
    for pause in pauses:
        clock.now += pause
        wait = buckets.take("a", rate, burst)
        passed += wait == 0.0
        assert passed <= burst + rate * (clock.now - begun) + 1e-6
        if wait:
            clock.now += wait + 1e-6
            assert buckets.take("a", rate, burst) == 0.0
            passed += 1


def test_a_limit_that_was_lowered_holds_at_once() -> None:
    buckets = Buckets(clock=Clock())
    buckets.take("a", 100.0, 200.0)
    assert [buckets.take("a", 1.0, 2.0) == 0.0 for _ in range(3)] == [True, True, False]


def test_the_memory_of_buckets_is_bounded_whatever_sources_appear() -> None:
    buckets = Buckets(100, Clock())
    buckets.take("first", 1.0, 1.0)
    for number in range(10_000):
        buckets.take(number, 1.0, 1.0)
        assert len(buckets) <= 100
    assert buckets.take(9_999, 1.0, 1.0) == 1.0, "those of now are known"
    assert buckets.take("first", 1.0, 1.0) == 0.0, "the one that was used longest ago is forgotten, and full"


def test_rates_of_principals_tenants_and_sources() -> None:
    clock = Clock()
    rates = Rates(5, clock)
    checks: list[Callable[[], None]] = [lambda: rates.check_principal("ann"), lambda: rates.check_tenant("ann", 5)]
    for check in checks:
        for _ in range(int(5 * BURST)):
            check()
        with pytest.raises(TooManyRequests, match="more than 5 requests a second; hint: try again in 1 s") as refused:
            check()
        assert refused.value.retry_after == 1
    rates.check_principal("ben")
    rates.check_tenant("acme", None)
    for _ in range(1000):
        Rates(None, clock).check_principal("ann")
    for _ in range(int(Rates.FAILURES_BURST)):
        rates.check_failure("uid 7")
    with pytest.raises(TooManyRequests):
        rates.check_failure("uid 7")
    rates.check_failure("uid 8")
    clock.now += 1.0
    rates.check_failure("uid 7")


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.0/24"),
        ("192.0.2.255", "192.0.2.0/24"),
        ("::ffff:192.0.2.9", "192.0.2.0/24"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_the_source_of_a_client(address: str, source: str) -> None:
    assert network_of(ClientRecord(address, 1, "TLSv1.3", None), None) == source


def test_the_source_of_a_process_is_its_user() -> None:
    assert network_of(None, STRANGER) == "uid 1000" != network_of(None, NEIGHBOUR)


# -- authentication ------------------------------------------------------------------------------------------------


class Door:
    """`AccessMiddleware` before an application that answers 204."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, user_requests: float | None = None) -> None:
        monkeypatch.setattr(access, "group_id", lambda: None)
        self.clock = Clock()
        self.cache = IdentityCache(cast(Any, None))
        self.rates = Rates(user_requests, self.clock)
        self.access = AccessMiddleware(self._application, self.cache, self.rates)
        text, parsed = generate()
        ann = Principal(id="1", name="ann", uid=2000, created=0.0)
        token = Token(id=parsed.id, principal="1", digest=parsed.digest, created=0.0, expires=1e12)
        self.cache.take([PRINCIPALS.put(ann, "_", "ann"), TOKENS.put(token, token.id)], 1)
        self.valid, self.existing = text, parsed.id

    async def _application(self, _scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def knock(
        self, peer: Peer, token: str | None, client: ClientRecord | None = None, path: str = "/"
    ) -> dict[str, Any]:
        """The answer: status, fields and body."""
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError

        state = {"stopping": asyncio.Event(), "peer": peer, **({"client": client} if client else {})}
        headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        scope: Any = {"type": "http", "state": state, "headers": headers, "method": "GET", "path": path}
        await self.access(scope, receive, send)
        fields = dict(sent[0]["headers"])
        return {"status": sent[0]["status"], "fields": fields, "body": sent[-1]["body"]}


def wrong(token_id: str) -> str:
    """A well-formed token with this ID, and a secret that nobody has."""
    body = f"insula_{token_id}_{secrets.token_urlsafe(32)}"
    return f"{body}_{zlib.crc32(body.encode()):08x}"


def test_failed_proofs_are_limited_by_source_and_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown token, and a wrong secret of one that exists, have the same answers; nobody else is locked out."""
    door = Door(monkeypatch)

    async def main() -> None:
        seen = []
        for number in range(int(Rates.FAILURES_BURST) + 20):
            answer = await door.knock(STRANGER, wrong(door.existing if number % 2 else "0" * 16))
            seen.append((answer["status"], number % 2, answer["body"], answer["fields"].get(b"retry-after")))
        most = int(Rates.FAILURES_BURST)
        assert [status for status, *_ in seen] == [401] * most + [429] * 20
        assert len({body for status, _, body, _ in seen if status == 429}) == 1, "whichever token it was"
        assert {after for status, *_, after in seen if status == 429} == {b"1"}
        assert (await door.knock(STRANGER, None))["status"] == 429, "also without a proof, where it was 403"
        assert (await door.knock(STRANGER, door.valid))["status"] == 204, "who has a proof is not locked out"
        assert (await door.knock(NEIGHBOUR, wrong("0" * 16)))["status"] == 401
        assert (await door.knock(Peer(4, 2000, 2000), None))["status"] == 204
        door.clock.now += 1.0
        assert (await door.knock(STRANGER, wrong("0" * 16)))["status"] == 401
        assert (await door.knock(STRANGER, wrong("0" * 16)))["status"] == 429

    asyncio.run(main())


def test_failures_of_the_network_are_counted_by_network(monkeypatch: pytest.MonkeyPatch) -> None:
    door, gate = Door(monkeypatch), Peer(9, 61007, 61007)

    async def main() -> None:
        def at(address: str) -> ClientRecord:
            return ClientRecord(address, 1, "TLSv1.3", None)

        for number in range(int(Rates.FAILURES_BURST)):
            assert (await door.knock(gate, "x", at(f"192.0.2.{number}")))["status"] == 401
        assert (await door.knock(gate, "x", at("192.0.2.250")))["status"] == 429
        assert (await door.knock(gate, "x", at("192.0.3.1")))["status"] == 401
        assert (await door.knock(gate, door.valid, at("192.0.2.250")))["status"] == 204

    asyncio.run(main())


def test_requests_without_a_proof_are_limited_by_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that anybody may send, to learn how to sign in."""
    door, gate = Door(monkeypatch), Peer(9, 61007, 61007)

    async def main() -> None:
        def at(address: str) -> ClientRecord:
            return ClientRecord(address, 1, "TLSv1.3", None)

        most = int(BURST * Rates.ANONYMOUS)
        statuses = [(await door.knock(gate, None, at("192.0.2.1"), access.LOGIN))["status"] for _ in range(most + 5)]
        assert statuses == [204] * most + [429] * 5
        assert (await door.knock(gate, None, at("192.0.3.1"), access.LOGIN))["status"] == 204
        assert (await door.knock(gate, door.valid, at("192.0.2.1"), access.LOGIN))["status"] == 204

    asyncio.run(main())


def test_the_operator_is_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(monkeypatch, user_requests=1)

    async def main() -> None:
        statuses = {(await door.knock(ROOT, None))["status"] for _ in range(200)}
        assert statuses == {204}
        statuses = {(await door.knock(ROOT, "x"))["status"] for _ in range(200)}
        assert statuses == {401}, "its own wrong tokens neither"
        ann = [(await door.knock(STRANGER, door.valid))["status"] for _ in range(5)]
        assert ann == [204, 204, 429, 429, 429], "the control"

    asyncio.run(main())


def test_a_user_is_refused_beyond_its_rate_whatever_its_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(monkeypatch, user_requests=3)

    async def main() -> None:
        by_token = [(await door.knock(NEIGHBOUR, door.valid))["status"] for _ in range(6)]
        refused = await door.knock(Peer(1, 2000, 2000), None)
        assert by_token == [204] * 6 and refused["status"] == 429 and refused["fields"][b"retry-after"] == b"1"
        assert json.loads(refused["body"])["message"] == "you send more than 3 requests a second"

    asyncio.run(main())


# -- slow clients --------------------------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "HEAD", 0.3)
    monkeypatch.setattr(patience, "BODY", 0.3)


def drip(sock: socket.socket, piece: bytes, ended: threading.Event) -> None:
    """Send a byte every few milliseconds, as slowloris does."""
    while not ended.wait(0.02):
        try:
            sock.sendall(piece)
        except OSError:
            return


def received_until_closed(sock: socket.socket) -> bytes:
    sock.settimeout(patiently(20))
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


@pytest.fixture
def sock(stub: StubDaemon) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(stub.path))
        yield sock


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"", b""),  # silence
        (b"GET /v1/tenants HTTP/1.1\r\nhost: x\r\n", b"x-a: b\r\n"),  # a head without end
        (b"GET /v1/tenants HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n", b"x"),  # a body that nobody reads
    ],
)
def test_a_connection_whose_next_head_does_not_come_is_closed(
    first: bytes, piece: bytes, hurried: None, sock: socket.socket
) -> None:
    """Bytes that arrive now and then do not prolong it."""
    sock.sendall(first)
    ended = threading.Event()
    thread = threading.Thread(target=drip, args=(sock, piece, ended))
    if piece:
        thread.start()
    received_until_closed(sock)  # it ends: else the socket's time-out is raised
    ended.set()
    if piece:
        thread.join()


def test_a_body_that_does_not_come_is_refused(hurried: None, sock: socket.socket, stub: StubDaemon) -> None:
    head = b"POST /v1/tenants HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"
    sock.sendall(head)
    ended = threading.Event()
    thread = threading.Thread(target=drip, args=(sock, b" ", ended))
    thread.start()
    answer = received_until_closed(sock)
    ended.set()
    thread.join()
    assert answer.startswith(b"HTTP/1.1 400") and b"did not come within" in answer
    stub.client.tenants.create("quick")  # the control


def test_a_request_that_takes_long_is_not_closed(hurried: None, stub: StubDaemon) -> None:
    """An instance that runs for longer than any head may take."""
    stub.client.tenants.create("acme")
    stub.client.instances.run("acme", "x", ["sleep", "1"], name="web")
    assert stub.client.instances.wait("acme", "web")["exit_status"] == 0


def test_an_upload_must_bring_something(stub: StubDaemon, sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALL", 0.3)
    monkeypatch.setattr(patience, "HEAD", 0.3)
    stub.client.tenants.create("acme")
    stub.client.instances.run("acme", "x", ["sleep", "60"], name="web")
    head = b"PUT /v1/tenants/acme/instances/web/archive?path=/ HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\n"
    sock.sendall(head)
    ended = threading.Event()
    thread = threading.Thread(target=drip, args=(sock, b"x", ended))
    thread.start()
    answer = received_until_closed(sock)
    ended.set()
    thread.join()
    assert answer.startswith(b"HTTP/1.1 400") and b"send it faster" in answer
    stub.client.instances.archive_put("acme", "web", "/", [b"quick"])  # the control
    assert stub.plane.instances.uploads["/"] == b"quick"


def test_an_answer_that_nobody_reads_is_dropped(
    stub: StubDaemon, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if requests follow at once (pipelining), whose answers wait behind it."""
    monkeypatch.setattr(patience, "STALL", 0.3)
    request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
    sock.sendall(request * 20)
    poll = select.poll()
    poll.register(sock, 0)
    assert [(sock.fileno(), select.POLLHUP)] == poll.poll(patiently(20) * 1000), "the server has closed it"
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(stub.path))
        reader.sendall(request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert received_until_closed(reader).endswith(b"}"), "the control"


def test_bodies_in_memory_are_limited_by_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MOST_BODIES", 1000)
    held: Counter[str] = Counter()

    def request(sender: str | None, size: int) -> Patient:
        pieces = iter([b"x" * (size - 1), b"x"])

        async def receive() -> Any:
            return {"type": "http.request", "body": next(pieces), "more_body": True}

        return Patient(receive, {}, held, sender)

    async def main() -> None:
        first, second = request("ann", 600), request("ann", 600)
        assert len((await first())["body"]) == 599
        with pytest.raises(TooManyRequests, match="not answered yet"):
            await second()
        for other in ("bob", None):  # None is the operator
            for _ in range(2):
                await request(other, 500)()
        second.close()
        first.close()
        assert len((await request("ann", 1000)())["body"]) == 999

    asyncio.run(main())


def test_a_request_is_garbage_when_it_has_ended() -> None:
    """At once, with its body: a full collection comes after some thousand requests of a megabyte each."""

    class Body(bytearray):
        pass

    def request(*, ended: bool) -> weakref.ref[Body]:
        body = Body()
        scope: Any = {"method": "POST", "path": "/v1/tenants", "headers": [], "state": {"body": body}}
        entry = AuditedRequest(None, scope, None, "", Outbox(cast(Any, None), cast(Any, None)))
        if ended:
            entry.end()
        return weakref.ref(body)

    gc.disable()
    try:
        found = [contextvars.Context().run(request, ended=ended) for ended in (True, False)]
        assert [each() is None for each in found] == [True, False], "the second is the control"
    finally:
        gc.enable()
