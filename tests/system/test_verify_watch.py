"""insulad proves isolation by itself, and `insula verify --repair` installs again what differs."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until


@pytest.fixture
def watched(unstarted: Daemon) -> Daemon:
    """insulad that proves every second, with two instances on networks that nothing joins."""
    unstarted.configure('[network]\nverify = "1s"\nresolvers = []\n')
    unstarted.start()
    cli = unstarted.cli
    cli.ok("network", "create", "back", "--subnet", "10.9.0.0/24")
    for name, network in (("web", "default"), ("db", "default"), ("far", "back")):
        cli.ok("run", "-d", "--name", name, "--network", network, "--stop-timeout", "0", "busybox", "sleep", "600")
    return unstarted


def bridges(daemon: Daemon) -> list[str]:
    return [f"br{view['network']['index']}" for view in daemon.cli.json("network", "ls")]


def join(daemon: Daemon) -> None:
    """Somebody lets the two networks reach each other."""
    one, other = bridges(daemon)
    netns = os.open(f"/run/netns/{daemon.prefix}-default", os.O_RDONLY)
    with call_in(netns, Nft) as nft:
        nft.run(f'add element inet {daemon.prefix} paths {{ "{one}" . "{other}" }}')
    os.close(netns)


@contextmanager
def connection(cli: Cli, client: str, server: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """An open TCP connection between two instances."""
    netns, address = {}, ""
    for view in cli.json("ps"):
        name = view["instance"]["name"]
        netns[name] = os.open(f"/proc/{view['status']['pid']}/ns/net", os.O_RDONLY)
        if name == server:
            address = view["instance"]["ports"][0]["address"]
    with call_in(netns[server], socket.socket) as listener, call_in(netns[client], socket.socket) as sock:
        listener.bind(("", 7777))
        listener.listen()
        sock.settimeout(60)
        sock.connect((address, 7777))
        accepted, _ = listener.accept()
        accepted.settimeout(60)
        with accepted:
            yield sock, accepted
    for each in netns.values():
        os.close(each)


def test_drift_is_told_by_status_event_and_metric_and_repaired(watched: Daemon) -> None:
    cli = watched.cli
    until(lambda: "insula_isolation_findings 0.0" in metrics(watched), "the first pass is over, and finds nothing")
    events = cli.start("events", "--json")
    with connection(cli, "web", "db") as (one, other):
        join(watched)
        drifted = next(e for e in map(json.loads, events.stdout) if e["kind"] == "isolation")  # type: ignore[arg-type]
        assert drifted["action"] == "drifted" and drifted["text"]
        join(watched)  # if insulad has repaired it in the meantime
        repaired = cli.run("verify", "--repair")
        assert repaired.status == 0, repaired.out
        restored = next(e for e in map(json.loads, events.stdout) if e["action"] == "restored")  # type: ignore[arg-type]
        assert restored["text"]
        one.sendall(b"still here")
        assert other.recv(64) == b"still here"
    events.kill()
    events.wait()
    until(lambda: "insula_isolation_findings 0.0" in metrics(watched), "nothing is found any more")
    assert cli.ok("status")


def test_repair_tells_what_it_did(fresh: Daemon) -> None:
    cli = fresh.cli
    cli.ok("network", "create", "back", "--subnet", "10.9.0.0/24")
    cli.ok("run", "-d", "--name", "web", "--stop-timeout", "0", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "far", "--network", "back", "--stop-timeout", "0", "busybox", "sleep", "600")
    assert "repaired" not in cli.ok("verify", "--repair"), "nothing was wrong"
    join(fresh)
    repaired = cli.run("verify", "--repair")
    assert repaired.status == 0 and "repaired default: installed again" in repaired.out, repaired.out
    cli.ok("verify")
    refused = cli.run("verify", "--repair", "--watch")
    assert refused.status == 2 and refused.err.startswith("error: ")


def test_the_command_watches_and_tells_what_comes_and_goes(fresh: Daemon) -> None:
    cli = fresh.cli
    cli.ok("network", "create", "back", "--subnet", "10.9.0.0/24")
    cli.ok("run", "-d", "--name", "web", "--stop-timeout", "0", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "far", "--network", "back", "--stop-timeout", "0", "busybox", "sleep", "600")
    watching = cli.start("verify", "--watch", "--interval", "1s")
    assert watching.stdout is not None
    try:
        assert watching.stdout.readline().endswith("passed, watching\n")
        join(fresh)
        found = watching.stdout.readline()
        assert "! default/" in found and " gone:" not in found, found
        cli.run("verify", "--repair")
        assert any(" gone: ! " in line for line in watching.stdout)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == -signal.SIGINT
        assert watching.stderr is not None and watching.stderr.read() == ""
    finally:
        watching.kill()
        watching.communicate()


def metrics(daemon: Daemon) -> str:
    """The metrics of the host, read from its socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(daemon.run / "insulad.sock"))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        found = b""
        while data := sock.recv(65536):
            found += data
    return found.decode()
