"""Disk quotas that the kernel enforces: of instances in a pool, and on a file system with project quotas.

They take a kernel with project quotas: where there is none they are skipped, and run in the virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import quota, syscalls
from insula.volume.pool import Pool
from insula.volume.project import FIRST_PROJECT
from tests.forked import errno_of, forked
from tests.support import disks, machine
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.disks import MIB
from tests.support.wait import until

NO_ROOM = re.compile("quota exceeded|No space left", re.IGNORECASE)
FILL = "dd if=/dev/zero of=/full bs=64k 2>&1"


@pytest.fixture(scope="module")
def limiting(run_: machine.Run) -> Iterator[Daemon]:
    """An insulad with a pool."""
    daemon = Daemon(run_)
    try:
        probe = daemon.path / "probe"
        probe.mkdir()
        disks.make(daemon.path / "image", "ext4", 16 * MIB)
        disks.mount(daemon.path / "image", "ext4", probe)  # skips where the kernel has no quotas
        disks.unmount(probe)
        daemon.configure('[storage]\npool = "200m"\n')
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


@pytest.fixture
def cli(limiting: Daemon) -> Iterator[Cli]:
    yield limiting.cli
    for view in limiting.cli.json("ps", "-a"):
        limiting.cli.ok("rm", "-f", view["instance"]["name"])
    until(lambda: projects(limiting) == [], "every project ID is released")


def projects(daemon: Daemon) -> list[str]:
    """The keys of reserved project IDs, from a copy of the store, which insulad has locked."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in ("state.db", "state.db-wal"):
            if (daemon.root / file).exists():
                shutil.copy(daemon.root / file, scratch)
        with contextlib.closing(sqlite3.connect(f"{scratch}/state.db")) as store:
            rows = store.execute("SELECT key FROM entries WHERE key LIKE '/claims/disk-project/%' ORDER BY key")
            return [row[0] for row in rows]


def size(cli: Cli, name: str, file: str = "/full") -> int:
    return int(cli.ok("exec", name, "stat", "-c", "%s", file))


