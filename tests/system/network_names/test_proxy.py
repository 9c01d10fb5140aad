"""Connections to ports 443 and 80 of leased addresses: the name inside must be one that the address is leased for."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import threading
from pathlib import Path

import pytest

from insula.kernel.netns import call_in
from insula.network.names import wire
from insula.network.names.rules import NameRule
from tests.support.internet import (
    TcpServer,
    addresses_in,
    alias_record,
    ask,
    certificate,
    echo,
    family_of,
    greeting,
    http,
    tls_echo,
    tls_greeting,
)
from tests.support.lab import isolated
from tests.support.names_world import SITES, NamesWorld, https
from tests.support.wait import patiently
from tests.unit.test_names_checks import extension, hello, hello_of_openssl, records, sni

SITE, OTHER, SITE6 = SITES[0], SITES[1], "2606:2800::1"
NAMES = ("api.example.com", "www.example.com")


def world(*rules: NameRule) -> NamesWorld:
    """A server of TLS and HTTP at each site; api is at the first, www at the other."""
    w = NamesWorld()
    w.allow(*(rules or (https("*.example.com", 80, 443),)))
    w.server.names(NAMES[0], SITE, SITE6)
    w.server.names(NAMES[1], OTHER)
    paths = certificate(Path("/run"), *NAMES)
    for address in (SITE, OTHER, SITE6):
        TcpServer(w.internet, address, 443, tls_echo(paths))
        TcpServer(w.internet, address, 80, http)
    for name in NAMES:
        ask(w.client, name)
        ask(w.client, name, wire.AAAA)
    return w


def connect(w: NamesWorld, address: str, port: int) -> socket.socket:
    sock: socket.socket = call_in(w.client, lambda: socket.socket(family_of(address), socket.SOCK_STREAM))
    sock.settimeout(patiently(5))
    sock.connect((address, port))
    return sock


def talk(w: NamesWorld, address: str, port: int, *pieces: bytes, timeout: float = 5.0) -> bytes:
    """Send pieces, one segment each, and return what comes back before the end; b"reset" if that is a reset."""
    with connect(w, address, port) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(patiently(timeout))
        got = b""
        try:
            for piece in pieces:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65536):
                got += data
        except TimeoutError:
            return got
        except OSError:  # a reset, or what follows from one
            return b"reset"
        return got


@isolated
def test_tls_goes_through_by_its_name_alone() -> None:
    w = world()
    for address in (SITE, SITE6):
        assert tls_greeting(w.client, address, NAMES[0]) == NAMES[0]
        assert tls_greeting(w.client, address, NAMES[0].upper()) == NAMES[0].upper()
        for wrong in (NAMES[1], "other.example.com", "evil.test", None):
            assert tls_greeting(w.client, address, wrong) is None, wrong
    assert tls_greeting(w.client, OTHER, NAMES[1]) == NAMES[1]
    assert tls_greeting(w.client, SITES[2], NAMES[0]) is None, "an address that nobody has asked for"


@isolated
def test_the_certificate_is_the_server_s_own() -> None:
    w = world()
    context = ssl.create_default_context(cafile="/run/certificate.pem")
    with context.wrap_socket(connect(w, SITE, 443), server_hostname=NAMES[0]) as wrapped:
        assert wrapped.recv(100).decode().strip() == NAMES[0] and wrapped.version() == "TLSv1.3"
        for size in (1, 1000, 1 << 20):
            data = os.urandom(size)
            got = b""
            for start in range(0, size, 1 << 14):  # not by two threads: OpenSSL's connections are for one at a time
                wrapped.sendall(data[start : start + (1 << 14)])
                while len(got) < min(size, start + (1 << 14)):
                    got += wrapped.recv(65536)
            assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


@isolated
def test_an_alias_of_the_chain_is_a_name_of_the_address_only_if_a_rule_allows_it() -> None:
    w = world(https("*.example.com"))
    w.server.records = [alias_record(NAMES[0], "b.example.com"), alias_record("b.example.com", "cdn.test")]
    w.server.names("cdn.test", SITE)
    ask(w.client, NAMES[0])
    assert tls_greeting(w.client, SITE, "b.example.com") == "b.example.com"
    assert tls_greeting(w.client, SITE, "cdn.test") is None


@pytest.mark.parametrize("step", [1, 1400])
@isolated
def test_a_hello_may_come_in_pieces_and_the_name_late_in_it(step: int) -> None:
    w = world()
    data = hello_of_openssl(NAMES[0])
    late = records(hello(extension(51, bytes(1700)), extension(0xFE0D, bytes(100)), sni(NAMES[0].encode())), 900)
    for each in (data, late):
        answer = talk(w, SITE, 443, *(each[at : at + step] for at in range(0, len(each), step)))
        assert answer[:1] in (b"\x16", b"\x15"), "the server has answered, if only by an alert"


@isolated
def test_what_is_no_tls_with_a_name_is_reset() -> None:
    w = world()
    for data in (
        b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
        b"SSH-2.0-x\r\n",
        hello_of_openssl(None),
        records(hello(sni(b"evil.test"), extension(0xFE0D, bytes(200)))),
        records(hello(sni(b"api.example.com"), sni(b"evil.test"))),
        records(hello(extension(21, bytes(16300)), sni(b"api.example.com"))),
        hello_of_openssl("api.example.com")[:50],
    ):
        assert talk(w, SITE, 443, data) == b"reset", data[:40]


@isolated
def test_who_says_nothing_waits_for_no_ever_and_disturbs_nobody() -> None:
    w = world()
    silent = [connect(w, SITE, 443) for _ in range(200)]
    assert tls_greeting(w.client, SITE, NAMES[0]) == NAMES[0]
    for sock in silent:
        sock.close()


@isolated
def test_every_request_of_http_is_checked() -> None:
    w = world()

    def get(host: str, path: str = "/", more: str = "") -> bytes:
        return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode()

    assert talk(w, SITE, 80, get(NAMES[0], "/a")).endswith(b"api.example.com /a ")
    assert talk(w, SITE, 80, get(NAMES[0]) + get(NAMES[0], "/2")).count(b"200 OK") == 2
    post = b"POST /p HTTP/1.1\r\nHost: api.example.com:80\r\nContent-Length: 5\r\n\r\nhello"
    assert talk(w, SITE6, 80, post, get(NAMES[0])).count(b"200 OK") == 2
    for wrong in (
        get("evil.test"),
        get(NAMES[1]),
        get(NAMES[0], more="Host: evil.test\r\n"),
        get(NAMES[0], "http://evil.test/"),
        get(f"{NAMES[0]}:8080"),
        get(SITE),
        get(NAMES[0], more="Upgrade: websocket\r\n"),
        b"GET / HTTP/1.0\r\n\r\n",
        b"CONNECT evil.test:443 HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
        hello_of_openssl(NAMES[0]),
    ):
        assert talk(w, SITE, 80, wrong) == b"reset", wrong
    with connect(w, SITE, 80) as sock:  # a second request, on a connection that was allowed
        sock.sendall(get(NAMES[0]))
        assert b"200 OK" in sock.recv(1000)
        sock.sendall(get("evil.test", "/stolen"))
        with pytest.raises(ConnectionResetError):
            while not sock.recv(1000):
                raise ConnectionResetError


@isolated
def test_quic_and_other_ports_stay_closed() -> None:
    w = world(https("*.example.com"), NameRule("*.example.com", "udp"))
    seen: list[int] = []
    for port in (443, 853, 5000):
        server = call_in(w.internet, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        server.bind((SITE, port))

        def serve(server: socket.socket = server, port: int = port) -> None:
            while True:
                data, peer = server.recvfrom(100)
                seen.append(port)
                server.sendto(data, peer)

        threading.Thread(target=serve, daemon=True).start()
    for port in (443, 853, 5000):
        with call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            sock.settimeout(patiently(0.5))
            sock.connect((SITE, port))
            try:
                sock.send(b"x")
                sock.recv(10)
            except OSError:
                assert port != 5000
    assert seen == [5000], "all ports of UDP are those that can be judged"
    w.allow(https("*.example.com"), NameRule("*.example.com", "udp", (443,)))
    with call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(patiently(3))
        sock.connect((SITE, 443))
        sock.send(b"x")
        assert sock.recv(10) == b"x", "who wants QUIC writes its port"


@isolated
def test_a_rule_that_goes_cuts_its_connections_and_no_others() -> None:
    w = world(https("api.example.com"), https("www.example.com"))
    context = ssl.create_default_context(cafile="/run/certificate.pem")
    kept = context.wrap_socket(connect(w, OTHER, 443), server_hostname=NAMES[1])
    lost = context.wrap_socket(connect(w, SITE, 443), server_hostname=NAMES[0])
    for sock, name in ((kept, NAMES[1]), (lost, NAMES[0])):
        assert sock.recv(100).decode().strip() == name
    w.allow(https("www.example.com"))
    with pytest.raises(OSError):
        lost.sendall(b"x")
        assert lost.recv(10) != b"x"
        raise ConnectionResetError
    kept.sendall(b"still here")
    assert kept.recv(100) == b"still here"
    w.allow()
    with pytest.raises(OSError):
        kept.sendall(b"x")
        assert kept.recv(10) == b""
        raise ConnectionResetError


@isolated
def test_servers_that_do_not_answer_or_end() -> None:
    w = world(https("*.example.com"))
    w.server.names("closed.example.com", SITES[3])
    ask(w.client, "closed.example.com")
    assert talk(w, SITES[3], 443, hello_of_openssl("closed.example.com")) == b"reset", "nobody listens there"
    TcpServer(w.internet, SITES[4], 443, lambda sock: sock.sendall(b"bye" * 100_000))
    w.server.names("ends.example.com", SITES[4])
    ask(w.client, "ends.example.com")
    assert talk(w, SITES[4], 443, hello_of_openssl("ends.example.com")) in (b"bye" * 100_000, b"reset")
    received: list[bytes] = []

    def swallow(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            received.append(data)
        sock.sendall(b"%d" % sum(map(len, received)))

    TcpServer(w.internet, SITES[5], 443, swallow)
    w.server.names("half.example.com", SITES[5])
    ask(w.client, "half.example.com")
    first = hello_of_openssl("half.example.com")
    answer = talk(w, SITES[5], 443, first, bytes(3_000_000), timeout=20)
    assert answer == b"%d" % (3_000_000 + len(first)), "a half that is closed is closed on the other side, and no more"


@isolated
def test_a_server_gets_nothing_of_what_is_refused() -> None:
    w = world(https("*.example.com", 443, 80))
    received: list[bytes] = []
    for port in (443, 80):
        TcpServer(w.internet, SITES[7], port, lambda sock: received.append(sock.recv(65536)))
    w.server.names("heard.example.com", SITES[7])
    ask(w.client, "heard.example.com")
    for port, refused in ((443, hello_of_openssl(NAMES[0])), (80, b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n")):
        assert talk(w, SITES[7], port, refused) == b"reset"
    good = hello_of_openssl("heard.example.com")
    talk(w, SITES[7], 443, good)
    assert [each for each in received if each] == [good], "the control"


@isolated
def test_nobody_reaches_the_gate_past_the_rules() -> None:
    w = world()
    for address in ("192.0.2.53", "2001:db8:53::53", "10.0.0.1", "fd00::1"):
        for port in (5380, 5381):
            assert greeting(w.client, address, port, timeout=patiently(0.3)) is None
    assert addresses_in(ask(w.client, NAMES[0], server="192.0.2.53", timeout=patiently(1))) == [SITE], "it is port 53"
    TcpServer(w.internet, SITES[6], 443, echo)
    assert greeting(w.client, SITES[6], 443) is None
