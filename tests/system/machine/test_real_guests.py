"""Guests that people run: a Debian with systemd, which starts a PostgreSQL, and clients in containers beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Cli, Result
from tests.support.guests import systems
from tests.support.wait import until
from tests.system.conftest import TenantFactory

LONG = 300.0
ADDRESS = "10.0.0.9"


@pytest.fixture(scope="module")
def debian() -> Path:
    """The root file system of a Debian."""
    found = systems()
    if found is None:
        pytest.skip("the systems of guests are not there: scripts/systems makes them")
    return found / "debian.tar"


def asks(cli: Cli, query: str, host: str = "db") -> Result:
    """What the database says to a client in a container."""
    return cli.run("exec", "client", "psql", "-h", host, "-U", "postgres", "-Atc", query)


def connects(cli: Cli) -> bool:
    """Whether another instance of the tenant gets a connection to the database's port at its address."""
    return cli.run("exec", "other", "nc", "-w", "3", ADDRESS, "5432").status == 0


def test_a_database_that_systemd_starts_serves_its_own_tenant_alone(tenants: TenantFactory, debian: Path) -> None:
    """One image is the machine and the client's container. The tenants have the same addresses and names."""
    owner, *strangers = tenants(), tenants(), tenants()
    owner.ok("image", "import", debian, "debian:12", timeout=LONG)
    owner.ok("run", "-d", "--name", "client", "debian:12", "sleep", "1000", timeout=LONG)
    for cli in (owner, *strangers):
        cli.ok("run", "-d", "--name", "other", "busybox", "sleep", "1000")
    for cli in strangers:
        cli.ok("run", "-d", "--name", "db", "--ip", ADDRESS, "busybox", "sleep", "1000")
    how = ("--privileged", "--stop-signal", "SIGRTMIN+3", "-m", "512m", "--ip", ADDRESS)
    owner.ok("run", "-d", "--vm", "--name", "db", *how, "debian:12", "/sbin/init", timeout=LONG)

    until(lambda: asks(owner, "select 1").out == "1\n", "the database answers", LONG)
    asks(owner, "create table islands (name text)").ok()
    asks(owner, "insert into islands values ('Capri'), ('Ischia')").ok()
    assert asks(owner, "select count(*) from islands", ADDRESS).out == "2\n", "by address as well"
    assert connects(owner), "the control"
    for cli in strangers:
        assert not connects(cli), "the address is that of an instance of its own"
        assert cli.run("exec", "other", "ping", "-c", "1", "-W", "5", ADDRESS).status == 0, "which is there"

    assert owner.ok("exec", "db", "systemctl", "is-system-running", "--wait", timeout=LONG) == "running"
    assert owner.ok("exec", "db", "cat", "/proc/1/comm") == "systemd"
    assert owner.ok("exec", "db", "systemctl", "is-active", "postgresql@15-main") == "active"
    assert owner.ok("exec", "client", "cat", "/proc/1/comm") == "sleep", "the container's first process is another"
    assert owner.json("verify")["passed"]

    owner.ok("stop", "-t", "200", "db", timeout=LONG)
    [db] = [each for each in owner.json("ps", "-a") if each["instance"]["name"] == "db"]
    assert db["status"]["exit"]["exit_status"] == 0, "it has turned itself off"
    assert not connects(owner)
