"""Virtual machines that grow while they run: disk, memory and processors."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.small_systems import bios_disk
from tests.support.wait import until

LONG = 300.0
_MIB = 1 << 20


def disk(cli: Cli) -> int:
    """MiB of the root file system, as the guest has it."""
    return int(cli.ok("exec", "vm", "df", "-m", "/").splitlines()[-1].split()[1])


def memory(cli: Cli) -> int:
    """MiB of memory that the guest has."""
    [line] = [each for each in cli.ok("exec", "vm", "cat", "/proc/meminfo").splitlines() if "MemTotal" in each]
    return int(line.split()[1]) >> 10


def processors(cli: Cli) -> int:
    return int(cli.ok("exec", "vm", "nproc"))


def status(cli: Cli) -> dict[str, Any]:
    [found] = [each["status"] for each in cli.json("ps", "-a") if each["instance"]["name"] == "vm"]
    return dict(found)


def file(daemon: Daemon) -> Path:
    [found] = (daemon.root / "instances").glob("*/disk")
    return found


def test_a_machine_grows_while_it_runs(cli: Cli, daemon: Daemon) -> None:
    """Its disk with the file system, its memory, and its processors; its programs go on meanwhile. After another start
    it has the same, and what was not possible before."""
    size = ("-m", "256m", "--disk", "64m", "--cpus", "1")
    serve = "echo begun; while :; do echo $((n += 1)) > /count; sleep 0.2; done"
    cli.ok("run", "-d", "--vm", "--name", "vm", *size, "--network", "none", "busybox", "sh", "-c", serve, timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo mine > /kept")
    assert disk(cli) < 64 and memory(cli) < 256 and processors(cli) == 1
    most = os.cpu_count() or 1

    cli.ok("update", "vm", "--disk", "2g", timeout=LONG)
    assert 1800 < disk(cli) < 2048
    cli.ok("update", "vm", "-m", "512m", "--cpus", "2", timeout=LONG)
    assert 450 < memory(cli) < 512
    assert processors(cli) == min(2, most)
    cli.ok("exec", "vm", "dd", "if=/dev/zero", "of=/large", "bs=1M", "count=100", timeout=LONG)
    assert cli.ok("exec", "vm", "cat", "/kept") == "mine"

    daemon.kill("insulad")
    daemon.start()
    told = cli.run("update", "vm", "-m", "700m", timeout=LONG)
    assert (told.status, told.err) == (0, "note: it has 640M of memory until its next start\n")
    assert 570 < memory(cli) < 640 and status(cli)["notes"] == ["it has 640M of memory until its next start"]
    cli.ok("update", "vm", "--cpus", "1", timeout=LONG)
    assert processors(cli) == 1, "one is set offline"
    assert "only grows" in cli.fails("update", "vm", "-m", "256m")
    assert "only grows" in cli.fails("update", "vm", "--disk", "1g")
    assert "memory of its own" in cli.fails("update", "vm", "-m", "none")
    assert "can't have" in cli.fails("update", "vm", "-m", "64g")
    assert cli.ok("logs", "vm") == "begun", "its program was not started again"

    cli.ok("stop", "-t", "0", "vm")
    cli.ok("update", "vm", "-m", "256m", "--disk", "3g")
    assert "only grows" in cli.fails("update", "vm", "--disk", "2g")
    cli.ok("start", "vm", timeout=LONG)
    assert 2700 < disk(cli) < 3072 and memory(cli) < 256 and status(cli)["notes"] == []
    assert cli.ok("exec", "vm", "cat", "/kept") == "mine"
    assert file(daemon).stat().st_size == 3 << 30
    cli.ok("rm", "-f", "vm")


def test_a_snapshot_of_a_machine_that_has_grown_goes_on(cli: Cli) -> None:
    """With the memory and the processors that were plugged in."""
    size = ("-m", "256m", "--disk", "64m")
    cli.ok("run", "-d", "--vm", "--name", "vm", *size, "--network", "none", "busybox", "sleep", "1000", timeout=LONG)
    cli.ok("update", "vm", "-m", "384m", "--cpus", "2", "--disk", "1g", timeout=LONG)
    fill = "mkdir /t; head -c 200M /dev/zero | tr '\\0' x > /dev/shm/x; md5sum < /dev/shm/x"
    before = cli.ok("exec", "vm", "sh", "-c", fill, timeout=LONG)
    cli.ok("snapshot", "create", "--memory", "vm", "grown", timeout=LONG)
    cli.ok("exec", "vm", "rm", "/dev/shm/x")
    cli.ok("snapshot", "restore", "vm", "grown", timeout=LONG)
    until(lambda: status(cli)["state"] == "running", "it goes on", LONG)
    assert cli.ok("exec", "vm", "sh", "-c", "md5sum < /dev/shm/x", timeout=LONG) == before
    assert memory(cli) > 300 and disk(cli) > 900 and processors(cli) == min(2, os.cpu_count() or 1)
    cli.ok("rm", "-f", "vm")


def test_quotas_and_machines_that_do_not_answer(cli: Cli) -> None:
    """Beyond a quota, and while QEMU stands still, nothing changes."""
    size = ("-m", "256m", "--disk", "64m")
    cli.ok("run", "-d", "--vm", "--name", "vm", *size, "--network", "none", "busybox", "sleep", "1000", timeout=LONG)
    before = cli.json("inspect", "vm")[0]["instance"]["spec"]["resources"]
    cli.ok("tenant", "update", cli.tenant or "default", "--disk", "1g", "--memory", "512m")
    assert "may use 1G" in cli.fails("update", "vm", "--disk", "2g")
    assert "may use 512M" in cli.fails("update", "vm", "-m", "1g")
    assert disk(cli) < 64 and memory(cli) < 256

    shim = status(cli)["pid"]
    qemu = int(Path(f"/proc/{shim}/task/{shim}/children").read_text().split()[0])
    os.kill(qemu, signal.SIGSTOP)
    try:
        assert "does not answer" in cli.fails("update", "vm", "--disk", "512m")
    finally:
        os.kill(qemu, signal.SIGCONT)
    assert cli.json("inspect", "vm")[0]["instance"]["spec"]["resources"] == before
    cli.ok("update", "vm", "--disk", "512m", "-m", "384m", timeout=LONG)
    assert disk(cli) > 400 and memory(cli) > 300
    cli.ok("rm", "-f", "vm")
    cli.ok("tenant", "update", cli.tenant or "default", "--disk", "none", "--memory", "none")


def test_the_disk_of_a_disk_image_grows(cli: Cli, daemon: Daemon, tmp_path: Path) -> None:
    """While its system runs, which is told what is left to do; memory waits for its next start."""
    (tmp_path / "small.raw").write_bytes(bios_disk())
    cli.ok("image", "import", "--vm", tmp_path / "small.raw", "small")
    cli.ok("run", "-d", "--vm", "--name", "vm", "-m", "128m", "--network", "none", "small", timeout=LONG)
    told = cli.run("update", "vm", "--disk", "1g", timeout=LONG)
    assert told.status == 0 and "enlarge its partitions" in told.err, told
    assert file(daemon).stat().st_size == 1 << 30
    told = cli.run("update", "vm", "-m", "256m", timeout=LONG)
    assert (told.status, told.err) == (0, "note: it has 128M of memory until its next start\n")
    assert "only grows" in cli.fails("update", "vm", "--disk", "512m")
    cli.ok("rm", "-f", "vm")
