"""insulad proves a tenant when the kernel tells of a change in its namespace: without waiting, and no other tenant.

The interval of its own passes is an hour here, so nothing that is found was found by one of them.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from insula.kernel.netns import call_in
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.test_verify_watch import metrics

SETTINGS = '[network]\nverify = "1h"\nresolvers = []\n'


@pytest.fixture
def watched(unstarted: Daemon) -> Daemon:
    """insulad with two tenants, each with instances on two networks that nothing joins, after its first pass."""
    unstarted.configure(SETTINGS)
    unstarted.start()
    unstarted.cli.ok("tenant", "create", "acme")
    for tenant in ("acme", "default"):
        populate(unstarted.cli.of(tenant))
    restart(unstarted)
    return unstarted


def populate(cli: Cli) -> None:
    """Create two networks with an instance each."""
    for name, subnet in (("front", "10.8.0.0/24"), ("back", "10.9.0.0/24")):
        cli.ok("network", "create", name, "--subnet", subnet)
        cli.ok("run", "-d", "--name", name, "--network", name, "--stop-timeout", "0", "busybox", "sleep", "600")


def restart(daemon: Daemon) -> None:
    """insulad is killed, and the next one has proven everything once."""
    daemon.kill("insulad")
    daemon.start()
    until(lambda: "insula_isolation_findings" in metrics(daemon), "the first pass over all has ended")
    until(lambda: findings(daemon) == 0, "it finds nothing")


def proofs(daemon: Daemon) -> dict[str, int]:
    """How often each tenant, and the host (""), was proven."""
    found = re.findall(r'^insula_isolation_proofs_total\{tenant="(.*)"\} (.*)$', metrics(daemon), re.M)
    return {tenant: int(float(count)) for tenant, count in found}


@contextmanager
def isolation(cli: Cli) -> Iterator[list[dict[str, Any]]]:
    """The events about isolation; they are in the list after the end of the block."""
    events, found = cli.start("events", "--json"), list[dict[str, Any]]()
    try:
        yield found
    finally:
        events.kill()
        lines = events.communicate()[0].splitlines()
        found += [event for event in map(json.loads, lines) if event["kind"] == "isolation"]


def findings(daemon: Daemon) -> float:
    found = re.search(r"^insula_isolation_findings (.*)$", metrics(daemon), re.M)
    assert found
    return float(found[1])


def corrupt(daemon: Daemon, tenant: str | None, what: str, about: dict[str, str]) -> None:
    """Somebody makes a wrong change, which is found, and takes it back."""
    wrong, right = CORRUPTIONS[what]
    tried = 0

    def is_found() -> bool:
        nonlocal tried
        if tried % 50 == 0:  # insulad may have repaired it with its pass of each minute
            change(daemon, tenant, wrong, about)
        tried += 1
        return findings(daemon) > 0

    until(is_found, f"{what} is found")
    assert "isolation" in daemon.cli.ok("status"), what
    change(daemon, tenant, right, about)
    until(lambda: findings(daemon) == 0, f"{what} is gone")


def names(daemon: Daemon, tenant: str) -> dict[str, str]:
    """The names that commands of this file have placeholders for: devices of a tenant's networks and ports."""
    cli = daemon.cli.of(tenant)
    found = {"table": daemon.prefix}
    for view in cli.json("network", "ls"):
        found[view["network"]["name"]] = f"br{view['network']['index']}"
    for view in cli.json("ps"):
        found[f"port_{view['instance']['name']}"] = f"p{view['instance']['ports'][0]['index']}"
    return found


def change(daemon: Daemon, tenant: str | None, command: str, about: dict[str, str]) -> None:
    """Somebody else than insulad runs a command in the namespace of a tenant or of the host."""
    space = ["nsenter", f"--net={daemon.namespaces.host}"]
    if tenant:
        space = ["nsenter", f"--net=/run/netns/{daemon.prefix}-{tenant}"]
    subprocess.run([*space, "sh", "-c", command.format(**about)], capture_output=True)


CORRUPTIONS = {
    "an element of a set": (
        'nft add element inet {table} paths "{{ {front} . {back} }}"',
        'nft delete element inet {table} paths "{{ {front} . {back} }}"',
    ),
    "a rule": (
        "nft insert rule inet {table} forward accept",
        "for h in $(nft -a list chain inet {table} forward | sed -n 's/^[[:space:]]*accept # handle //p'); do "
        "nft delete rule inet {table} forward handle $h; done",
    ),
    "a device that is down": ("ip link set {port_front} down", "ip link set {port_front} up"),
}


def test_each_kind_of_change_is_found_at_once_in_its_tenant_only(watched: Daemon) -> None:
    about, before = names(watched, "acme"), proofs(watched)
    with isolation(watched.cli) as events:
        for what in CORRUPTIONS:
            corrupt(watched, "acme", what, about)
        after = proofs(watched)
    assert after["acme"] >= before["acme"] + 2 * len(CORRUPTIONS)
    assert after["default"] == before["default"], "nothing has changed there"
    assert {event["tenant"] for event in events} == {"acme"}
    assert {event["action"] for event in events} == {"drifted", "restored"}


