"""Instances whose records can't be read: `ps` lists them, and `rm -f` removes them with all they own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from insula.store.sqlite import SqliteStore
from tests.support.daemon import Daemon
from tests.support.wait import until

TENANT = "acme"


def damage(daemon: Daemon, name: str, value: bytes, tenant: str = TENANT) -> None:
    """Write `value` in the place of its record, in the store of a daemon that is dead."""
    overwrite(daemon, f"/instances/{tenant}/{name}", value)


def overwrite(daemon: Daemon, key: str, value: bytes) -> None:
    async def write() -> None:
        store = SqliteStore(daemon.root / "state.db")
        try:
            assert await store.get(key)
            await store.put(key, value)
        finally:
            await store.close()

    asyncio.run(write())


def claims(daemon: Daemon, owner: str) -> list[str]:
    """The reservations in the store of a daemon that has ended."""

    async def read() -> list[str]:
        store = SqliteStore(daemon.root / "state.db")
        try:
            return [entry.key for entry in (await store.list("/claims/")).entries if entry.value == owner.encode()]
        finally:
            await store.close()

    return asyncio.run(read())


def parts(daemon: Daemon, identity: str) -> list[str]:
    """Directories and control groups of an instance."""
    hierarchies = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()]
    groups = [hierarchy / daemon.prefix / TENANT / identity for hierarchy in hierarchies]
    files = [daemon.root / "instances" / identity, daemon.run / "containers" / identity]
    return [str(path) for path in [*groups, *files] if path.exists()]


@pytest.mark.parametrize("legible", [True, False], ids=["legible id", "nothing legible"])
def test_a_damaged_instance_is_listed_and_removed(fresh: Daemon, legible: bool) -> None:
    fresh.cli.ok("tenant", "create", TENANT, "--memory", "1g", "--instances", "2")
    cli = fresh.cli.of(TENANT)
    cli.ok("network", "create", "default", "--subnet", "10.7.0.0/29")
    for name in ("sick", "sound"):
        cli.ok("run", "-d", "--name", name, "--memory", "512m", "busybox", "sleep", "600")
    view = cli.json("inspect", "sick")[0]["instance"]
    identity, address, pid = view["id"], view["ports"][0]["address"], cli.json("inspect", "sick")[0]["status"]["pid"]
    assert len(parts(fresh, identity)) >= 3, "the control: group and directories"
    assert cli.run("exec", "sound", "ping", "-c", "1", "-W", "20", "sick").status == 0
    fresh.kill("insulad")
    assert len(claims(fresh, f"{TENANT}/sick")) == 3, "the control"
    damage(fresh, "sick", b'{"id": "%b", "later": 1}' % identity.encode() if legible else b"\0{")
    fresh.start()

    assert "failed: its record is damaged" in cli.ok("ps", "-a")
    assert "its record is damaged" not in fresh.cli.ok("ps", "-a"), "the control: another tenant's list"
    for verb in ("inspect", "stop", "rm"):
        refused = cli.run(verb, "sick")
        assert refused.status and "rm -f sick` removes it" in refused.err
    assert Path(f"/proc/{pid}").exists(), "the control: it runs on"
    cli.ok("rm", "-f", "sick")

    assert [view["instance"]["name"] for view in cli.json("ps", "-a")] == ["sound"]
    assert parts(fresh, identity) == []
    assert not Path(f"/proc/{pid}").exists()
    assert fresh.cli.json("status")["problems"] == []
    assert cli.run("exec", "sound", "nslookup", "sick").status != 0, "its name is gone"
    assert cli.run("exec", "sound", "nslookup", "sound").status == 0, "the control"
    cli.ok("run", "-d", "--name", "sick", "--memory", "512m", "--ip", address, "busybox", "sleep", "600")
    assert cli.run("exec", "sound", "ping", "-c", "1", "-W", "20", "sick").status == 0
    fresh.kill("insulad")
    assert len(claims(fresh, f"{TENANT}/sick")) == 3
    fresh.start()
    assert fresh.cli.json("verify")["passed"]


def test_several_damaged_instances_with_unknown_ids(fresh: Daemon) -> None:
    """Nobody's are the files and processes that are left when the last of them is removed, and not before."""
    cli = fresh.cli
    for name in ("one", "two", "three"):
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
    kept = cli.json("inspect", "three")[0]["instance"]["id"]
    fresh.kill("insulad")
    for name in ("one", "two"):
        damage(fresh, name, b"", tenant="default")
    fresh.start()
    cli.ok("rm", "-f", "one")
    assert len(os.listdir(fresh.root / "instances")) == 3, "nobody knows which of them it was"
    assert [v["instance"]["name"] for v in cli.json("ps", "-a") if v["status"]["state"] == "failed"] == ["two"]
    cli.ok("rm", "-f", "two")
    until(lambda: os.listdir(fresh.root / "instances") == [kept], "the rest is removed with the last")
    until(lambda: os.listdir(fresh.run / "containers") == [kept], "so is what is in memory")
    assert cli.ok("exec", "three", "echo", "here") == "here"


