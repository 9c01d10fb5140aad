"""The proof of isolation holds with guarantees: it reads their rules, and finds nothing strange."""

from __future__ import annotations

from tests.support.daemon import Daemon


def test_guarantees_are_no_finding(unstarted: Daemon) -> None:
    unstarted.configure('[network]\nlink = "100mbit"\nresolvers = []\n')
    unstarted.start()
    cli = unstarted.cli
    for name in ("acme", "globex"):
        cli.ok("tenant", "create", name)
        tenant = cli.of(name)
        tenant.ok("network", "create", "default", "--subnet", "10.0.0.0/24", "--subnet6", "fd00::/64")
        tenant.ok("run", "-d", "--name", "web", "busybox", "sleep", "1d")
    cli.ok("verify")
    acme = cli.of("acme")
    acme.ok("guarantee", "set", "--out", "20mbit", "--in", "20mbit", "--ceil-out", "50mbit")
    acme.ok(
        "guarantee", "set", "web", "--out", "5mbit", "--ceil-out", "30mbit", "--ceil-in", "30mbit", "--pps-in", "5000"
    )
    cli.ok("verify")
