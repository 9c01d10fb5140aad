"""CDs of machines: an installation from an ISO image, CDs that come and go, and what is refused."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from insula.machine.disk import firmware
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.guests import systems
from tests.support.linux_disk import linux_disk
from tests.support.small_iso import BLOCK, iso
from tests.support.small_systems import bios_disk
from tests.support.wait import until
from tests.system.machine.test_disk_images import LONG, imported, started, status


@pytest.mark.parametrize("devices", ["para", "full"])
def test_a_system_is_installed_from_a_cd(cli: Cli, tmp_path: Path, daemon: Daemon, devices: str) -> None:
    """The disk is empty at first, so the CD is booted; the next start is from the disk, with the CD in its drive."""
    image = imported(cli, tmp_path, iso(uefi=True), "installer", "--devices", devices, file="small.iso")
    assert image["disk"]["media"] == "cdrom" and image["disk"]["firmware"] == "bios"
    assert "cdrom" in cli.ok("image", "ls")
    imported(cli, tmp_path, bios_disk(), "disk", "--devices", devices)
    stored = daemon.root / "images/disks" / image["disk"]["digest"].removeprefix("sha256:")
    assert stored.read_bytes() == iso(uefi=True)

    cli.ok("run", "-d", "-i", "--vm", "--name", "vm", "--disk", "8m", "--network", "none", "installer", timeout=LONG)
    until(lambda: "installed" in cli.ok("logs", "vm"), "it is installed", LONG)
    assert "mark" not in cli.ok("logs", "vm"), "the disk was empty"
    with cli.terminal("attach", "vm") as console:
        console.type("\n")
        console.expect("small system", LONG)
        console.expect("mark A", LONG)
        console.expect(f"sectors {(8 << 20) // 512:08x}", LONG)
        console.expect("ready", LONG)
    cli.ok("stop", "-t", "60", "vm", timeout=LONG)
    assert status(cli, "vm")["exit"]["exit_status"] == 0
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: "mark B" in cli.ok("logs", "vm"), "it boots from the disk", LONG)
    assert cli.ok("logs", "vm").count("installer") == 1
    assert stored.read_bytes() == iso(uefi=True), "the CD is as it was"
    assert "is used by" in cli.fails("image", "rm", "installer")
    cli.ok("update", "--cdrom", "none", "vm", timeout=LONG)
    assert opened(cli, "vm", stored) == [], "it is out of the drive"
    assert "is used by" in cli.fails("image", "rm", "installer"), "it is the image of the instance still"
    cli.ok("rm", "-f", "vm")
    shown = started(cli, "drivers", "disk", "--cdrom", "installer", "--network", "none")
    assert "mark A" in shown and "installer" not in shown, "the CD is no disk to boot from"
    assert opened(cli, "drivers", stored) == ["r"], "but it is in the drive, read-only"
    assert "is used by" in cli.fails("image", "rm", "installer")
    cli.ok("update", "--cdrom", "none", "drivers", timeout=LONG)
    cli.ok("update", "--cdrom", "none", "drivers", timeout=LONG)
    assert opened(cli, "drivers", stored) == [], "it is out, and stays so"
    cli.ok("image", "rm", "installer")
    assert not stored.exists()
    cli.ok("stop", "-t", "0", "drivers", timeout=LONG)
    boots = cli.ok("logs", "drivers").count("small system")
    cli.ok("start", "drivers", timeout=LONG)
    until(lambda: cli.ok("logs", "drivers").count("small system") > boots, "it boots with an empty drive", LONG)
    assert "no drive" in cli.fails("update", "--cdrom", "none", instance_without(cli))
    cli.ok("rm", "-f", "drivers", "none")
    cli.ok("image", "rm", "disk")


def test_a_cd_is_taken_out_while_the_machine_does_not_run(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    """Its next start has the drive without a CD, and nobody needs the image any more."""
    image = imported(cli, tmp_path, iso(), "drivers", file="small.iso")
    imported(cli, tmp_path, bios_disk(), "disk")
    stored = daemon.root / "images/disks" / image["disk"]["digest"].removeprefix("sha256:")
    started(cli, "vm", "disk", "--cdrom", "drivers", "--network", "none")
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    cli.ok("start", "vm", timeout=LONG)
    assert opened(cli, "vm", stored) == ["r"], "the control: a start has it in the drive"
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    cli.ok("update", "--cdrom", "none", "vm")
    assert status(cli, "vm")["state"] == "exited", "it is not started for that"
    cli.ok("start", "vm", timeout=LONG)
    assert opened(cli, "vm", stored) == []
    words = (qemu(cli, "vm") / "cmdline").read_text()
    assert "ide-cd" in words and "drive=cdrom" not in words, "the drive is there, and empty"
    cli.ok("image", "rm", "drivers")
    cli.ok("rm", "-f", "vm")


def instance_without(cli: Cli) -> str:
    """A machine that has no drive."""
    cli.ok("run", "-d", "--vm", "--name", "none", "--network", "none", "disk", timeout=LONG)
    return "none"


def qemu(cli: Cli, name: str) -> Path:
    """The directory in /proc of a machine's QEMU."""
    [machine] = [each["pid"] for each in cli.json("top", name) if "qemu" in each["command"]]
    return Path(f"/proc/{machine}")


