"""Load balancers and open connections: drained backends keep theirs, dead ones lose them; affinity; new backends."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until
from tests.system.network_outside.test_commands import HOST, HOST6, dial
from tests.system.network_outside.test_lb_commands import FAST, SERVE, becomes, refuses, serve, shares, states

ECHO = "exec nc -ll -p 7 -e cat"


def echoes(sock: socket.socket) -> bool:
    """Whether what is sent comes back."""
    try:
        sock.sendall(b"x")
        return sock.recv(1) == b"x"
    except OSError:
        return False


def ended(sock: socket.socket) -> bool:
    """Whether the other end has closed or reset it, within a generous time."""
    sock.settimeout(patiently(10))
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("address", [HOST, HOST6])
def test_drained_backends_keep_their_connections_and_dead_ones_lose_them(host: Daemon, acme: Cli, address: str) -> None:
    for name in ("e1", "e2"):
        acme.ok("run", "-d", "--name", name, "-l", "app=echo", "busybox", "sh", "-c", ECHO)
    acme.ok(
        "lb", "create", "shop", "--listen", "tcp/7007", "--on", "host:", "--port", "7", "--backend", "app=echo", *FAST
    )
    becomes(acme, {"e1": "healthy", "e2": "healthy"})
    with ExitStack() as stack:
        until(lambda: not refuses(host.namespaces.outside, address, 7007), "it is installed")
        open_ = [stack.enter_context(dial(host.namespaces.outside, address, 7007)) for _ in range(16)]
        assert all(map(echoes, open_))
        acme.ok("lb", "update", "shop", "--backend", "e2")
        becomes(acme, {"e2": "healthy"})
        assert all(map(echoes, open_)), "also those of e1, which gets no new ones"
        acme.ok("stop", "-t", "0", "e1")
        alive = [each for each in open_ if echoes(each)]
        dead = [each for each in open_ if each not in alive]
        assert alive and dead, "both had some"
        assert all(map(ended, dead)), "they don't hang"
        host.kill("insulad")
        assert all(map(echoes, alive))
        host.start()
        assert all(map(echoes, alive))


@pytest.mark.parametrize("address", [HOST, HOST6])
def test_affinity_ends_with_health(host: Daemon, acme: Cli, address: str) -> None:
    for name in ("b1", "b2", "b3"):
        serve(acme, name)
    http = ("--health", "http", "--health-path", "/health", "--affinity", "source", *FAST)
    acme.ok("lb", "create", "shop", "--listen", "tcp/80", "--on", "host:", "--backend", "app=shop", *http)
    becomes(acme, dict.fromkeys(("b1", "b2", "b3"), "healthy"))
    outside = host.namespaces.outside
    until(lambda: "nobody" not in shares(outside, address, 3), "it is installed")
    (only,) = shares(outside, address, 12)
    acme.ok("exec", only, "rm", "/www/health")
    rest = {"b1", "b2", "b3"} - {only}
    becomes(acme, {only: "unhealthy", **dict.fromkeys(rest, "healthy")})
    until(lambda: only not in shares(outside, address, 3), "it has lost its clients")
    (other,) = shares(outside, address, 12)
    assert other in rest
    acme.ok("exec", only, "touch", "/www/health")
    until(lambda: set(shares(outside, address, 6)) == {only}, "its clients are its again")


@pytest.mark.parametrize("address", [HOST, HOST6])
def test_a_new_backend_gets_nothing_before_it_serves(host: Daemon, acme: Cli, address: str) -> None:
    serve(acme, "first")
    acme.ok("lb", "create", "shop", "--listen", "tcp/80", "--on", "host:", "--backend", "app=shop", *FAST)
    becomes(acme, {"first": "healthy"})
    outside = host.namespaces.outside
    until(lambda: set(shares(outside, address, 3)) == {"first"}, "it is installed")
    late = f"while [ ! -e /go ]; do sleep 0.1; done; {SERVE}"
    acme.ok("run", "-d", "--name", "late", "-l", "app=shop", "busybox", "sh", "-c", late)
    becomes(acme, {"first": "healthy", "late": "unhealthy"})
    assert set(shares(outside, address)) == {"first"}
    acme.ok("exec", "late", "touch", "/go")
    until(lambda: set(shares(outside, address)) == {"first", "late"}, "it serves")
    acme.ok("restart", "-t", "0", "late")  # the file is still there
    becomes(acme, {"first": "healthy", "late": "healthy"})
    acme.ok("kill", "late")
    becomes(acme, {"first": "healthy", "late": "stopped"})
    until(lambda: set(shares(outside, address)) == {"first"}, "what has ended gets nothing")


def test_each_address_of_a_backend_has_a_health_of_its_own(host: Daemon, acme: Cli) -> None:
    four = SERVE.replace("httpd -f -p 80", "httpd -f -p 0.0.0.0:80")
    acme.ok("run", "-d", "--name", "four", "-l", "app=shop", "busybox", "sh", "-c", four)
    acme.ok("lb", "create", "shop", "--listen", "tcp/80", "--on", "host:", "--backend", "app=shop", *FAST)
    outside = host.namespaces.outside
    until(lambda: states(acme)["four"] == {"healthy", "unhealthy"}, "one version of IP passes")
    by_address = {each["address"]: each["state"] for each in acme.json("lb", "show", "shop")["backends"]}
    assert all((state == "healthy") == (":" not in address) for address, state in by_address.items())
    until(lambda: set(shares(outside, HOST, 3)) == {"four"}, "it is installed")
    until(lambda: refuses(outside, HOST6), "refused at once, not led to a port that nobody has")
    serve(acme, "both")
    until(lambda: set(shares(outside, HOST6, 6)) == {"both"}, "it serves both")
    until(lambda: set(shares(outside, HOST)) == {"both", "four"}, "and shares IPv4")


def test_without_checks_whatever_runs_is_healthy(host: Daemon, acme: Cli) -> None:
    acme.ok("run", "-d", "--name", "u1", "-l", "app=dns", "busybox", "sleep", "1000")
    acme.ok("lb", "create", "shop", "--listen", "udp/53", "--on", "host:", "--backend", "app=dns")
    becomes(acme, {"u1": "healthy"})
    assert {each["reason"] for each in acme.json("lb", "show", "shop")["backends"]} == {"it runs, and is not checked"}
