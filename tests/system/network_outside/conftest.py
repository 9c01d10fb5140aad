"""Fixtures of the tests by the command line: an insulad with a pool of floating addresses, and two tenants on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.machine import Run
from tests.system.network_outside.test_commands import tenant

POOL = '[network]\nfloating = ["198.18.0.64/28", "2001:2:0:ffff::100/124"]\n'


@pytest.fixture(scope="module")
def host(run_: Run) -> Iterator[Daemon]:
    daemon = Daemon(run_)
    try:
        daemon.configure(POOL)
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


@pytest.fixture
def acme(host: Daemon) -> Iterator[Cli]:
    yield tenant(host, "acme")
    host.cli.ok("tenant", "rm", "--force", "acme")


@pytest.fixture
def globex(host: Daemon) -> Iterator[Cli]:
    yield tenant(host, "globex")
    host.cli.ok("tenant", "rm", "--force", "globex")
