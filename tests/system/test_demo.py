"""`insula demo`: it shows true claims, reports a false one, and removes everything again."""

from __future__ import annotations

import dataclasses
import shlex
import signal

import pytest

from insula.cli import demo_machines
from insula.cli.tour import Tour
from insula.cli.verbs.demo import BOMB
from insula.client import Client
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.guests import kernel
from tests.support.machine import Namespaces
from tests.support.wait import patiently, until

HOUSES = {"acme", "globex"}


def tenants(daemon: Daemon) -> set[str]:
    return {view["tenant"]["name"] for view in daemon.cli.json("tenant", "ls")}


def on_its_host(daemon: Daemon) -> Cli:
    """A command line in the network namespace that is the daemon's host, to which ports are published."""
    launcher = daemon.path / "insula-on-its-host"
    command = Namespaces.wrap(daemon.namespaces.host, str(daemon.cli.launcher))
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    launcher.chmod(0o755)
    return dataclasses.replace(daemon.cli, launcher=launcher)


def test_every_claim_of_the_demo_holds_and_nothing_is_left(fresh: Daemon) -> None:
    before = tenants(fresh)
    result = on_its_host(fresh).run("demo", timeout=180)
    assert result.status == 0, result
    assert "NOT SO" not in result.out
    assert result.out.rstrip().endswith("claims held.")
    claims: tuple[str, ...] = ("web of acme", "web of globex", "refuses it more processes", "137", "0 wrong")
    if kernel() is None:
        claims += ("How to get them: scripts/kernel",)
    else:
        claims += ("process 1 of machine is httpd", "on two kernels", "machine pings web by its name")
    for seen in ("$ insula verify", "whois", *claims):
        assert seen in result.out
    assert tenants(fresh) == before
    assert fresh.cli.json("ps", "-a", "--all-tenants") == []


def test_a_host_without_machines_is_told_how_to_get_them(unstarted: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """That part of the demo says so, and makes nothing."""
    hide = 'mount -t tmpfs none /var/cache/insula; exec "$@"'  # it may not be there
    unstarted.wrapper = ("unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh")
    unstarted.start()
    path = str(unstarted.cli.socket)
    tour = Tour(path)
    demo_machines.machine(tour, Client(path))
    told = capsys.readouterr().out
    assert "Virtual machines are not shown: " in told and "How to get them: scripts/kernel" in told
    assert (tour.claims, tour.failures) == (0, []) and "$ insula" not in told


def test_kept_tenants_are_replaced_by_the_next_tour(fresh: Daemon) -> None:
    assert on_its_host(fresh).run("demo", "--keep", timeout=180).status == 0
    assert tenants(fresh) >= HOUSES
    assert fresh.cli.of("acme").ok("exec", "web", "cat", "/www/index.html") == "web of acme"
    running = {view["instance"]["name"] for view in fresh.cli.of("acme").json("ps", "-a")}
    assert running == {"web", "db", "store"}, "what ran amok is gone"
    assert on_its_host(fresh).run("demo", timeout=180).status == 0
    assert not tenants(fresh) & HOUSES


def test_an_interrupted_tour_takes_everything_away(fresh: Daemon) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with fresh.cli.start("demo") as tour:
            until(lambda: len(fresh.cli.json("ps", "--all-tenants")) >= 2, "it has begun")
            tour.send_signal(number)
            tour.communicate(timeout=patiently(30))
        assert tour.returncode != 0
        assert not tenants(fresh) & HOUSES


def test_a_tenant_of_that_name_is_left_alone(fresh: Daemon) -> None:
    fresh.cli.ok("tenant", "create", "globex")
    assert "not the demo's" in fresh.cli.fails("demo")
    assert tenants(fresh) & HOUSES == {"globex"}


def test_a_claim_that_fails_is_reported(fresh: Daemon) -> None:
    """An instance is stopped in the middle of the demo, after the last wait for it."""
    with on_its_host(fresh).start("demo") as tour:
        acme = fresh.cli.of("acme")
        until(lambda: "bomb" in acme.ok("ps", "-q").split(), "the tour is at its bomb", timeout=30)
        acme.ok("kill", "db")
        out, _ = tour.communicate(timeout=patiently(120))
    assert tour.returncode == 1, out
    assert "NOT SO" in out
    assert "did not hold" in out
    until(lambda: not tenants(fresh) & HOUSES, "its tenants are removed all the same")


def test_the_fork_bomb_stays_when_nothing_can_be_forked(fresh: Daemon) -> None:
    """A shell that can't fork ends. Where PID 1 is not that shell, the instance is there to be looked at."""
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "bomb", "--pids", "2", "busybox", "sh", "-c", BOMB)
    until(lambda: "can't fork" in cli.run("logs", "bomb").err, "it is refused processes")
    until(lambda: [p["command"] for p in cli.json("top", "bomb")] == ["sleep 600"], "only PID 1 is left")
    assert [view["status"]["state"] for view in cli.json("ps")] == ["running"]