def usage_of(daemon: Daemon, project: int, directory: str) -> quota.ProjectUsage:
    """What the kernel counts for a project ID, and its limits."""
    fd = os.open(daemon.root / directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return quota.get_usage(fd, project)
    finally:
        os.close(fd)


def trees(daemon: Daemon) -> set[str]:
    found = set()
    for directory in ("instances", "pool"):
        if (daemon.root / directory).exists():
            found |= set(os.listdir(daemon.root / directory)) - {"lost+found"}
    return found


def test_an_instance_is_limited_and_its_neighbours_are_not(cli: Cli) -> None:
    check = next(each for each in cli.json("doctor") if each["name"] == "disk quotas")
    assert check["state"] == "ok" and "/pool: a write beyond 1M was refused" in check["detail"]
    cli.ok("run", "-d", "--name", "full", "--disk", "20m", "--inodes", "200", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "free", "busybox", "sleep", "600")
    assert NO_ROOM.search(cli.run("exec", "full", "sh", "-c", FILL).out)
    assert 19.8 * MIB < size(cli, "full") <= 20 * MIB
    assert " 20480 " in re.sub(" +", " ", cli.ok("exec", "full", "df", "-k", "/"))
    [stats] = cli.json("stats", "--no-stream", "full")["instances"]
    assert 19.8 * MIB < stats["disk"] <= 20 * MIB == stats["disk_limit"]
    disk = cli.json("explain", "full")["disk"]
    assert disk["enforced"] and disk["used"] == stats["disk"] and disk["inodes_limit"] == 200
    assert NO_ROOM.search(cli.run("exec", "full", "chmod", "700", "/bin/busybox").err), "a copy of it does not fit"
    # the controls
    cli.ok("exec", "free", "dd", "if=/dev/zero", "of=/full", "bs=1M", "count=30")
    cli.ok("exec", "full", "rm", "/full")
    cli.ok("exec", "full", "chmod", "700", "/bin/busybox")
    touch = "i=0; while touch f$i; do i=$((i+1)); done 2>/dev/null; echo $i"
    assert 180 < int(cli.ok("exec", "full", "sh", "-c", touch)) < 200
    assert cli.ok("run", "--rm", "busybox", "echo", "others", "run") == "others run"


def test_an_instance_that_is_full_starts_again_and_cp_does_not_help_it(cli: Cli, tmp_path: Path) -> None:
    cli.ok("run", "-d", "--name", "full", "--disk", "5m", "--inodes", "50", "busybox", "sleep", "600")
    cli.run("exec", "full", "sh", "-c", "i=0; while touch f$i; do i=$((i+1)); done")
    cli.ok("exec", "full", "rm", "f1")
    cli.run("exec", "full", "sh", "-c", FILL)
    before = size(cli, "full")
    cli.ok("exec", "full", "sh", "-c", "touch last || true")
    cli.ok("restart", "-t", "0", "full")
    assert size(cli, "full") == before
    (tmp_path / "more").write_bytes(bytes(MIB))
    assert NO_ROOM.search(cli.run("cp", tmp_path / "more", "full:/full2").err), "while it runs"
    cli.ok("stop", "-t", "0", "full")
    assert NO_ROOM.search(cli.run("cp", tmp_path / "more", "full:/full2").err), "and while it does not"
    cli.ok("start", "full")
    assert NO_ROOM.search(cli.run("exec", "full", "sh", "-c", FILL.replace("full", "full3")).out)
    cli.ok("exec", "full", "rm", "/full")
    cli.ok("cp", tmp_path / "more", "full:/f2")


def test_a_limit_is_changed_while_it_runs(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "--disk", "5m", "busybox", "sleep", "600")
    cli.run("exec", "web", "sh", "-c", FILL)
    before = size(cli, "web")
    assert "on its disk, more than" in cli.fails("update", "web", "--disk", "2m")
    cli.ok("update", "web", "--disk", "8m")
    cli.run("exec", "web", "sh", "-c", FILL)
    assert before < 5.1 * MIB < size(cli, "web") <= 8 * MIB
    cli.ok("update", "web", "--disk", "none")
    cli.ok("exec", "web", "dd", "if=/dev/zero", "of=/full", "bs=1M", "count=12")


def test_root_inside_can_not_leave_its_project(limiting: Daemon, cli: Cli) -> None:
    """Nor with all capabilities: they are those of its user namespace."""
    cli.ok("run", "-d", "--name", "web", "--cap-add", "ALL", "--disk", "5m", "busybox", "sleep", "600")
    [view] = cli.json("inspect", "web")
    project, pid = view["instance"]["project_id"], view["status"]["pid"]
    assert FIRST_PROJECT <= project < 2 * FIRST_PROJECT

    def inside() -> list[int]:
        syscalls.setns(os.pidfd_open(pid), syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
        os.setgid(0)
        os.setuid(0)
        fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        file = os.open("/mine", os.O_CREAT | os.O_RDWR)
        return [
            errno_of(lambda: quota.set_project(file, 0, inherit=False)),
            errno_of(lambda: quota.set_project(fd, 0, inherit=True)),
            errno_of(lambda: quota.set_limits(fd, project, None, None)),
        ]

    assert 0 not in forked(inside)


def test_no_project_is_lost_when_insulad_is_killed(limiting: Daemon, cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "kept", "--disk", "5m", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "gone", "--disk", "5m", "busybox", "sleep", "600")
    cli.run("exec", "kept", "sh", "-c", FILL)
    before = cli.json("explain", "kept")["disk"]
    working = [cli.start("run", "-d", "--disk", "5m", "busybox", "sleep", "600") for _ in range(3)]
    working.append(cli.start("rm", "-f", "gone"))
    working[0].wait()
    limiting.kill("insulad")
    for process in working:
        process.communicate()
    limiting.start()
    there = {view["instance"]["id"]: view["instance"] for view in cli.json("ps", "-a")}

    def settled() -> bool:
        return trees(limiting) == set(there) and len(projects(limiting)) == len(there)

    until(settled, "each instance has a tree and a project ID, and nothing else has one")
    expected = sorted(f"/claims/disk-project/{each['project_id'] - FIRST_PROJECT}" for each in there.values())
    assert projects(limiting) == expected
    assert cli.json("explain", "kept")["disk"] == before
    assert NO_ROOM.search(cli.run("exec", "kept", "sh", "-c", FILL.replace("full", "more")).out)


def test_the_sum_of_a_tenant(cli: Cli) -> None:
    cli.ok("tenant", "create", "acme", "--disk", "30m")
    acme = cli.of("acme")
    acme.ok("run", "-d", "--name", "a", "--network", "none", "--disk", "20m", "busybox", "sleep", "600")
    assert "30M" in acme.fails("run", "-d", "--network", "none", "--disk", "11m", "busybox", "true", status=125)
    acme.ok("exec", "a", "dd", "if=/dev/zero", "of=/x", "bs=1M", "count=8")
    view = cli.json("tenant", "show", "acme")
    assert 8 * MIB <= view["disk"]["used"] < 9 * MIB and view["disk"]["limit"] == 30 * MIB
    assert view["usage"]["disk"] == 20 * MIB and view["disk"]["enforced"]
    cli.ok("tenant", "rm", "-f", "acme")


@pytest.mark.parametrize("where", ["on ext4", "on xfs", "in a pool of xfs"])
def test_a_limit_from_the_launch_to_the_removal(unstarted: Daemon, where: str) -> None:
    """With all of insulad's files on such a file system, and with a pool; that of ext4 is in the other tests."""
    *_, kind = where.split()
    disks.make(unstarted.path / "image", kind, 320 * MIB)
    unstarted.root.mkdir()
    disks.mount(unstarted.path / "image", kind, unstarted.root)  # skips where the kernel has no quotas
    directory = "instances"
    if "pool" in where:
        disks.unmount(unstarted.root)
        unstarted.configure('[storage]\npool = "320m"\nformat = "xfs"\n')
        directory = "pool"
    unstarted.start()
    cli = unstarted.cli
    check = next(each for each in cli.json("doctor") if each["name"] == "disk quotas")
    assert check["state"] == "ok" and f"/{directory}: a write beyond 1M was refused" in check["detail"]
    cli.ok("run", "-d", "--name", "full", "--disk", "20m", "--inodes", "100", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "free", "--disk", "40m", "busybox", "sleep", "600")
    work = f"touch full; i=0; while touch f$i; do i=$((i+1)); done 2>/dev/null; echo $i; {FILL}"
    made, *said = cli.run("exec", "full", "sh", "-c", work).out.splitlines()
    assert 80 < int(made) < 100 and NO_ROOM.search("\n".join(said))
    assert 19.8 * MIB < size(cli, "full") <= 20 * MIB
    cli.ok("exec", "free", "dd", "if=/dev/zero", "of=/full", "bs=1M", "count=30")

    project = cli.json("inspect", "full")[0]["instance"]["project_id"]
    counted = usage_of(unstarted, project, directory)
    assert (counted.space_limit, counted.inodes_limit, counted.inodes) == (20 * MIB, 100, 100)
    disk = cli.json("explain", "full")["disk"]
    assert disk == {"used": counted.space, "limit": 20 * MIB, "inodes": 100, "inodes_limit": 100, "enforced": True}
    tenant = cli.json("tenant", "show", "default")["disk"]
    assert tenant["used"] >= counted.space + 30 * MIB and tenant["enforced"], "of both"

    unstarted.kill("insulad")
    unstarted.start()
    assert cli.json("explain", "full")["disk"] == disk
    for more in ("touch /new", "dd if=/dev/zero bs=64k count=4 >>/full"):
        assert NO_ROOM.search(cli.run("exec", "full", "sh", "-c", more).err), more
    cli.ok("exec", "free", "dd", "if=/dev/zero", "of=/more", "bs=1M", "count=5")
    cli.ok("rm", "-f", "full", "free")
    until(lambda: projects(unstarted) == [] == [*trees(unstarted)], "both project IDs are released")
    left = usage_of(unstarted, project, directory)
    assert (left.space, left.inodes, left.space_limit, left.inodes_limit) == (0, 0, None, None)


def test_down_unmounts_the_pool_and_keeps_what_is_in_it(limiting: Daemon) -> None:
    """The last test, since another start of insulad takes long on an emulated processor."""
    limiting.cli.ok("run", "-d", "--name", "web", "--disk", "5m", "busybox", "sh", "-c", "echo kept > /file; sleep 600")
    [view] = limiting.cli.json("inspect", "web")
    until(lambda: limiting.cli.run("exec", "web", "cat", "/file").out == "kept\n", "it has written")
    pool = Pool(limiting.root / "pool.img", limiting.root / "pool")
    assert pool.is_mounted(), "the control"
    limiting.down()
    assert not pool.is_mounted() and list(pool.mount_point.iterdir()) == []
    pool.open(None, "ext4")
    assert (pool.mount_point / view["instance"]["id"] / "upper/file").read_text() == "kept\n"
    pool.unmount()
