"""Fixtures of the system tests: private daemons, and tenants on them.

run_     one run of the tests: directory and names
daemon   one insulad for the whole session: for tests that don't kill it; each works in a tenant of its own
unstarted  an insulad for one test alone, which starts it; so are
fresh    one that runs,
small    one whose disk is small, and
without_cgroups
tenants  makes tenants of `daemon`, each with a network `default` of 10.0.0.0/24
tenant   the command line as one of them
cli      the same, and the instances that a test leaves are removed
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.support import machine
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until

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
    daemon = Daemon(run_)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


_numbers = itertools.count()


@pytest.fixture
def unstarted(run_: machine.Run) -> Iterator[Daemon]:
    """An insulad that the test configures and starts."""
    daemon = Daemon(run_)
    try:
        yield daemon
    finally:
        daemon.remove()


@pytest.fixture
def fresh(unstarted: Daemon) -> Daemon:
    unstarted.start()
    return unstarted


@pytest.fixture
def small(unstarted: Daemon) -> Daemon:
    """An insulad whose state is on a file system of 96 MiB."""
    unstarted.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(unstarted.root)], check=True)
    unstarted.start()
    return unstarted


@pytest.fixture
def without_cgroups(unstarted: Daemon) -> Daemon:
    """An insulad on a host whose control groups are not mounted."""
    hide = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
    unstarted.wrapper = ("unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh")
    unstarted.start()
    return unstarted


@pytest.fixture(scope="module")
def tenants(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[TenantFactory]:
    """Called with options of `insula tenant create`, makes a tenant with a network `default`; removes it at the end."""
    made: list[Cli] = []
    stem = request.path.stem.removeprefix("test_").replace("_", "-")[:30]

    def make(*options: str, subnet: str = "10.0.0.0/24") -> Cli:
        name = f"{stem}-{next(_numbers)}"
        daemon.cli.ok("tenant", "create", name, *options)
        made.append(daemon.cli.of(name))
        made[-1].ok("network", "create", "default", "--subnet", subnet)
        return made[-1]

    yield make
    for cli in made:
        remove_instances(cli)
        for image in cli.json("image", "ls"):
            if image["tenant"] == cli.tenant:
                cli.ok("image", "rm", image["name"])
        for view in cli.json("peer", "ls"):
            cli.ok("peer", "end", view["peer"], "--name", view["name"])
        for view in cli.json("lb", "ls"):
            cli.ok("lb", "rm", view["name"])
        for view in cli.json("router", "ls"):
            cli.ok("router", "rm", view["router"]["name"])
        for view in cli.json("network", "ls"):
            cli.ok("network", "rm", view["network"]["name"])
        daemon.cli.ok("tenant", "rm", str(cli.tenant))


def remove_instances(cli: Cli) -> None:
    """All of the tenant; some may be about to remove themselves (`--rm`)."""

    def removed() -> bool:
        names = [view["instance"]["name"] for view in cli.json("ps", "-a")]
        return not names or not cli.run("rm", "-f", *names)

    until(removed, "all instances are removed", timeout=20)


@pytest.fixture(scope="module")
def tenant(tenants: TenantFactory) -> Cli:
    """The command line as a tenant of this file's own."""
    return tenants()


@pytest.fixture
def cli(tenant: Cli) -> Iterator[Cli]:
    """The command line of `tenant`; the instances that a test leaves are removed."""
    yield tenant
    remove_instances(tenant)