def test_the_host_is_proven_when_its_rules_change(watched: Daemon) -> None:
    before, about = proofs(watched), names(watched, "acme")
    with isolation(watched.cli) as events:
        corrupt(watched, None, "a rule", about)
        after = proofs(watched)
    assert {(event["tenant"], event["name"]) for event in events} == {(None, "host")}
    assert after[""] > before[""]
    assert {**after, "": 0} == {**before, "": 0}, "tenants are not proven for it"


def test_an_insulad_that_was_killed_watches_again_and_its_own_changes_cause_no_proofs(watched: Daemon) -> None:
    cli, about = watched.cli.of("acme"), names(watched, "acme")
    restart(watched)
    before = proofs(watched)["acme"]
    cli.ok("run", "-d", "--name", "more", "--network", "front", "--stop-timeout", "0", "busybox", "sleep", "600")
    cli.ok("policy", "create", "none", "--select", "app=none")
    cli.ok("rm", "-f", "more")
    corrupt(watched, "default", "an element of a set", names(watched, "default"))
    assert proofs(watched)["acme"] == before, "a later change, elsewhere, was found"
    corrupt(watched, "acme", "an element of a set", about)
    assert proofs(watched)["acme"] > before


def test_packets_cause_no_proofs(watched: Daemon) -> None:
    """An instance sends to two hundred addresses that nobody has: the router makes and forgets neighbours, and the
    kernel tells of it."""
    cli, about = watched.cli.of("acme"), names(watched, "acme")
    cli.ok("router", "create", "core", "--network", "front", "--network", "back")
    restart(watched)
    before, pid = proofs(watched)["acme"], instance_pid(cli, "front")
    inside = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    outside = os.open(f"/run/netns/{watched.prefix}-acme", os.O_RDONLY)
    try:
        told = call_in(outside, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
        told.setblocking(False)
        told.bind((0, 1 << 2))  # RTMGRP_NEIGH
        with call_in(inside, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            for number in range(2000):
                sender.sendto(b"x", (f"10.9.0.{20 + number % 200}", 9))
        until(lambda: readable(told), "the kernel tells of neighbours that packets have made")
        told.close()
    finally:
        os.close(inside)
        os.close(outside)
    corrupt(watched, "default", "an element of a set", names(watched, "default"))
    assert proofs(watched)["acme"] == before, "a later change, elsewhere, was found"
    corrupt(watched, "acme", "a rule", about)
    assert proofs(watched)["acme"] > before, "it is not deaf for a real change"


def readable(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1 << 16))
    except BlockingIOError:
        return False


def instance_pid(cli: Cli, name: str) -> int:
    return next(int(view["status"]["pid"]) for view in cli.json("ps") if view["instance"]["name"] == name)


def test_the_sockets_of_a_tenant_are_closed_with_its_namespace(watched: Daemon) -> None:
    pid, cli = watched.pid("insulad"), watched.cli

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    def is_watched(tenant: str) -> bool:
        """Whether a socket of a tenant's namespace is told of changes of rules (proc_pid_net(5))."""
        command = ["nsenter", f"--net=/run/netns/{watched.prefix}-{tenant}", "cat", "/proc/self/net/netlink"]
        sockets = [line.split() for line in subprocess.check_output(command, text=True).splitlines()[1:]]
        return any((protocol, groups) == ("12", "00000040") for _, protocol, _, groups, *_ in sockets)

    until(lambda: is_watched("acme"), "a tenant is watched")
    before = descriptors()
    for _ in range(5):
        cli.ok("tenant", "create", "other")
        cli.of("other").ok("network", "create", "front", "--subnet", "10.8.0.0/24")
        until(lambda: is_watched("other"), "the new one is watched")
        cli.of("other").ok("network", "rm", "front")
        cli.ok("tenant", "rm", "other")
    until(lambda: descriptors() <= before + 2, "nothing of the removed ones is open")


def test_the_command_tells_at_once_without_the_setting(fresh: Daemon) -> None:
    cli = fresh.cli
    populate(cli)
    about = names(fresh, "default")
    watching = cli.start("verify", "--watch")
    assert watching.stdout is not None
    wrong, right = CORRUPTIONS["an element of a set"]
    try:
        assert watching.stdout.readline().endswith("passed, watching\n")
        change(fresh, "default", wrong, about)
        found = watching.stdout.readline()
        assert "  ! default" in found, found
        change(fresh, "default", right, about)
        assert any("  gone: ! default" in line for line in watching.stdout)
    finally:
        watching.kill()
        watching.communicate()
    until(lambda: "insula_isolation_proofs" not in metrics(fresh), "nobody watches any more")


def test_a_finding_is_repaired_if_the_settings_say_so(watched: Daemon) -> None:
    watched.configure(SETTINGS + "repair = true\n")
    restart(watched)
    with isolation(watched.cli) as events:
        change(watched, "acme", CORRUPTIONS["an element of a set"][0], names(watched, "acme"))
        until(lambda: proofs(watched)["acme"] > 1, "it is proven")
        until(lambda: findings(watched) == 0, "it is repaired")
    assert {event["tenant"] for event in events} <= {"acme"}
