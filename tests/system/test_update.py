"""Limits that change while an instance runs: at once, within the quota, undone when refused, and kept."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from insula.kernel import cgroups
from insula.model.quotas import QUOTAS
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.conftest import TenantFactory

# fills 40 MiB of a tmpfs, which is memory of the instance that can't be given back
FILL = "dd if=/dev/zero of=/dev/shm/full bs=1M count=40 2>/dev/null && echo full && exec sleep 600"
MEMORY = ("memory.limit_in_bytes", "memory.max")
SOCKETS = ("memory.kmem.tcp.limit_in_bytes", "memory.max")
"""Version 2 counts the buffers of sockets with all other memory."""
PIDS = ("pids.max",)


def sleeper(cli: Cli, name: str, *options: str) -> None:
    cli.ok("run", "-d", "--name", name, *options, "busybox", "sleep", "600")


def in_force(cli: Cli, name: str, files: tuple[str, ...], which: str = "limits") -> str:
    """The kernel's value in one of these files, of version 1 or 2."""
    limits: dict[str, str] = cli.json("explain", name)[which]
    return next(limits[file] for file in files if file in limits)


def cpus(cli: Cli, name: str, which: str = "limits") -> float | None:
    """The quota in force, in CPUs."""
    limits = cli.json("explain", name)[which]
    if "cpu.max" in limits:
        quota, period = limits["cpu.max"].split()
        return None if quota == "max" else int(quota) / int(period)
    quota = int(limits["cpu.cfs_quota_us"])
    return None if quota < 0 else quota / int(limits["cpu.cfs_period_us"])


def resources(cli: Cli, name: str) -> dict[str, Any]:
    [view] = cli.json("inspect", name)
    found: dict[str, Any] = view["instance"]["spec"]["resources"]
    assert (found.pop("disk"), found.pop("inodes")) == (None, None)
    if view["status"]["state"] == "running":
        assert view["status"]["resources"] == {**found, "disk": None, "inodes": None}, (
            "what is in force is what is wanted"
        )
    return found


def usage(cli: Cli) -> dict[str, Any]:
    found: dict[str, Any] = cli.json("tenant", "show", str(cli.tenant))["usage"]
    return {name: found[name] for name in ("instances", "cpus", "memory")}


def test_limits_hold_at_once_and_after_a_restart(cli: Cli) -> None:
    sleeper(cli, "web", "--memory", "32m", "--cpus", "0.5", "--pids", "50")
    assert cli.ok("update", "web", "--memory", "48m", "--cpus", "0.25") == "web"

    def check() -> None:
        assert resources(cli, "web") == {"cpus": 0.25, "memory": 48 << 20, "pids": 50}
        assert int(in_force(cli, "web", MEMORY)) == int(in_force(cli, "web", SOCKETS)) == 48 << 20
        assert cpus(cli, "web") == 0.25
        assert in_force(cli, "web", PIDS) == "50"

    check()
    cli.ok("restart", "-t", "0", "web")
    check()


def test_lower_limits_are_felt_and_their_end_too(cli: Cli) -> None:
    sleeper(cli, "web")
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 5 & done 2>/dev/null; sleep 5 & echo ok"
    assert cli.ok("exec", "web", "sh", "-c", script) == "ok"
    cli.ok("update", "web", "--pids", "4")
    assert cli.run("exec", "web", "sh", "-c", script).status != 0
    cli.ok("update", "web", "--pids", "none")
    assert in_force(cli, "web", PIDS) == "max"
    until(lambda: cli.ok("exec", "web", "sh", "-c", script) == "ok", "forks are allowed again")


def test_no_limit(cli: Cli) -> None:
    sleeper(cli, "web", "--memory", "32m", "--cpus", "0.5")
    cli.json("update", "web", "--memory", "none", "--cpus", "none")
    assert resources(cli, "web") == {"cpus": None, "memory": None, "pids": 4096}
    assert cpus(cli, "web") is None
    limit = in_force(cli, "web", MEMORY)
    assert limit == "max" or int(limit) > 1 << 60


def test_memory_below_what_is_used_is_refused_and_nothing_changes(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "--memory", "64m", "--cpus", "0.5", "busybox", "sh", "-c", FILL)
    until(lambda: cli.ok("logs", "web") == "full", "it has its memory")
    before = usage(cli)
    assert "in use" in cli.fails("update", "web", "--memory", "16m", "--cpus", "0.25")
    assert resources(cli, "web") == {"cpus": 0.5, "memory": 64 << 20, "pids": 4096}
    assert int(in_force(cli, "web", MEMORY)) == 64 << 20
    assert cpus(cli, "web") == 0.5
    assert usage(cli) == before
    assert cli.json("status")["problems"] == []
    cli.ok("update", "web", "--memory", "56m")  # the positive control


