"""Disk limits where the kernel enforces none: tenants' sums are checked, and who is above a limit is stopped when the
disk is nearly full."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from insula.client import Client
from insula.model.errors import QuotaExceeded
from tests.support import disks, machine
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.disks import MIB
from tests.support.wait import until
from tests.system.conftest import TenantFactory


@pytest.fixture
def reserving(run_: machine.Run) -> Iterator[Daemon]:
    """An insulad on a file system of 200 MiB without quotas, of which a twentieth is the reserve."""
    daemon = Daemon(run_)
    try:
        disks.make(daemon.path / "image", "plain", 200 * MIB)
        daemon.root.mkdir()
        disks.mount(daemon.path / "image", "plain", daemon.root)
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


def state(cli: Cli, name: str) -> str:
    [view] = cli.json("inspect", name)
    found: str = view["status"]["state"]
    return found


def test_who_is_above_its_limit_is_stopped_when_space_is_short(reserving: Daemon) -> None:
    cli = reserving.cli
    check = next(each for each in cli.json("doctor") if each["name"] == "disk quotas")
    assert check["state"] == "degraded" and "reservation only" in check["detail"] and check["hint"]
    for name, limit in (("above", "8m"), ("within", "400m"), ("free", "0")):
        cli.ok("run", "-d", "--name", name, "--disk", limit, "busybox", "sleep", "600")
    cli.ok("exec", "above", "dd", "if=/dev/zero", "of=/x", "bs=1M", "count=20")
    cli.ok("run", "--rm", "busybox", "true")  # the control: there is room, so nothing happens
    assert state(cli, "above") == "running"
    cli.run("exec", "within", "dd", "if=/dev/zero", "of=/x", "bs=1M", "count=200")
    until(lambda: state(cli, "above") == "exited", "it is stopped", timeout=60)
    assert "no space is left" in cli.fails("run", "busybox", "true", status=125)
    assert any(problem.startswith("disk: no instance") for problem in cli.json("status")["problems"])
    assert (state(cli, "within"), state(cli, "free")) == ("running", "running"), "they are not above a limit"
    cli.ok("exec", "within", "rm", "/x")
    assert cli.ok("run", "--rm", "busybox", "echo", "again") == "again"
    until(lambda: not cli.json("status")["problems"], "the problem is solved", timeout=60)
    cli.ok("start", "above")


def test_a_tenant_can_not_reserve_more_than_its_limit(tenants: TenantFactory) -> None:
    cli = tenants()
    name = str(cli.tenant)
    cli.ok("tenant", "update", name, "--disk", "100m", "--inodes", "100000")
    cli.ok("run", "-d", "--name", "a", "--disk", "60m", "--inodes", "1000", "busybox", "sleep", "600")
    assert "60M" in cli.fails("run", "--disk", "41m", "busybox", "true", status=125)
    assert "inodes" in cli.fails("run", "--disk", "1m", "--inodes", "99001", "busybox", "true", status=125)
    assert "60M" in cli.fails("run", "busybox", "true", status=125), "without a limit it gets the default"
    cli.ok("run", "--rm", "--disk", "40m", "busybox", "true")
    assert "60M" in cli.fails("tenant", "update", name, "--disk", "59m")
    assert cli.fails("update", "a", "--disk", "101m")
    cli.ok("update", "a", "--disk", "20m")
    cli.ok("run", "-d", "--name", "b", "--disk", "80m", "--network", "none", "busybox", "sleep", "600")
    usage = cli.json("tenant", "show", name)["usage"]
    assert (usage["disk"], usage["inodes"]) == (100 * MIB, 1000 + 16384)
    cli.ok("rm", "-f", "a", "b")
    usage = cli.json("tenant", "show", name)["usage"]
    assert (usage["disk"], usage["inodes"]) == (0, 0)


def test_an_instance_without_a_limit_gets_the_default_if_its_tenant_has_one(tenants: TenantFactory) -> None:
    cli = tenants()
    name = str(cli.tenant)
    cli.ok("run", "-d", "--name", "old", "busybox", "sleep", "600")
    assert "old" in cli.fails("tenant", "update", name, "--disk", "5g"), "it would not be counted"
    cli.ok("update", "old", "--disk", "1g")
    cli.ok("tenant", "update", name, "--disk", "5g")
    cli.ok("run", "-d", "--name", "new", "busybox", "sleep", "600")
    cli.ok("update", "old", "--disk", "none")
    for each in ("old", "new"):
        [view] = cli.json("inspect", each)
        resources = view["instance"]["spec"]["resources"]
        assert (resources["disk"], resources["inodes"]) == (1 << 30, 65536), each


def test_fifty_creations_at_the_limit_give_exactly_as_many_as_fit(daemon: Daemon, tenants: TenantFactory) -> None:
    cli = tenants()
    name = str(cli.tenant)
    cli.ok("tenant", "update", name, "--disk", "70m")
    client = Client(str(daemon.run / "insulad.sock"))

    def create(number: int) -> bool:
        resources = {"disk": 10 * MIB, "inodes": 100}
        try:
            client.instances.run(name, image="busybox", networks=[], start=False, resources=resources)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(10) as pool:
        made = sum(pool.map(create, range(50)))
    assert made == 7 == len(cli.json("ps", "-a"))
    assert cli.json("tenant", "show", name)["usage"]["disk"] == 70 * MIB
