"""Requests whose bounds are not clear, on the operator's socket, the users' socket and through the gate of HTTPS.

Each is followed by a second request in the same bytes. What is refused has one answer, and then the end of the
connection: what follows is never taken for a request.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from insula.api.framing import MAX_HEAD
from insula.api.tls.certificates import Certificates
from insula.kernel.netns import call_in
from tests.support.cloud import API, PORT
from tests.support.daemon import Daemon
from tests.support.machine import Run
from tests.support.wait import patiently, until

SECOND = b"GET /second HTTP/1.1\r\nHost: insula\r\nConnection: close\r\n\r\n"
WAYS = ("operator", "users", "https")


def get(*fields: str, target: str = "/v1/login", method: str = "GET", version: str = "1.1", host: bool = True) -> bytes:
    lines = [f"{method} {target} HTTP/{version}", *(["Host: insula"] if host else []), *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


CHUNKED = "Transfer-Encoding: chunked"
CLEAR = {
    "plain": get(),
    "length": get("Content-Length: 5") + b"hello",
    "chunks": get(CHUNKED) + b"5\r\nhello\r\n0\r\n\r\n",
    "chunk-extension": get(CHUNKED) + b'5;name="a value"\r\nhello\r\n0;last\r\n\r\n',
    "trailer": get(CHUNKED) + b"0\r\nX-Sum: 1\r\n\r\n",
    "absolute": get(target="http://insula/v1/login"),
    "absolute-of-another-host": get(target="HTTPS://other.example:7443/v1/login"),
    "absolute-with-query": get(target="http://insula/v1/login?a=http://b/"),
    "host-with-port": get("Host: insula:7443", host=False),
    "host-ipv6": get("Host: [2001:db8::1]:7443", host=False),
    "empty-host": get("Host:", host=False),
    "long-target": get(target="/v1/login?" + "a" * (MAX_HEAD - 1000)),
}
UNCLEAR: dict[str, tuple[bytes, int]] = {
    "length-and-chunks": (get("Content-Length: 5", CHUNKED) + b"0\r\n\r\n", 400),
    "chunks-and-length": (get(CHUNKED, "Content-Length: 5") + b"0\r\n\r\n", 400),
    "two-lengths": (get("Content-Length: 5", "Content-Length: 0") + b"hello", 400),
    "the-same-length-twice": (get("Content-Length: 5", "content-length: 5") + b"hello", 400),
    "list-of-lengths": (get("Content-Length: 5, 5") + b"hello", 400),
    "signed-length": (get("Content-Length: +5") + b"hello", 400),
    "negative-length": (get("Content-Length: -1"), 400),
    "length-of-hex": (get("Content-Length: 0x5") + b"hello", 400),
    "length-with-space": (get("Content-Length: 5 0") + b"hello", 400),
    "no-length": (get("Content-Length:"), 400),
    "unknown-coding": (get("Transfer-Encoding: gzip"), 501),
    "coding-after-chunked": (get("Transfer-Encoding: chunked, gzip"), 501),
    "chunked-twice": (get(CHUNKED, CHUNKED) + b"0\r\n\r\n", 501),
    "hidden-chunked": (get("Transfer-Encoding: xchunked"), 501),
    "chunked-with-control": (get("Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n", 400),
    "chunks-of-1.0": (get(CHUNKED, version="1.0") + b"0\r\n\r\n", 400),
    "folded": (get("X-A: a", " b"), 400),
    "folded-length": (get("X-A: a", "\tContent-Length: 5") + b"hello", 400),
    "fold-first": (get(" X-A: a", host=False), 400),
    "bare-line-feed": (get().replace(b"\r\n", b"\n"), 400),
    "one-bare-line-feed": (get("X-A: a\nContent-Length: 5") + b"hello", 400),
    "bare-carriage-return": (get("X-A: a\rContent-Length: 5") + b"hello", 400),
    "space-before-colon": (get("Content-Length : 5") + b"hello", 400),
    "tab-before-colon": (get("Transfer-Encoding\t: chunked") + b"0\r\n\r\n", 400),
    "no-colon": (get("Content-Length"), 400),
    "no-name": (get(": 5"), 400),
    "nul-in-value": (get("X-A: a\0b"), 400),
    "nul-in-name": (get("X-\0A: a"), 400),
    "nul-in-target": (get(target="/v1/\0login"), 400),
    "control-in-value": (get("X-A: a\x01b"), 400),
    "delete-in-value": (get("X-A: a\x7fb"), 400),
    "no-host": (get(host=False), 400),
    "two-hosts": (get("Host: insula"), 400),
    "bad-host": (get("Host: in sula", host=False), 400),
    "host-with-path": (get("Host: insula/x", host=False), 400),
    "host-list": (get("Host: insula, other", host=False), 400),
    "connect": (get(method="CONNECT", target="insula:443"), 400),
    "authority": (get(target="insula:443"), 400),
    "asterisk": (get(target="*"), 400),
    "other-scheme": (get(target="ftp://insula/v1/login"), 400),
    "no-authority": (get(target="http:///v1/login"), 400),
    "relative": (get(target="v1/login"), 400),
    "space-in-target": (get(target="/v1/login /x"), 400),
    "two-spaces": (get().replace(b" HTTP", b"  HTTP"), 400),
    "letters-in-target": (get(target="/v1/l\xf6gin"), 400),
    "version-2": (get(version="2.0"), 505),
    "version-0.9": (b"GET /v1/login\r\n\r\n", 400),
    "lower-case-http": (get().replace(b"HTTP/1.1", b"http/1.1"), 400),
    "huge-target": (get(target="/" + "a" * (2 * MAX_HEAD)), 414),
    "huge-field": (get("X-A: " + "a" * (2 * MAX_HEAD)), 431),
    "many-fields": (get(*["X-A: a"] * (MAX_HEAD // 4)), 431),
    "no-http": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
}

BROKEN_BODIES = {
    "chunk-without-size": get(CHUNKED) + b"\r\nhello\r\n0\r\n\r\n",
    "chunk-of-0x": get(CHUNKED) + b"0x5\r\nhello\r\n0\r\n\r\n",
    "chunk-longer": get(CHUNKED) + b"4\r\nhello\r\n0\r\n\r\n",
    "chunk-line-feed": get(CHUNKED) + b"5\nhello\n0\n\n" + b"\r\n",
    "chunk-extension-line-feed": get(CHUNKED) + b"5;\na\r\nhello\r\n0\r\n\r\n",
}


class Exchange(NamedTuple):
    """Sends bytes by one of the ways, and returns all that comes back until the end of the connection."""

    daemon: Daemon
    way: str

    def __call__(self, data: bytes) -> bytes:
        with self.connected() as sock:
            answer = b""
            try:
                sock.sendall(data)
                while piece := sock.recv(65536):
                    answer += piece
            except (ConnectionError, ssl.SSLError):  # it was closed before all was sent
                pass
            return answer

    def connected(self) -> socket.socket:
        if self.way == "https":
            context = ssl.create_default_context(
                cadata=Certificates(self.daemon.root / "pki").trusted("server").decode()
            )
            fd = os.open(self.daemon.namespaces.host, os.O_RDONLY | os.O_CLOEXEC)
            try:
                plain = call_in(fd, lambda: socket.create_connection(("127.0.0.1", PORT), patiently(30)))
            finally:
                os.close(fd)
            return context.wrap_socket(plain, server_hostname="127.0.0.1")
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(patiently(30))
        sock.connect(os.fspath(self.daemon.run / ("insulad.sock" if self.way == "operator" else "users.sock")))
        return sock


@pytest.fixture(scope="module")
def served(run_: Run) -> Iterator[Daemon]:
    """A daemon with HTTPS, whose directories the gate can enter."""
    daemon = Daemon(run_)
    mode = daemon.path.parent.stat().st_mode & 0o7777
    try:
        for path in (daemon.path.parent, daemon.path):
            path.chmod(0o711)
        daemon.configure(API)
        daemon.start()
        until(lambda: heads(Exchange(daemon, "https")(get("Connection: close"))) == [200], "the gate answers")
        yield daemon
    finally:
        daemon.remove()
        daemon.path.parent.chmod(mode)


@pytest.fixture(params=WAYS)
def exchange(served: Daemon, request: pytest.FixtureRequest) -> Exchange:
    return Exchange(served, request.param)


def heads(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def test_what_is_clear_is_answered_and_the_next_request_too(exchange: Exchange) -> None:
    found = {name: heads(exchange(data + SECOND)) for name, data in CLEAR.items()}
    assert found == {name: [200, unknown(exchange)] for name in CLEAR}


def unknown(exchange: Exchange) -> int:
    """The answer to a request for what isn't there; by HTTPS it lacks a proof."""
    return 401 if exchange.way == "https" else 404