def test_of_one_that_does_not_run(cli: Cli) -> None:
    sleeper(cli, "web", "--memory", "32m")
    cli.ok("stop", "-t", "0", "web")
    cli.ok("update", "web", "--memory", "16m")
    assert resources(cli, "web")["memory"] == 16 << 20
    cli.ok("start", "web")
    assert int(in_force(cli, "web", MEMORY)) == 16 << 20


def test_the_tenants_quota_is_asked(tenants: TenantFactory) -> None:
    cli = tenants("--memory", "100m", "--cpus", "1")
    sleeper(cli, "a", "--memory", "40m", "--cpus", "0.5")
    sleeper(cli, "b", "--memory", "40m", "--cpus", "0.25")
    assert "100M of memory" in cli.fails("update", "a", "--memory", "61m")
    assert "1 CPUs" in cli.fails("update", "b", "--cpus", "0.51")
    assert "1 CPUs" in cli.fails("update", "b", "--cpus", "0.51", "--memory", "10m")
    assert usage(cli) == {"instances": 2, "cpus": 0.75, "memory": 80 << 20}
    assert int(in_force(cli, "b", MEMORY)) == 40 << 20
    cli.ok("update", "a", "--memory", "60m")
    assert usage(cli)["memory"] == 100 << 20
    cli.ok("update", "b", "--memory", "none")  # then the tenant's limit bounds it
    assert usage(cli)["memory"] == 60 << 20
    cli.ok("rm", "-f", "a", "b")
    assert usage(cli) == {"instances": 0, "cpus": 0.0, "memory": 0}


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ((), 2),
        (("--memory", "plenty"), 2),
        (("--pids", "0"), 2),
        (("--memory", "1m"), 1),
        (("--cpus", "1e9"), 2),
        (("--pids", "99999999"), 1),
    ],
)
def test_nonsense_changes_nothing(cli: Cli, options: tuple[str, ...], status: int) -> None:
    sleeper(cli, "web", "--memory", "32m")
    cli.fails("update", "web", *options, status=status)
    assert resources(cli, "web") == {"cpus": None, "memory": 32 << 20, "pids": 4096}
    cli.fails("update", "nobody", "--memory", "32m")


# -- tenants -------------------------------------------------------------------------------------------------------


def test_a_tenants_limits(tenants: TenantFactory) -> None:
    cli = tenants("--memory", "100m", "--instances", "1")
    name = str(cli.tenant)
    sleeper(cli, "a", "--memory", "40m", "--cpus", "0.5")
    cli.fails("run", "--rm", "busybox", "true", status=125)
    view = cli.json("tenant", "update", name, "--instances", "3", "--memory", "80m", "--cpus", "0.75")
    limits, usage = view["tenant"]["limits"], view["usage"]
    given = {"cpus": 0.75, "memory": 80 << 20, "instances": 3, "bandwidth": None, "pids": 16384}
    assert {name: limits[name] for name in given} == given
    assert limits["networks"] == QUOTAS["networks"].default, "those that are not given are the defaults"
    used = {"instances": 1, "cpus": 0.5, "memory": 40 << 20, "networks": 1, "ports": 1, "log_bytes": 30 << 20}
    assert 500 < usage.pop("spec_bytes") < 3000
    assert usage == {name: used.get(name, 0) for name in usage} and used.keys() <= usage.keys()
    assert int(in_force(cli, "a", MEMORY, "tenant_limits")) == 80 << 20
    assert cpus(cli, "a", "tenant_limits") == 0.75
    cli.ok("run", "--rm", "--memory", "40m", "busybox", "true")
    assert "80M of memory" in cli.fails("run", "--rm", "--memory", "41m", "busybox", "true", status=125)
    cli.ok("tenant", "update", name, "--memory", "none", "--cpus", "none", "--bandwidth", "10m")
    assert cpus(cli, "a", "tenant_limits") is None
    cli.ok("run", "--rm", "--memory", "200m", "busybox", "true")


