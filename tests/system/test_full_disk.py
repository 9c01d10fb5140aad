"""The disk of all of insulad's files gets full while everything writes: it goes on, says why it refuses, and recovers.

Its parts alone are in test_log_full_disk, test_image_store, test_zoo, unit/test_store_sqlite and unit/test_audit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support import machine
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces
from tests.support.outside import PORT
from tests.support.wait import patiently, until

OWN = Namespaces.OUTSIDE
TALK = "n=0; while :; do n=$((n+1)); echo line $n; done"


@pytest.fixture
def filling(run_: machine.Run) -> Iterator[Daemon]:
    """An insulad whose state and audit log are on a file system of 96 MiB, and a registry outside."""
    daemon = Daemon(run_)
    daemon.root.mkdir()
    daemon.audit = daemon.root / "audit.log"
    daemon.configure()
    outside = daemon.namespaces.outside
    command = Namespaces.wrap(outside, sys.executable, "-m", "tests.support.outside", "registry", OWN)
    registry = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(daemon.root)], check=True)
        assert registry.stdout and registry.stdout.readline() == "ready\n"
        daemon.start()
        yield daemon
    finally:
        registry.kill()
        registry.communicate()
        daemon.remove()


def last_line(cli: Cli, name: str) -> int:
    return int(cli.ok("logs", "-n", "1", name).split()[-1])


def status(cli: Cli, name: str) -> dict[str, object]:
    found: dict[str, object] = cli.json("inspect", name)[0]["status"]
    return found


def test_everything_writes_while_the_disk_gets_full(filling: Daemon) -> None:
    cli, root = filling.cli, filling.root
    cli.ok("tenant", "create", "acme")
    for name, program in (
        ("talker", TALK),
        ("ender", "trap 'exit 7' TERM; while :; do sleep 0.05; done"),
        ("filler", "sleep 600"),
    ):
        cli.ok("run", "-d", "--name", name, "--log-size", "8m", "--log-files", "2", "busybox", "sh", "-c", program)
    before = cli.json("tenant", "ls"), cli.json("network", "ls"), cli.json("image", "ls")
    key = root / "audit.key"
    until(lambda: key.exists() and key.stat().st_size, "the key of the audit log is stored")
    reference = f"{OWN}:{PORT}/hang/app:1"
    with cli.start("image", "pull", "--insecure", reference) as pulling:
        until(lambda: [*(root / "images/tmp").rglob("pull/*")], "a layer is being fetched")
        cli.run("exec", "filler", "sh", "-c", "dd if=/dev/zero of=/full bs=1M; dd if=/dev/zero of=/rest bs=4k")
        _, said = pulling.communicate(timeout=patiently(60))
    assert pulling.returncode == 1 and "the disk is full while copying an image" in said
    until(lambda: not [*(root / "images/tmp").iterdir()], "the pull leaves nothing")
    cli.run("exec", "filler", "dd", "if=/dev/zero", "of=/more", "bs=4k")  # what the pull had
    until(lambda: os.statvfs(root).f_bavail == 0, "it is full")

    # what is refused says why, and changes nothing
    assert "no space is left" in cli.fails("run", "--name", "late", "busybox", "true", status=125)
    for refused in (
        ("tenant", "create", "late"),
        ("network", "create", "late", "--subnet", "10.9.0.0/24"),
        ("image", "tag", "busybox", "late"),
        ("image", "pull", "--insecure", f"{OWN}:{PORT}/app:1"),
    ):
        assert "full" in cli.fails(*refused), refused
    assert (cli.json("tenant", "ls"), cli.json("network", "ls"), cli.json("image", "ls")) == before
    # what needs no disk goes on
    assert cli.ok("exec", "talker", "echo", "here") == "here"
    seen = last_line(cli, "talker")
    cli.ok("exec", "ender", "kill", "-TERM", "1")
    until(lambda: cli.run("exec", "ender", "true").status != 0, "it has ended")
    until(lambda: any("disk" in problem for problem in cli.json("status")["problems"]), "the operator is told")

    filling.kill("insulad")
    filling.launch()
    filling.wait_until_it_answers()  # it goes on trying to store how one has ended
    assert {view["instance"]["name"] for view in cli.json("ps", "-a")} == {"talker", "ender", "filler"}
    assert cli.ok("exec", "talker", "echo", "here") == "here"

    cli.ok("exec", "filler", "rm", "/full", "/rest", "/more")
    until(lambda: not cli.json("status")["problems"], "all is well again", timeout=30)
    assert status(cli, "ender")["state"] == "exited" and status(cli, "ender")["exit"]["exit_status"] == 7  # type: ignore[index]
    until(lambda: last_line(cli, "talker") > seen, "its log goes on")
    assert cli.ok("run", "--rm", "busybox", "echo", "again") == "again"
    cli.ok("image", "pull", "--insecure", f"{OWN}:{PORT}/app:1")
    cli.ok("tenant", "create", "late")
    assert "checked by" in cli.ok("audit", "--verify")
    kept = filling.audit.read_text()
    assert '"chain":"key"' not in kept and '"chain":"gap"' not in kept, "neither its key nor a line was lost"


def test_who_talks_without_end_has_no_more_than_its_log(cli: Cli, daemon: Daemon) -> None:
    """The files of its log are rotated and removed, and the newest lines are there."""
    size, files = 256 << 10, 3
    options = ("--log-size", str(size), "--log-files", str(files))
    cli.ok("run", "-d", "--name", "talker", *options, "busybox", "sh", "-c", TALK)
    log = daemon.root / "instances" / cli.json("inspect", "talker")[0]["instance"]["id"] / "log"
    first, largest = last_line(cli, "talker"), 0
    while last_line(cli, "talker") < first + 200_000:  # 6 MB with the heads of records
        sizes = []
        for file in log.iterdir():
            with suppress(FileNotFoundError):  # it was rotated
                sizes.append(file.stat().st_size)
        largest = max(largest, sum(sizes))
    assert largest <= size * files, largest
    assert largest > size, "the control: it was rotated"
    assert cli.ok("exec", "talker", "echo", "here") == "here"
