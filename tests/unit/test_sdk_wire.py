"""The SDK's HTTP and TLS: answers in any pieces, what is no answer, servers that say nothing, many threads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from insula.api.tls.certificates import Certificates
from insula.client.http import chunk
from insula.model.errors import Denied, Failed, InsulaError, Unavailable
from insula.model.stream import Kind, encode
from insula.sdk import (
    AsyncHTTPSTransport,
    AsyncInsula,
    HTTPRequest,
    HTTPSTransport,
    InstanceSpec,
    Insula,
    UnixTransport,
)
from insula.sdk._async import http as for_tasks
from insula.sdk._sync import http as for_threads
from insula.sdk._sync.calls import Caller
from insula.sdk._sync.http import HTTPExchange, HTTPTransport
from insula.sdk._sync.items import log_outputs
from insula.sdk._sync.process import AttachedProcess
from tests.support.wait import patiently
from tests.unit.conftest import StubDaemon

HEAD = b"HTTP/1.1 200 OK\r\n"


class Pieces:
    """A connection from which pieces are read, and whose transport keeps it or closes it."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = list(pieces)
        self.written = b""
        self.ended = ""

    def read(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def write(self, data: bytes) -> bool:
        self.written += data
        return True

    def keep(self, _: object) -> None:
        self.ended = "kept"

    def shut(self) -> None:
        self.ended = "closed"


def exchange(pieces: list[bytes]) -> tuple[Pieces, HTTPExchange]:
    sock: Any = Pieces(pieces)
    made = HTTPExchange(sock, sock)
    made.begin(HTTPRequest("GET", "/v1/x"))
    return sock, made


def body(made: HTTPExchange) -> bytes:
    found = b""
    while piece := made.receive():
        found += piece
    return found


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [piece for start, end in pairwise(marks) if (piece := data[start:end])]


@given(st.binary(max_size=300), st.booleans(), st.booleans(), st.lists(st.integers(0, 2000), max_size=8))
def test_an_answer_is_the_same_in_any_pieces(content: bytes, chunked: bool, close: bool, places: list[int]) -> None:
    fields = b"connection: close\r\n" if close else b""
    if chunked:
        parts = b"".join(chunk(piece) for piece in cut(content, places))
        answer = HEAD + fields + b"transfer-encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"
    else:
        answer = HEAD + fields + b"content-length: %d\r\n\r\n" % len(content) + content
    sock, made = exchange(cut(answer, places))
    assert made.head().status == 200 and body(made) == content and made.receive() == b""
    made.close()
    whole = not sock.pieces  # else the last line came in a piece of its own, after the answer was known to be whole
    assert sock.ended == ("kept" if whole and not close else "closed")
    if not chunked and not close:
        assert sock.ended == "kept"


@given(st.lists(st.integers(0, 2000), max_size=8), st.integers(0, 200))
def test_an_answer_that_is_cut_off_is_never_taken_for_a_whole_one(places: list[int], end: int) -> None:
    content = b"0123456789" * 5
    for answer in (
        HEAD + b"content-length: 50\r\n\r\n" + content,
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(content) + b"0\r\n",
    ):
        sock, made = exchange(cut(answer[: end % len(answer)], places))
        with pytest.raises(Unavailable, match="closed the connection before"):
            body(made)
        made.close()
        assert sock.ended == "closed"


@given(st.lists(st.binary(max_size=60), max_size=5))
@example([HEAD + b"transfer-encoding: chunked\r\n\r\n-5\r\n"])
@example([b"HTTP/1.1 999999999 \r\n\r\n"])
@example([HEAD + b"content-length: -1\r\n\r\n"])
@example([HEAD + b"content-length: \xb2\r\n\r\n"])
def test_what_is_no_answer_is_an_error_of_insula(pieces: list[bytes]) -> None:
    sock, made = exchange(pieces)
    with contextlib.suppress(InsulaError):
        body(made)
    made.close()
    assert sock.ended


@given(st.lists(st.binary(max_size=40), max_size=5))
@example([encode(Kind.ERROR, b"not JSON")])
@example([encode(Kind.ERROR, b'{"error": ["x"], "exit_status": 3}')])
def test_what_is_no_frame_is_an_error_of_insula(pieces: list[bytes]) -> None:
    with contextlib.suppress(InsulaError):
        list(log_outputs(iter(pieces)))


def test_a_request_that_was_not_sent_whole_closes_its_connection() -> None:
    """An answer to an upload that is not over: what is left of it would be taken for another request."""
    sock: Any = Pieces([HEAD + b"content-length: 0\r\n\r\n"])
    made = HTTPExchange(sock, sock)
    made.begin(HTTPRequest("PUT", "/v1/x", body=None))
    assert made.send(b"abc") and made.send(b"")
    assert sock.written.endswith(b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
    assert body(made) == b""
    made.close()
    assert sock.ended == "closed"


def test_output_before_an_error_is_read_before_it() -> None:
    sent = encode(Kind.STDOUT, b"a") + encode(Kind.IDLE) + encode(Kind.ERROR, b'{"error": "Denied", "message": "no"}')

    class Transport(HTTPTransport):
        def open(self, request: HTTPRequest) -> HTTPExchange:
            answer = HEAD + b"content-length: %d\r\n\r\n" % len(sent) + sent
            return exchange([answer])[1]

    with AttachedProcess(Caller(Transport(), None), HTTPRequest("POST", "/v1/x")) as process:
        assert next(process).data == b"a"
        with pytest.raises(Denied, match="no"):
            next(process)


def test_an_error_ends_the_input_that_nobody_takes(tmp_path: Path) -> None:
    """The server tells an error while the client is still sending, and reads no more of it."""
    error = encode(Kind.ERROR, b'{"error": "Denied", "message": "taken"}')
    raised = threading.Event()
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "server.sock"))
        listener.listen()

        def serve() -> None:
            with closing(listener.accept()[0]) as sock:
                sock.recv(1000)
                sock.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(error) + error)
                assert raised.wait(patiently(30))

        thread = threading.Thread(target=serve)
        thread.start()
        with Insula(UnixTransport(str(tmp_path / "server.sock"), timeout=patiently(20))) as cloud:
            process = cloud.instances.exec("acme", "web", ["cat"], stdin=True)
            with pytest.raises(Denied, match="taken"):
                process.communicate(b"x" * 10_000_000)
        raised.set()
        thread.join(patiently(30))


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections, and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_says_nothing_is_given_up(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the timeout of requests is: the handshake has one of its own."""
    pem = Certificates(tmp_path).authority("server").pem.decode()
    for module in (for_tasks, for_threads):
        monkeypatch.setattr(module, "CONNECT", 0.2)
    with Insula(HTTPSTransport(silent, authority=pem)) as cloud, pytest.raises(Unavailable, match=r"within 0\.2 s"):
        cloud.identities.whoami()

    async def ask() -> None:
        async with AsyncInsula(AsyncHTTPSTransport(silent, authority=pem)) as cloud:
            await cloud.identities.whoami()

    with pytest.raises(Unavailable, match=r"within 0\.2 s"):
        asyncio.run(ask())


def test_after_the_handshake_the_timeout_of_requests_holds(tmp_path: Path) -> None:
    """A server with a good certificate that never answers; the handshake may take longer than a request."""
    certificates = Certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server(["127.0.0.1"]))
    pem, asked = certificates.authority("server").pem.decode(), threading.Event()
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"

        def serve() -> None:
            for _ in range(2):
                with context.wrap_socket(listener.accept()[0], server_side=True) as sock:
                    while sock.recv(4096):  # until the client goes
                        asked.set()

        thread = threading.Thread(target=serve)
        thread.start()
        cloud = Insula(HTTPSTransport(where, authority=pem, timeout=0.2))
        with cloud, pytest.raises(Unavailable, match=r"within 0\.2 s"):
            cloud.identities.whoami()

        async def ask() -> None:
            async with AsyncInsula(AsyncHTTPSTransport(where, authority=pem, timeout=0.2)) as cloud:
                await cloud.identities.whoami()

        with pytest.raises(Unavailable, match=r"within 0\.2 s"):
            asyncio.run(ask())
        thread.join(patiently(10))
    assert asked.is_set()


@pytest.mark.parametrize("address", ["", "host", "host:", ":7443", "host:x", "host:²"])
def test_what_is_no_address(address: str, tmp_path: Path) -> None:
    pem = Certificates(tmp_path).authority("server").pem.decode()
    with Insula(HTTPSTransport(address, authority=pem)) as cloud, pytest.raises(InsulaError, match="no address"):
        cloud.identities.whoami()


def test_what_is_no_tls(tmp_path: Path) -> None:
    pem = Certificates(tmp_path).authority("server").pem.decode()
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            for answer in (b"SSH-2.0-x\r\n", b""):
                with closing(listener.accept()[0]) as sock:
                    sock.sendall(answer)
                    sock.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(OSError):
                        while sock.recv(4096):
                            pass

        thread = threading.Thread(target=serve)
        thread.start()
        with Insula(HTTPSTransport(f"127.0.0.1:{listener.getsockname()[1]}", authority=pem)) as cloud:
            with pytest.raises(Unavailable, match="no TLS"):
                cloud.identities.whoami()
            with pytest.raises(Unavailable, match="closed the connection"):
                cloud.identities.whoami()
        thread.join(patiently(10))


# -- many at a time --------------------------------------------------------------------------------------------------


def test_threads_share_a_client(stub: StubDaemon) -> None:
    """Each gets the answers to its own requests."""
    found: list[tuple[int, str]] = []
    with Insula(UnixTransport(str(stub.path), timeout=patiently(20))) as cloud:
        for number in range(4):
            spec = InstanceSpec(image="x", name=f"i{number}", command=["sleep", "600"])
            cloud.instances.run("acme", spec)

        def work(number: int) -> None:
            for _ in range(25):
                found.append((number, cloud.instances.get("acme", f"i{number}").instance.name))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(patiently(60))
    assert sorted(found) == [(number, f"i{number}") for number in range(4) for _ in range(25)]


def test_a_failed_answer_leaves_no_connection(stub: StubDaemon) -> None:
    class Keeping(UnixTransport):
        made: list[Any]

        def connect(self) -> Any:
            self.made = [*getattr(self, "made", []), super().connect()]
            return self.made[-1]

    transport = Keeping(str(stub.path))
    with Insula(transport) as cloud:
        with pytest.raises(Failed):
            list(cloud.host.events())
        cloud.tenants.create("acme")
    assert transport.made and all(sock._sock.fileno() == -1 for sock in transport.made)