def problem(answer: bytes) -> Any:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head and b"connection: close" in head
    return json.loads(body)


def test_what_is_not_clear_is_refused_and_nothing_after_it_is_read(exchange: Exchange) -> None:
    """A client that still sends when the connection ends may not get the answer (RFC 9112, 9.6): through the gate."""
    answers = {name: exchange(data + SECOND) for name, (data, _) in UNCLEAR.items()}
    if exchange.way == "https":
        answers = {name: each for name, each in answers.items() if each or len(UNCLEAR[name][0]) < MAX_HEAD}
    assert {name: heads(each) for name, each in answers.items()} == {name: [UNCLEAR[name][1]] for name in answers}
    for name, each in answers.items():
        found = problem(each)
        assert (found["code"], found["status"]) == ("Invalid", UNCLEAR[name][1]), name
        assert found["detail"].startswith("this is not a valid HTTP request: ") and len(found["detail"]) < 150, name


def test_a_body_that_is_not_clear_ends_the_connection(exchange: Exchange) -> None:
    """Its request may have been answered before the fault came."""
    answers = {name: heads(exchange(data + SECOND)) for name, data in BROKEN_BODIES.items()}
    assert {name: found for name, found in answers.items() if found not in ([400], [200])} == {}


def test_http_1_0_is_answered_and_closed(exchange: Exchange) -> None:
    """There is no persistent connection of HTTP/1.0, whatever the client asks for (RFC 9112, 9.3)."""
    assert heads(exchange(get("Connection: keep-alive", version="1.0") + SECOND)) == [200]
    assert heads(exchange(get(version="1.0", host=False) + SECOND)) == [200]


def test_the_asterisk_is_no_object(exchange: Exchange) -> None:
    assert heads(exchange(get("Connection: close", method="OPTIONS", target="*"))) == [unknown(exchange)]


def test_secrets_of_a_refused_request_are_not_quoted(exchange: Exchange) -> None:
    answer = exchange(get("Authorization : Bearer insula_secret"))
    assert heads(answer) == [400] and b"insula_secret" not in answer


def test_a_malformed_chunk_in_the_midst_of_an_answer_only_ends_it(served: Daemon) -> None:
    """No second head is put into the stream of an answer that has begun."""
    with Exchange(served, "operator").connected() as sock:
        sock.sendall(get(CHUNKED, target="/v1/events"))
        assert sock.recv(12) == b"HTTP/1.1 200"
        sock.sendall(b"zz\r\n")
        rest = b""
        while piece := sock.recv(65536):
            rest += piece
    assert b"HTTP/1.1" not in rest and not rest.endswith(b"0\r\n\r\n")
