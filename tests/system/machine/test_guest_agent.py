"""The agent of QEMU in a real guest: Debian's qemu-ga, in a Linux that has it beside a busybox."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY, Cli
from tests.support.linux_disk import linux_disk
from tests.support.wait import until
from tests.system.machine.test_disk_images import LONG, imported, started, status

DRIVERS = ("virtio_pci", "virtio_blk", "virtio_console", "vfat", "nls_ascii", "nls_cp437", "nls_utf8", "nls_iso8859-1")
SCRIPT = """
until [ -e /dev/vdb ]; do sleep 1; done
mount -t vfat /dev/vdb /mnt
date -s "2001-01-01 00:00:00"
mkdir -p /run
echo machine > /proc/sys/kernel/hostname
for each in /sys/class/virtio-ports/*; do port=/dev/${each##*/}; done
/usr/sbin/qemu-ga -m virtio-serial -p $port -t /run -F/bin/hook &
until [ -e /run/qga.state ]; do sleep 0.2; done
echo ready
while :; do echo "year $(date +%Y)"; read -t 1 signal && kill -$signal $!; done
"""
"""Its agent gets the signals that are typed."""
RELEASE = b'NAME=small\nPRETTY_NAME="Small Linux 1"\n'
HOOK = b"""#!/bin/sh
echo "hook $1" > /dev/console
"""
HWCLOCK = b"#!/bin/sh\n"
"""The agent sets no time where there is no program to set the clock of the hardware by (guest-set-time of qemu-ga)."""
SHUTDOWN = b"""#!/bin/sh
echo "turned off by the agent" > /dev/console
poweroff -f
"""


def agent() -> dict[str, bytes]:
    """The files that the agent needs."""
    done = subprocess.run([REPOSITORY / "scripts/guest-agent", "--known"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip("Debian's qemu-ga is not there: scripts/guest-agent fetches it")
    program = Path(done.stdout.strip())
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=60).stdout
    libraries = re.findall(r"(/\S+) \(0x", linked)
    return {"/usr/sbin/qemu-ga": program.read_bytes()} | {path: Path(path).read_bytes() for path in libraries}


def year(cli: Cli) -> int:
    """The year that it has told last."""
    return int([line for line in cli.ok("logs", "vm").splitlines() if line.startswith("year ")][-1].split()[1])


def test_an_agent_in_the_guest_is_asked(cli: Cli, tmp_path: Path, guests_kernel: Path) -> None:
    """It tells what its system is. It turns that off, which does not know the power button; freezes file systems for a
    snapshot of the disk, and not for one with memory, which would go on frozen; and sets the clock, which is wrong at
    first."""
    programs = {"/bin/hook": HOOK, "/sbin/shutdown": SHUTDOWN, "/sbin/hwclock": HWCLOCK}
    files = {**agent(), **programs, "/etc/os-release": RELEASE}
    imported(cli, tmp_path, linux_disk(guests_kernel, SCRIPT, drivers=DRIVERS, files=files), "linux")
    started(cli, "vm", "linux", "--network", "none", "-m", "256m")
    until(lambda: "year 2001" in cli.ok("logs", "vm"), "its clock is wrong", LONG)

    report = cli.json("inspect", "vm")[0]["guest_report"]
    assert report["answered"] and report["hostname"] == "machine" and report["system"] == "Small Linux 1"
    assert report["kernel"][0].isdigit()
    [loopback] = report["interfaces"]
    assert loopback["name"] == "lo" and "127.0.0.1/8" in loopback["addresses"]
    cli.ok("snapshot", "create", "vm", "disk", timeout=LONG)
    until(lambda: "hook thaw" in cli.ok("logs", "vm"), "its file systems were frozen, and are no more", LONG)
    until(lambda: year(cli) > 2001, "it was told the time", LONG)
    log = cli.ok("logs", "vm")
    assert log.index("hook freeze") < log.index("hook thaw")

    cli.ok("snapshot", "create", "--memory", "vm", "both", timeout=LONG)
    assert cli.ok("logs", "vm").count("hook freeze") == 1
    cli.ok("pause", "vm")
    cli.ok("unpause", "vm", timeout=LONG)
    cli.ok("snapshot", "restore", "vm", "both", timeout=LONG)
    seen = cli.ok("logs", "vm").count("year")
    until(lambda: cli.ok("logs", "vm").count("year") > seen + 1, "it goes on from its memory", LONG)

    cli.ok("stop", "-t", "60", "vm", timeout=LONG)
    assert status(cli, "vm")["exit"]["exit_status"] == 0
    assert "turned off by the agent" in cli.ok("logs", "vm")
    cli.ok("rm", "-f", "vm")


def test_an_agent_that_is_too_late_is_told_the_time_later(cli: Cli, tmp_path: Path, guests_kernel: Path) -> None:
    """One that has not answered is left alone for a while. It is told the time of then, when it answers again."""
    files = {**agent(), "/sbin/hwclock": HWCLOCK}
    imported(cli, tmp_path, linux_disk(guests_kernel, SCRIPT, drivers=DRIVERS, files=files), "linux")
    started(cli, "vm", "linux", "-i", "--network", "none", "-m", "256m")

    def answers() -> bool:
        return bool(cli.json("inspect", "vm")[0]["guest_report"]["answered"])

    until(answers, "the control: it answers", LONG)
    with cli.terminal("attach", "vm") as console:
        console.type("STOP\n")
        until(lambda: not answers(), "it does not answer", LONG)
        cli.ok("pause", "vm")
        cli.ok("unpause", "vm", timeout=LONG)
        told = cli.ok("logs", "vm").count("year")
        until(lambda: cli.ok("logs", "vm").count("year") > told + 2, "it goes on", LONG)
        assert year(cli) == 2001, "the control: it was not told the time"
        console.type("CONT\n")
        until(lambda: year(cli) > 2001, "it was told the time", LONG)
    assert answers()
    cli.ok("rm", "-f", "vm")
