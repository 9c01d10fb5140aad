"""Load balancers of UDP ports by the command line, with insulad: shares, affinity, health and losses, over kill -9."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from insula.kernel.netns import call_in
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until
from tests.system.network_outside.test_commands import HOST, HOST6
from tests.system.network_outside.test_floating_commands import allocate
from tests.system.network_outside.test_lb_commands import FAST, becomes

PORT, TARGET = 5300, 53
OUTSIDE = {4: "198.18.0.1", 6: "2001:2:0:ffff::1"}


@contextmanager
def udp(namespace: str, address: str = "") -> Iterator[socket.socket]:
    """A UDP socket in a namespace: of the family of `address`, or for both versions of IP."""
    six = not address or ":" in address
    fd = os.open(namespace, os.O_RDONLY)
    try:
        sock: socket.socket = call_in(fd, lambda: socket.socket(socket.AF_INET6 if six else socket.AF_INET, 2))
    finally:
        os.close(fd)
    with sock:
        yield sock


@contextmanager
def serving(cli: Cli, name: str) -> Iterator[None]:
    """An instance, with a server at port 53 that answers with its name and the client's address."""
    cli.ok("run", "-d", "--name", name, "-l", "app=dns", "busybox", "sleep", "1000")
    [pid] = [view["status"]["pid"] for view in cli.json("ps") if view["instance"]["name"] == name]
    inside = f"/proc/{pid}/ns/net"
    with udp(inside) as server, udp(inside) as end:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", TARGET))

        def serve() -> None:
            with contextlib.suppress(OSError):
                while query := server.recvfrom(2048):
                    data, caller = query
                    if data == b"end":
                        return
                    server.sendto(f"{name} {caller[0].removeprefix('::ffff:')}".encode(), caller)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            end.sendto(b"end", ("::1", TARGET))
            thread.join(patiently(10))


def told(sock: socket.socket, address: str, tries: int = 20) -> list[str]:
    """Who answers a datagram to the balancer, and which client it sees. It is sent again while nobody does."""
    sock.settimeout(patiently(0.3))
    for _ in range(tries):
        with contextlib.suppress(OSError):
            sock.sendto(b"who?", (address, PORT))
            return sock.recv(100).decode().split()
    return ["nobody", ""]


def asked(namespace: str, address: str, tries: int = 20) -> list[str]:
    """The same from a new port."""
    with udp(namespace, address) as sock:
        return told(sock, address, tries)


def names(namespace: str, address: str, count: int = 24) -> set[str]:
    return {asked(namespace, address)[0] for _ in range(count)}


def leaves(sock: socket.socket, address: str, backend: str) -> bool:
    """Whether another backend answers."""
    return told(sock, address)[0] not in (backend, "nobody")


def has_all(namespace: str, address: str, backend: str) -> bool:
    return names(namespace, address, 6) == {backend}


def test_datagrams_from_outside_are_spread_and_follow_their_backends(host: Daemon, acme: Cli) -> None:
    outside = host.namespaces.outside
    with ExitStack() as stack:
        for name in ("u1", "u2", "u3"):
            stack.enter_context(serving(acme, name))
        _, four = allocate(acme, "four")
        _, six = allocate(acme, "six", "--family", "ipv6")
        places = ("--on", "four", "--on", "six", "--on", "host:", "--on", "network:default")
        listen = ("--listen", f"udp/{PORT}", "--port", str(TARGET))
        vip, vip6 = acme.ok("lb", "create", "dns", *listen, *places, "--backend", "app=dns").split()[-2:]
        becomes(acme, dict.fromkeys(("u1", "u2", "u3"), "healthy"), "dns")
        for address in (four, six, HOST, HOST6):
            until(lambda address=address: names(outside, address) == {"u1", "u2", "u3"}, address)  # type: ignore[misc]
            assert asked(outside, address)[1] == OUTSIDE[6 if ":" in address else 4], "the client's address is kept"
        inner = acme.json("inspect", "u1")[0]["instance"]["ports"][0]
        [pid] = [view["status"]["pid"] for view in acme.json("ps") if view["instance"]["name"] == "u1"]
        for address, own in ((vip, inner["address"]), (vip6, inner["address6"])):
            found = [asked(f"/proc/{pid}/ns/net", address) for _ in range(24)]
            assert {name for name, _ in found} == {"u1", "u2", "u3"}, "a backend reaches all of them"
            assert {seen for name, seen in found if name != "u1"} == {own}
        with udp(outside, HOST) as sock, udp(outside, HOST6) as sock6:
            ends = ((sock, HOST), (sock6, HOST6))
            first = [told(*each)[0] for each in ends]
            assert [told(*each)[0] for each in ends * 5] == first * 5, "a flow stays with its backend"
            host.kill("insulad")
            assert [told(*each)[0] for each in ends] == first, "without insulad, too"
            host.start()
            assert [told(*each)[0] for each in ends] == first
            for name in {*first}:
                acme.ok("stop", "-t", "0", name)
            rest = {"u1", "u2", "u3"} - {*first}
            for each in ends:
                until(lambda each=each: told(*each)[0] in rest, "the same flow goes to another one")  # type: ignore[misc]
        acme.ok("lb", "rm", "dns")
        assert asked(outside, HOST, 3) == asked(outside, six, 3) == ["nobody", ""]


def test_affinity_and_health_of_datagrams(host: Daemon, acme: Cli) -> None:
    """Health is that of a TCP port beside: who answers datagrams at all can't be known."""
    outside = host.namespaces.outside
    with ExitStack() as stack:
        for name in ("u1", "u2", "u3"):
            stack.enter_context(serving(acme, name))
            acme.ok("exec", name, "sh", "-c", "mkdir /www; echo ok > /www/health; httpd -p 80 -h /www")
        listen = ("--listen", f"udp/{PORT}", "--port", str(TARGET), "--affinity", "source")
        http = ("--health", "http", "--health-path", "/health", "--health-port", "80", *FAST)
        acme.ok("lb", "create", "dns", *listen, "--on", "host:", "--backend", "app=dns", *http)
        becomes(acme, dict.fromkeys(("u1", "u2", "u3"), "healthy"), "dns")
        for address in (HOST, HOST6):
            until(lambda address=address: len(names(outside, address)) == 1, "one has all of a client")  # type: ignore[misc]
            [only] = names(outside, address)
            assert only != "nobody"
            with udp(outside, address) as sock:
                assert told(sock, address)[0] == only
                acme.ok("exec", only, "rm", "/www/health")
                until(partial(leaves, sock, address, only), "the same flow goes to another one")
            [other] = names(outside, address)
            assert other not in (only, "nobody")
            acme.ok("exec", only, "sh", "-c", "echo ok > /www/health")
            until(partial(has_all, outside, address, only), "its clients are its again")