def opened(cli: Cli, name: str, file: Path) -> list[str]:
    """How QEMU has a file open: r for reading alone."""
    machine, found = qemu(cli, name), []
    for each in (machine / "fd").iterdir():
        if each.stat().st_ino == file.stat().st_ino:
            flags = re.search(r"flags:\s+(\d+)", (machine / "fdinfo" / each.name).read_text())
            assert flags
            found.append("r" if int(flags[1], 8) & 3 == 0 else "w")
    return sorted({*found})


def test_a_machine_without_a_drive(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    """It gets one at its next start, and can't before. A snapshot with its memory, of the time before, goes on."""
    image = imported(cli, tmp_path, iso(), "drivers", file="small.iso")
    imported(cli, tmp_path, bios_disk(), "disk")
    stored = daemon.root / "images/disks" / image["disk"]["digest"].removeprefix("sha256:")
    started(cli, "vm", "disk", "--network", "none")
    cli.ok("snapshot", "create", "--memory", "vm", "before", timeout=LONG)
    said = cli.run("update", "--cdrom", "drivers", "vm")
    assert "error: vm was started without a drive for CDs; hint: first `insula" in said.err, said
    assert cli.json("inspect", "vm")[0]["instance"]["spec"]["options"]["cdrom"] is None
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    assert "no CD" in cli.fails("update", "--cdrom", "disk", "vm")
    cli.ok("update", "--cdrom", "drivers", "vm")
    cli.ok("start", "vm", timeout=LONG)
    assert opened(cli, "vm", stored) == ["r"]
    assert "is used by" in cli.fails("image", "rm", "drivers")
    cli.ok("snapshot", "restore", "vm", "before", timeout=LONG)
    until(lambda: status(cli, "vm")["state"] == "running", "it goes on", LONG)
    assert opened(cli, "vm", stored) == ["r"]
    cli.ok("rm", "-f", "vm")


def test_the_cd_that_a_machine_is_of_is_replaced(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    """It has one drive, in which is the CD of its image at first; with `--cdrom` it has two."""
    stored = {}
    for name in ("installer", "one", "two"):
        image = imported(cli, tmp_path, iso(data=name.encode()), name, file="small.iso")
        stored[name] = daemon.root / "images/disks" / image["disk"]["digest"].removeprefix("sha256:")

    def there(name: str) -> set[str]:
        return {each for each, path in stored.items() if opened(cli, name, path) == ["r"]}

    machine = ("run", "-d", "--vm", "--disk", "8m", "--network", "none", "--name")
    cli.ok(*machine, "vm", "installer", timeout=LONG)
    cli.ok(*machine, "both", "--cdrom", "one", "installer", timeout=LONG)
    assert there("vm") == {"installer"} and there("both") == {"installer", "one"}
    for name in ("vm", "both"):
        cli.ok("update", "--cdrom", "two", name, timeout=LONG)
    assert there("vm") == {"two"} and there("both") == {"installer", "two"}
    cli.ok("image", "rm", "one")
    assert not stored.pop("one").exists()
    for name in ("vm", "both"):
        cli.ok("stop", "-t", "0", name, timeout=LONG)
        cli.ok("start", name, timeout=LONG)
    assert there("vm") == {"two"} and there("both") == {"installer", "two"}
    for cdrom, left in (("none", set()), ("two", {"two"})):
        cli.ok("update", "--cdrom", cdrom, "both", timeout=LONG)
        assert there("both") == left
    cli.ok("rm", "-f", "vm", "both")


CDS = """
echo ready
last=
while :; do
    now=
    mount -t iso9660 -o ro /dev/sr0 /mnt 2>/dev/null && { now=$(cat /mnt/data); umount /mnt; }
    [ "$now" = "$last" ] || echo "cd ${now:-none}"
    last=$now
    sleep 0.2
done
"""


@pytest.mark.parametrize("devices", ["para", "full"])
def test_a_system_reads_a_cd_that_is_put_in_while_it_runs(
    cli: Cli, tmp_path: Path, daemon: Daemon, devices: str
) -> None:
    """Of a drive that was empty, and in place of another CD. After an error there is the one of before."""
    found = systems()
    if found is None:
        pytest.skip("the systems of guests are not there: scripts/systems makes them")
    stored = {}
    for name in ("one", "two"):
        image = imported(cli, tmp_path, iso(data=f"this is {name}\n".encode()), name, file="small.iso")
        stored[name] = daemon.root / "images/disks" / image["disk"]["digest"].removeprefix("sha256:")
    drivers = ("virtio_pci", "virtio_blk", "ata_piix", "ahci", "sd_mod", "sr_mod", "isofs")
    imported(cli, tmp_path, linux_disk(found / "kernel", CDS, drivers=drivers), "linux", "--devices", devices)
    started(cli, "vm", "linux", "--cdrom", "one", "--network", "none", "-m", "256m")

    def reads(name: str) -> bool:
        """Whether that is what it has read last. It may see the open drive before another CD."""
        return [line.split()[-1] for line in cli.ok("logs", "vm").splitlines() if line.startswith("cd ")][-1:] == [name]

    until(lambda: reads("one"), "it reads the CD of its start", LONG)
    cli.ok("update", "--cdrom", "two", "vm", timeout=LONG)
    until(lambda: reads("two"), "it reads the other one", LONG)
    assert opened(cli, "vm", stored["one"]) == [] and opened(cli, "vm", stored["two"]) == ["r"]
    cli.ok("image", "rm", "one")
    assert "is used by vm" in cli.fails("image", "rm", "two")
    cli.ok("update", "--cdrom", "none", "vm", timeout=LONG)
    until(lambda: reads("none"), "the drive is empty", LONG)
    cli.ok("update", "--cdrom", "two", "vm", timeout=LONG)
    until(lambda: reads("two"), "it reads the CD in the empty drive", LONG)
    assert "no CD" in cli.fails("update", "--cdrom", "linux", "vm")
    assert "there is no image one" in cli.fails("update", "--cdrom", "one", "vm")

    machine, before = int(qemu(cli, "vm").name), status(cli, "vm")["disks"]
    os.kill(machine, signal.SIGSTOP)
    try:
        assert "does not answer" in cli.fails("update", "--cdrom", "none", "vm")
    finally:
        os.kill(machine, signal.SIGCONT)
    assert cli.json("inspect", "vm")[0]["instance"]["spec"]["options"]["cdrom"] == "two"
    until(lambda: status(cli, "vm")["disks"] == before, "what was changed is as before", LONG)
    assert opened(cli, "vm", stored["two"]) == ["r"]
    until(lambda: reads("two"), "it is read again", LONG)
    cli.ok("stop", "-t", "0", "vm", timeout=LONG)
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: cli.ok("logs", "vm").splitlines()[-2:] == ["ready", "cd this is two"], "the next start has it", LONG)
    cli.ok("rm", "-f", "vm")


@pytest.mark.skipif(firmware.find() is None, reason="UEFI firmware is not installed: apt install ovmf")
def test_a_cd_boots_by_uefi(cli: Cli, tmp_path: Path) -> None:
    image = imported(cli, tmp_path, iso(bios=False, uefi=True), "modern", file="modern.iso")
    assert image["disk"]["firmware"] == "uefi", "which its boot catalog says"
    assert "small system by UEFI" in started(cli, "vm", "modern", "--network", "none")
    cli.ok("rm", "-f", "vm")


def test_what_is_no_whole_iso_is_refused(cli: Cli, tmp_path: Path) -> None:
    whole = iso(data=b"the end")
    file = tmp_path / "small.iso"
    hostile = {
        "cut off": (whole[:-BLOCK], ()),
        "no ISO": (bios_disk(), ()),
        "qcow2": (b"QFI\xfb" + whole[4:], ()),
        "needs": (whole[: 16 * BLOCK + 80] + b"\xff" * 4 + whole[16 * BLOCK + 84 :], ()),
    }
    for message, (data, options) in hostile.items():
        file.write_bytes(data)
        assert message in cli.fails("image", "import", "--vm", file, "hostile", *options)
    boots_nowhere = whole[: 17 * BLOCK + 71] + b"\xff" * 4 + whole[17 * BLOCK + 75 :]
    assert imported(cli, tmp_path, boots_nowhere, "hostile", file="small.iso")["disk"]["firmware"] == "bios"
    imported(cli, tmp_path, bios_disk(), "small")
    assert "no CD" in cli.fails("run", "--vm", "--cdrom", "small", "small", status=125)
    assert "no image" in cli.fails("run", "--vm", "--cdrom", "none", "small", status=125)
    assert "disk images" in cli.fails("run", "--vm", "--cdrom", "hostile", "busybox", status=125)
    assert cli.json("ps", "-a") == []
    for name in ("hostile", "small"):
        cli.ok("image", "rm", name)