def test_a_tenant_with_a_damaged_instance_is_removed(fresh: Daemon) -> None:
    fresh.cli.ok("tenant", "create", TENANT)
    cli = fresh.cli.of(TENANT)
    cli.ok("network", "create", "default", "--subnet", "10.7.0.0/24")
    cli.ok("run", "-d", "--name", "sick", "busybox", "sleep", "600")
    identity = cli.json("inspect", "sick")[0]["instance"]["id"]
    fresh.kill("insulad")
    damage(fresh, "sick", b"[]")
    fresh.start()
    assert "has" in fresh.cli.fails("tenant", "rm", TENANT), "the control: without --force it stays"
    fresh.cli.ok("tenant", "rm", "--force", TENANT)
    assert TENANT not in fresh.cli.ok("tenant", "ls")
    assert parts(fresh, identity) == []


@pytest.mark.parametrize("file", ["state.json", "launch.json"])
def test_damaged_files_of_an_instance(fresh: Daemon, file: str) -> None:
    """In the run directory, with its status in the store damaged too: so nothing names its process."""
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "sick", "busybox", "sleep", "600")
    identity, pid = (cli.json("inspect", "sick")[0][part][key] for part, key in (("instance", "id"), ("status", "pid")))
    fresh.kill("insulad")
    (fresh.run / "containers" / identity / file).write_bytes(b"\0{")
    (fresh.root / "instances" / identity / "launch.json").write_bytes(b"[]")
    fresh.start()
    assert "sick" in str(fresh.cli.json("status")["problems"])
    assert cli.json("ps", "-a")[0]["instance"]["name"] == "sick"
    cli.ok("rm", "-f", "sick")
    assert not Path(f"/proc/{pid}").exists()
    assert not (fresh.root / "instances" / identity).exists()
    assert not (fresh.run / "containers" / identity).exists()
    assert fresh.cli.json("status")["problems"] == []


@pytest.mark.parametrize("tenant", [TENANT, "default"])
def test_a_tenant_whose_record_is_damaged_keeps_what_it_has(fresh: Daemon, tenant: str) -> None:
    if tenant == TENANT:
        fresh.cli.ok("tenant", "create", TENANT, "--instances", "5")
        fresh.cli.of(TENANT).ok("network", "create", "default", "--subnet", "10.7.0.0/24")
    cli = fresh.cli.of(tenant)
    before = cli.json("tenant", "show", tenant)["tenant"]
    for name in ("web", "db"):
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
    pid = cli.json("inspect", "web")[0]["status"]["pid"]
    fresh.kill("insulad")
    overwrite(fresh, f"/tenants/{tenant}", b"\0{")
    fresh.start()
    until(lambda: cli.run("exec", "web", "ping", "-c", "1", "-W", "20", "db").status == 0, "it is managed")
    assert cli.json("inspect", "web")[0]["status"]["pid"] == pid
    after = cli.json("tenant", "show", tenant)["tenant"]
    assert [after[key] for key in ("index", "id_base")] == [before[key] for key in ("index", "id_base")]
    [problem] = fresh.cli.json("status")["problems"]
    assert problem.startswith(f"record /tenants/{tenant}: was damaged, its limits and labels are lost")
    assert "instances" in cli.fails("run", "busybox", "true", status=125), "it may have no more than it has"
    cli.ok("rm", "-f", "web")
    fresh.cli.ok("tenant", "update", tenant, "--instances", "5")
    assert fresh.cli.json("status")["problems"] == []
    cli.ok("run", "--rm", "busybox", "true")
    if tenant == TENANT:
        fresh.cli.ok("tenant", "rm", "--force", TENANT)
        assert TENANT not in fresh.cli.ok("tenant", "ls")


def test_a_tenant_whose_index_is_not_known_stays_damaged(fresh: Daemon) -> None:
    """Another index would be another tenant's range of IDs."""
    fresh.cli.ok("tenant", "create", TENANT)
    fresh.kill("insulad")
    overwrite(fresh, f"/tenants/{TENANT}", b"")
    [claim] = [key for key in claims(fresh, TENANT) if key.startswith("/claims/tenant-index/")]
    overwrite(fresh, claim, b"another")
    fresh.start()
    assert any(f"/tenants/{TENANT} is damaged" in problem for problem in fresh.cli.json("status")["problems"])
    assert "damaged" in fresh.cli.of(TENANT).fails("run", "busybox", "true", status=125)
    fresh.cli.ok("run", "--rm", "busybox", "true")
