"""Gate and lessor are killed at each step of a look-up, a connection and a change of rules: nothing opens, nothing that
was leased is lost, nothing is left, and all goes on."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

from insula.kernel.netns import call_in
from insula.network.names import wire
from insula.network.names.wire import Message
from tests.support.internet import TcpServer, addresses_in, ask, certificate, echo, greeting, tls_echo, tls_greeting
from tests.support.lab import eventually, isolated
from tests.support.names_world import CLIENT4, SITES, NamesWorld, https
from tests.support.wait import patiently
from tests.unit.test_names_checks import hello_of_openssl

SITE, PORT, NAME = SITES[0], 8443, "api.example.com"
NEXT, SILENT = SITES[1], SITES[2]


def world() -> NamesWorld:
    w = NamesWorld()
    w.allow(https("*.example.com", 443, PORT))
    w.server.names(NAME, SITE)
    w.server.names("next.example.com", NEXT)
    w.server.names("silent.example.com", SILENT)
    for address in (SITE, NEXT):
        TcpServer(w.internet, address, PORT, echo)
    TcpServer(w.internet, SITE, 443, tls_echo(certificate(Path("/run"), NAME)))
    return w


def kill(w: NamesWorld, which: str) -> None:
    """Kill one of the two; the other ends with it, so half of the steps have the one and half the other."""
    os.kill(w.pids()[["lessor", "gate"].index(which) + 1], signal.SIGKILL)


def assert_works(w: NamesWorld) -> None:
    eventually(lambda: addresses_in(ask(w.client, NAME, timeout=patiently(1))) == [SITE])
    eventually(lambda: tls_greeting(w.client, SITE, NAME) == NAME)
    assert tls_greeting(w.client, SITE, "next.example.com") is None, "not a name of this address"


def connected(w: NamesWorld, address: str) -> socket.socket:
    sock: socket.socket = call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    sock.settimeout(patiently(5))
    sock.connect((address, 443))
    return sock


def is_reset(sock: socket.socket) -> bool:
    try:
        return not sock.recv(100)
    except ConnectionResetError:
        return True


def tcp_states(w: NamesWorld, address: str) -> list[str]:
    """The states of the router's own connections to an address, as numbers of include/net/tcp_states.h."""
    packed = f"{int.from_bytes(socket.inet_aton(address), 'little'):08X}"
    lines = call_in(w.router, Path("/proc/thread-self/net/tcp").read_text).splitlines()[1:]
    return [fields[3] for fields in map(str.split, lines) if fields[2].startswith(packed)]


@isolated
def test_a_look_up() -> None:
    w = world()

    def while_upstream(query: Message, answer: Message, tcp: bool) -> Message:
        w.server.change = lambda query, answer, tcp: answer
        kill(w, "gate")
        return answer

    w.server.change = while_upstream
    assert addresses_in(ask(w.client, NAME, timeout=patiently(0.5))) == []
    assert ("api.example.com", wire.A) in w.server.asked and w.leased("leases4") == w.leased("checked4") == []
    assert_works(w)
    # the address is leased, but the client has not got the answer
    answers = f"chain o {{ type filter hook output priority 300; ip daddr {CLIENT4} udp sport {{ 53, 5380 }} drop; }};"
    w.nft.run(f"table inet held {{ {answers} }}")
    assert ask(w.client, "next.example.com", timeout=patiently(0.5)) is None
    eventually(lambda: len(w.leased("leases4")) == 2)
    kill(w, "lessor")
    w.nft.run("delete table inet held")
    assert_works(w)
    assert {(lease.address, *lease.names) for lease in w.gates.leases("acme")} == {
        (SITE, NAME), (NEXT, "next.example.com")
    }  # fmt: skip
    assert greeting(w.client, NEXT, PORT) == NEXT, "the lease is taken over"


@isolated
def test_a_connection() -> None:
    w = world()
    for name in (NAME, "silent.example.com"):
        ask(w.client, name)
    with connected(w, SITE) as sock:
        sock.sendall(hello_of_openssl(NAME)[:50])
        kill(w, "lessor")
        assert is_reset(sock), "with a part of the ClientHello"
    assert_works(w)
    with call_in(w.internet, type(w.nft)) as outside:
        drop = f"chain i {{ type filter hook input priority 0; ip daddr {SILENT} drop; }};"
        outside.run(f"table inet silent {{ {drop} }}")
    with connected(w, SILENT) as sock:
        sock.sendall(hello_of_openssl("silent.example.com"))
        eventually(lambda: tcp_states(w, SILENT) == ["02"])  # SYN_SENT
        kill(w, "gate")
        assert is_reset(sock), "while the server is connected to"
    eventually(lambda: tcp_states(w, SILENT) == [])
    assert_works(w)
    ended = threading.Event()

    def until_the_end(sock: socket.socket) -> None:
        try:
            while sock.recv(65536):
                sock.sendall(b"x")
        finally:
            ended.set()

    w.server.names("other.example.com", NEXT)
    TcpServer(w.internet, NEXT, 443, until_the_end)
    eventually(lambda: addresses_in(ask(w.client, "other.example.com")) == [NEXT])
    with connected(w, NEXT) as sock:
        sock.sendall(hello_of_openssl("other.example.com"))
        assert sock.recv(1) == b"x" and not ended.is_set()
        kill(w, "gate")
        assert is_reset(sock) and ended.wait(patiently(5)), "both ends of one in use are told"
    assert_works(w)


@isolated
def test_a_change_of_rules() -> None:
    w = world()
    assert_works(w)
    gate = w.pids()[2]
    os.kill(gate, signal.SIGSTOP)  # so the change waits for it
    changing = threading.Thread(target=w.allow, args=(https("next.example.com", PORT),))
    changing.start()
    eventually(lambda: w.leased("leases4") == w.leased("checked4") == [])
    assert changing.is_alive()
    kill(w, "gate")
    changing.join(patiently(20))
    assert not changing.is_alive()
    eventually(lambda: addresses_in(ask(w.client, "next.example.com", timeout=patiently(1))) == [NEXT])
    assert greeting(w.client, NEXT, PORT) == NEXT
    denied = ask(w.client, NAME)
    assert denied is not None and denied.rcode == wire.NXDOMAIN and tls_greeting(w.client, SITE, NAME) is None
