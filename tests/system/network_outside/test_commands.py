"""Published ports by the command line: seen from outside, while insulad restarts and is killed, by two tenants."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from insula.kernel.netns import call_in
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until

HOST, HOST6 = "198.18.0.2", "2001:2:0:ffff::2"
SERVE = "mkdir /www && echo {text} > /www/index.html && exec httpd -f -p 80 -h /www"
ECHO = "exec nc -ll -p 7 -e cat"


@pytest.fixture
def acme(fresh: Daemon) -> Cli:
    return tenant(fresh, "acme")


def tenant(daemon: Daemon, name: str) -> Cli:
    daemon.cli.ok("tenant", "create", name)
    cli = daemon.cli.of(name)
    cli.ok("network", "create", "default", "--subnet", "10.0.0.0/24", "--subnet6", "fd00::/64")
    return cli


def serve(cli: Cli, name: str, *options: str) -> None:
    cli.ok("run", "-d", "--name", name, *options, "busybox", "sh", "-c", SERVE.format(text=f"{name}-{cli.tenant}"))


def dial(namespace: str, address: str, port: int, timeout: float = 5.0) -> socket.socket:
    """A connection from a network namespace. OSError."""
    fd = os.open(namespace, os.O_RDONLY)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock: socket.socket = call_in(fd, lambda: socket.socket(family, socket.SOCK_STREAM))
    finally:
        os.close(fd)
    sock.settimeout(timeout)
    try:
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def page(namespace: str, address: str, port: int, timeout: float = 5.0, path: str = "/") -> str:
    """The page that is served there; "" if none is."""
    try:
        with dial(namespace, address, port, timeout) as sock:
            sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            answer = b""
            while more := sock.recv(4096):
                answer += more
    except OSError:
        return ""
    return answer.rpartition(b"\r\n\r\n")[2].decode().strip()


def gets(namespace: str, address: str, port: int, text: str) -> None:
    until(lambda: page(namespace, address, port) == text, f"{address}:{port} serves {text}")


@pytest.fixture
def echoing(acme: Cli) -> Iterator[Cli]:
    acme.ok("run", "-d", "--name", "echo", "-p", "7007:7", "busybox", "sh", "-c", ECHO)
    yield acme


def test_run_publishes_a_port_and_ps_shows_it(fresh: Daemon, acme: Cli) -> None:
    serve(acme, "web", "-p", "8080:80", "-p", "127.0.0.1:8443:80/tcp", "-p", "[::1]:8444:80")
    spaces = fresh.namespaces
    for address in (HOST, HOST6):
        gets(spaces.outside, address, 8080, "web-acme")
    for address, port in (("127.0.0.1", 8443), ("::1", 8444), ("127.0.0.1", 8080)):
        gets(spaces.host, address, port, "web-acme")
    assert page(spaces.outside, HOST, 8443, 0.5) == ""
    row = next(line for line in acme.ok("ps").splitlines() if line.startswith("web"))
    assert "8080:80/tcp, 127.0.0.1:8443:80/tcp, [::1]:8444:80/tcp" in row
    spec = acme.json("inspect", "web")[0]["instance"]["spec"]
    assert spec["published"][0] == {"port": 8080, "target": 80, "count": 1, "protocol": "tcp", "address": None}


def test_update_publishes_and_withdraws_while_it_runs(fresh: Daemon, acme: Cli) -> None:
    serve(acme, "web")
    outside = fresh.namespaces.outside
    assert page(outside, HOST, 8080, 0.5) == ""
    acme.ok("update", "web", "--publish", "8080:80", "--publish", "20000-39999:20000-39999/udp")
    gets(outside, HOST, 8080, "web-acme")
    acme.ok("update", "web", "--unpublish", "8080:80", "--publish", "8081:80", "--memory", "64m")
    gets(outside, HOST, 8081, "web-acme")
    assert page(outside, HOST, 8080, 0.5) == ""
    assert "does not publish 8080:80/tcp" in acme.fails("update", "web", "--unpublish", "8080:80")
    acme.ok("rm", "-f", "web")
    until(lambda: page(outside, HOST, 8081, 0.5) == "", "it is reached no longer")


def test_a_port_belongs_to_one_and_the_other_tenant_learns_nothing(fresh: Daemon, acme: Cli) -> None:
    globex = tenant(fresh, "globex")
    serve(acme, "web", "-p", "8080:80", "-p", "9000-9100:9000-9100")
    run = ("run", "-d", "--name", "other", "busybox", "sleep", "1000")
    for port in ("8080:80", f"{HOST}:8080:80", "127.0.0.1:8080:80", "8000-8100:8000-8100", "9050:80"):
        said = globex.fails(*run[:2], "-p", port, *run[2:], status=125)
        assert "is in use" in said and "acme" not in said and "web" not in said
        mine = acme.fails(*run[:2], "-p", port, *run[2:], status=125)
        assert "is in use by instance web" in mine
    assert "other" not in globex.ok("ps", "-a") + acme.ok("ps", "-a")
    serve(globex, "web", "-p", "8081:80", "-p", "8080:80/udp")
    gets(fresh.namespaces.outside, HOST, 8080, "web-acme")
    gets(fresh.namespaces.outside, HOST, 8081, "web-globex")
    acme.ok("rm", "-f", "web")
    globex.ok("update", "web", "--publish", "8080:80")
    gets(fresh.namespaces.outside, HOST, 8080, "web-globex")


def test_bad_ports_are_refused_in_one_line_and_nothing_changes(fresh: Daemon, acme: Cli) -> None:
    wrong = (
        "80",
        "0:80",
        "80:65536",
        "20-10:20-10",
        "1-10:1-11",
        "x:80",
        "80:80/icmp",
        "1.2.3.4.5:80:80",
        "[::1:80:80",
    )
    for text in wrong:
        assert acme.fails("run", "-d", "--name", "bad", "-p", text, "busybox", status=2).count("\n") <= 1
    for text, told in (
        ("192.0.2.77:80:80", "no address of this host"),
        ("8.8.8.8:53:53/udp", "no address of this host"),
    ):
        assert told in acme.fails("run", "-d", "--name", "bad", "-p", text, "busybox", status=125)
    twice = acme.fails("run", "-d", "--name", "bad", "-p", "80:80", "-p", f"{HOST}:80:81", "busybox", status=125)
    assert "given twice" in twice
    with socket.socket() as ours:
        fd = os.open(fresh.namespaces.host, os.O_RDONLY)
        listener: socket.socket = call_in(fd, lambda: socket.create_server(("0.0.0.0", 22)))
        os.close(fd)
        with listener:
            said = acme.fails("run", "-d", "--name", "bad", "-p", "22:22", "busybox", status=125)
        ours.close()
    assert "in use by the host itself" in said
    assert "bad" not in acme.ok("ps", "-a")


def test_open_connections_outlive_insulad_and_a_kill(fresh: Daemon, echoing: Cli) -> None:
    outside = fresh.namespaces.outside
    until(lambda: _echoes(outside), "it answers")
    with dial(outside, HOST, 7007) as sock:
        assert _alive(sock)
        fresh.stop()
        assert _alive(sock), "without insulad"
        fresh.start()
        assert _alive(sock), "after a restart"
        fresh.kill("insulad")
        fresh.start()
        fresh.wait_until_it_is_reconciled()
        assert _alive(sock), "after a kill"
        assert _echoes(outside)


def _echoes(namespace: str) -> bool:
    try:
        with dial(namespace, HOST, 7007, 1.0) as sock:
            return _alive(sock)
    except OSError:
        return False


def _alive(sock: socket.socket) -> bool:
    token = f"{time.monotonic_ns()}\n".encode()
    sock.settimeout(patiently(3.0))
    try:
        sock.sendall(token)
        return sock.recv(200) == token
    except OSError:
        return False
