"""Fixtures of the system tests: private daemons, and tenants on them.

    run_     one run of the tests: directory and names
    daemon   one insulad for the whole session: for tests that don't kill it; each works in a tenant of its own
    fresh    an insulad for one test alone
    cli      the command line as a new tenant of `daemon`, which has the network `default`
    tenants  makes more tenants
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import machine
from tests.support.cli import Cli
from tests.support.daemon import Daemon

TenantFactory = Callable[..., Cli]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not machine.possible():
        skip = pytest.mark.skip(reason="system tests take root and the programs unshare, ip and tini")
        for item in items:
            if "/system/" in str(item.path):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def run_() -> Iterator[machine.Run]:
    run = machine.Run()
    yield run
    run.close()


@pytest.fixture(scope="session")
def daemon(run_: machine.Run) -> Iterator[Daemon]:
    daemon = Daemon(run_, "s")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


_numbers = itertools.count()


@pytest.fixture
def fresh(run_: machine.Run) -> Iterator[Daemon]:
    daemon = Daemon(run_, f"f{next(_numbers)}")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


@pytest.fixture
def tenants(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[TenantFactory]:
    """Called with options of `insula tenant create`, makes a tenant with a network `default` of 10.0.0.0/24."""
    made: list[str] = []
    stem = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:30].strip("-")

    def make(*options: str, subnet: str = "10.0.0.0/24") -> Cli:
        name = f"{stem}-{next(_numbers)}"
        daemon.cli.ok("tenant", "create", name, *options)
        made.append(name)
        cli = daemon.cli.of(name)
        if not any(network["name"] == "default" for network in _networks(cli)):
            cli.ok("network", "create", "default", "--subnet", subnet)
        return cli

    yield make
    for name in made:
        cli = daemon.cli.of(name)
        for view in cli.json("ps", "-a"):
            cli.ok("rm", "-f", view["instance"]["name"])
        for network in _networks(cli):
            cli.ok("network", "rm", network["name"])
        daemon.cli.ok("tenant", "rm", name)


def _networks(cli: Cli) -> list[dict[str, Any]]:
    return [view["network"] for view in cli.json("network", "ls")]


@pytest.fixture
def cli(tenants: TenantFactory) -> Cli:
    return tenants()