def test_a_tenants_processes(tenants: TenantFactory) -> None:
    """Every tenant has a limit, `none` takes it away, and all together leave the host a quarter of what it has."""
    cli = tenants()
    name = str(cli.tenant)
    sleeper(cli, "a")
    assert re.search(r"^pids +at most 16384$", cli.ok("tenant", "show", name), re.M)
    assert in_force(cli, "a", PIDS, "tenant_limits") == "16384"
    everything = Path(cli.json("explain", "a")["cgroups"].popitem()[1]).parents[1].name
    most = min(int(Path("/proc/sys/kernel", each).read_text()) for each in ("pid_max", "threads-max"))
    file = Path(cgroups.Cgroup(everything).directory("pids") or "", "pids.max")
    assert int(file.read_text()) == most * 3 // 4
    cli.ok("tenant", "update", name, "--pids", "20")
    assert in_force(cli, "a", PIDS, "tenant_limits") == "20"
    script = (
        "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 5 & done 2>/dev/null; sleep 5 & echo ok"
    )
    assert cli.run("exec", "a", "sh", "-c", script).status != 0
    cli.ok("tenant", "update", name, "--pids", "none")
    assert in_force(cli, "a", PIDS, "tenant_limits") == "max"
    until(lambda: cli.run("exec", "a", "sh", "-c", script).status == 0, "forks are allowed again: the control")
    cli.fails("tenant", "update", name, "--pids", "99999999")
    assert cli.json("tenant", "show", name)["tenant"]["limits"]["pids"] is None


def test_a_tenants_limits_below_what_is_in_use_are_refused(tenants: TenantFactory) -> None:
    cli = tenants("--memory", "100m", "--cpus", "1", "--instances", "4")
    name = str(cli.tenant)
    before = cli.json("tenant", "show", name)
    sleeper(cli, "a", "--memory", "40m", "--cpus", "0.5")
    sleeper(cli, "b")
    for options, word in (
        (("--memory", "39m"), "40M of memory"),
        (("--cpus", "0.4"), "0.5 CPUs"),
        (("--instances", "1"), "2 instances"),
        (("--cpus", "0.9", "--memory", "39m"), "40M of memory"),
    ):
        assert word in cli.fails("tenant", "update", name, *options)
    cli.fails("tenant", "update", name, status=2)
    cli.fails("tenant", "update", "nobody-at-all", "--cpus", "1")
    assert cli.json("tenant", "show", name)["tenant"] == before["tenant"]
    assert cpus(cli, "a", "tenant_limits") == 1.0
    cli.ok("tenant", "update", name, "--memory", "40m", "--cpus", "0.5", "--instances", "2")


def test_a_tenants_memory_below_what_is_used_is_refused(tenants: TenantFactory) -> None:
    """Nothing is reserved here: it is the kernel that knows."""
    cli = tenants("--memory", "100m", "--cpus", "1")
    cli.ok("run", "-d", "--name", "a", "busybox", "sh", "-c", FILL)
    until(lambda: cli.ok("logs", "a") == "full", "it has its memory")
    assert "in use" in cli.fails("tenant", "update", str(cli.tenant), "--memory", "20m", "--cpus", "0.5")
    assert cli.json("tenant", "show", str(cli.tenant))["tenant"]["limits"]["memory"] == 100 << 20
    assert int(in_force(cli, "a", MEMORY, "tenant_limits")) == 100 << 20
    assert cpus(cli, "a", "tenant_limits") == 1.0


# -- crashes -------------------------------------------------------------------------------------------------------


def test_what_was_committed_is_enforced_by_the_next_daemon(fresh: Daemon) -> None:
    """insulad dies after the commit, before the control group is written and the status stored: both are put back."""
    cli = fresh.cli
    cli.ok("tenant", "create", "acme")
    cli = cli.of("acme")
    cli.ok("run", "-d", "--name", "web", "--network", "none", "--memory", "32m", "busybox", "sleep", "600")
    directory = next(iter(cli.json("explain", "web")["cgroups"].values()))
    cli.ok("update", "web", "--cpus", "0.5")
    fresh.kill("insulad")
    put_back(directory)
    with sqlite3.connect(fresh.root / "state.db") as store:
        [(text,)] = store.execute("SELECT value FROM entries WHERE key = '/status/acme/web'")
        status = json.loads(text)
        status["resources"] = {"cpus": None, "memory": 32 << 20, "pids": 4096}
        store.execute("UPDATE entries SET value = ? WHERE key = '/status/acme/web'", (json.dumps(status).encode(),))
    store.close()
    fresh.start()
    until(lambda: cpus(cli, "web") == 0.5, "the limit is in force")
    assert resources(cli, "web") == {"cpus": 0.5, "memory": 32 << 20, "pids": 4096}


def put_back(directory: str) -> None:
    """No CPU quota, in the control group behind this directory of either version."""
    two = Path(directory, "cpu.max")
    if two.exists():
        two.write_text("max")
    else:
        relative = Path(directory).relative_to("/sys/fs/cgroup").parts[1:]
        Path("/sys/fs/cgroup/cpu", *relative, "cpu.cfs_quota_us").write_text("-1")
