"""Machines of disk images as users have them: `insula image import --vm`, `insula run --vm` and what follows.

The guests are small systems of our own (`tests.support.small_systems`), which boot in a moment under emulation.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from insula.machine.disk import cloud_init, firmware
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.qcow2 import extension, qcow2
from tests.support.small_systems import DISK, bios_disk, uefi_disk
from tests.support.wait import until
from tests.system.conftest import TenantFactory
from tests.unit.test_machine_disks import read

LONG = 120.0
E1000, VIRTIO_NET, VIRTIO_DISK, IDE = "100e8086", "10001af4", "10011af4", "70108086"


def imported(cli: Cli, tmp_path: Path, data: bytes, name: str, *options: str, file: str = "disk.raw") -> dict[str, Any]:
    (tmp_path / file).write_bytes(data)
    found: dict[str, Any] = cli.json("image", "import", "--vm", tmp_path / file, name, *options)
    return found


def started(cli: Cli, name: str, image: str, *options: str) -> str:
    """An instance whose system is ready; its output so far."""
    cli.ok("run", "-d", "--vm", "--name", name, *options, image, timeout=LONG)

    def told() -> bool:
        return "ready" in cli.ok("logs", name) or status(cli, name)["state"] == "exited"

    until(told, f"{name} is ready", LONG)
    assert status(cli, name)["state"] == "running", cli.run("logs", name)
    return cli.ok("logs", name)


def status(cli: Cli, name: str) -> dict[str, Any]:
    [found] = [each for each in cli.json("ps", "-a") if each["instance"]["name"] == name]
    return dict(found["status"])


def test_a_disk_becomes_an_image_and_is_counted(tenants: TenantFactory, tmp_path: Path) -> None:
    cli = tenants()
    image = imported(cli, tmp_path, bios_disk(), "small:1")
    assert image["disk"]["size"] == DISK and image["disk"]["firmware"] == "bios" and image["layers"] == []
    packed = imported(cli, tmp_path, qcow2(bios_disk(), compressed=True), "small:2", file="disk.qcow2")
    assert packed["disk"] == image["disk"], "the content is the same"
    rows = {line.split()[0]: line.split() for line in cli.ok("image", "ls").splitlines()}
    assert rows["small:1"][3] == "disk"
    used = image_bytes(cli)
    assert sum(image["content"].values()) <= used < DISK, "what is stored counts, once"
    cli.ok("image", "tag", "small:1", "again")
    assert "with --vm" in cli.run("run", "--rm", "small:1").err
    assert "disk image" in cli.fails("image", "save", "small:1", "-o", str(tmp_path / "saved"))
    for name in ("small:1", "small:2", "again"):
        cli.ok("image", "rm", name)
    assert image_bytes(cli) == 0


def image_bytes(cli: Cli) -> int:
    return int(cli.json("tenant", "show", str(cli.tenant))["usage"]["image_bytes"])


def test_quotas_of_images_hold(tenants: TenantFactory, tmp_path: Path) -> None:
    narrow = tenants("--image-bytes", "256k")
    (tmp_path / "disk.qcow2").write_bytes(qcow2(b"\1" * (1 << 20), bits=12, compressed=True))
    assert "data" in narrow.fails("image", "import", "--vm", tmp_path / "disk.qcow2", "large")
    imported(narrow, tmp_path, bios_disk(), "small")


HOSTILE = {
    "backing": (struct.pack(">QI", 104, 11), 8, "backing file"),
    "encrypted": (struct.pack(">I", 2), 32, "encrypted"),
    "data file": (struct.pack(">Q", 4), 72, "external data file"),
}


def test_hostile_disks_are_refused_in_one_line(cli: Cli, tmp_path: Path) -> None:
    whole = qcow2(bios_disk())
    file = tmp_path / "disk.qcow2"

    def refused(data: bytes, *options: str) -> str:
        file.write_bytes(data)
        return cli.fails("image", "import", "--vm", file, "hostile", *options)

    for what, (change, offset, message) in HOSTILE.items():
        assert message in refused(whole[:offset] + change + whole[offset + len(change) :]), what
    named = qcow2(bios_disk(), extensions=extension(0x44415441, b"/etc/shadow"))
    assert "external data file" in refused(named)
    json_name = b'json:{"driver":"file","filename":"/etc/shadow"}'
    backed = bytearray(whole)
    struct.pack_into(">QI", backed, 8, 112, len(json_name))
    backed[112 : 112 + len(json_name)] = json_name
    assert "backing file" in refused(bytes(backed))
    assert "qcow2" in refused(whole, "--format", "raw"), "a format is given, and checked"
    assert "not of format qcow2" in refused(bios_disk())
    extent = b'# Disk DescriptorFile\nversion=1\nRW 2048 FLAT "/etc/shadow" 0\n'
    assert "vmdk" in refused(extent.ljust(1024, b"\0"), "--format", "raw")
    assert "not of format qcow2" in refused(json_name)
    assert "does not tell" in cli.fails("image", "import", "--vm", tmp_path / "disk", "hostile", status=2)
    assert [each for each in cli.json("image", "ls") if each["name"].startswith("hostile")] == []
    file.write_bytes(whole)
    cli.ok("image", "import", "--vm", file, "harmless")


def test_a_machine_boots_and_each_has_a_disk_of_its_own(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    image = imported(cli, tmp_path, bios_disk(), "small")
    first = started(cli, "one", "small", "--disk", "16m")
    assert "mark A" in first and f"sectors {(16 << 20) // 512:08x}" in first, "the disk is as large as asked for"
    devices = re.search(r"devices (.*)", first)
    assert devices and VIRTIO_NET in devices[1] and VIRTIO_DISK in devices[1] and IDE not in devices[1]
    assert status(cli, "one")["state"] == "running"

    began = time.monotonic()
    cli.ok("stop", "-t", "120", "one", timeout=LONG)
    assert time.monotonic() - began < 120 and status(cli, "one")["exit"]["exit_status"] == 0, "it turned itself off"
    assert cli.ok("logs", "one").rstrip().endswith("off")
    cli.ok("start", "one", timeout=LONG)
    until(lambda: "mark B" in cli.ok("logs", "one"), "it finds what it has written", LONG)
    second = started(cli, "two", "small")
    assert "mark A" in second and "mark B" not in second, "another one does not"
    assert f"sectors {DISK // 512:08x}" in second

    daemon.kill("insulad")
    daemon.start()
    assert {status(cli, name)["state"] for name in ("one", "two")} == {"running"}, "they went on"
    stored = daemon.root / "images/disks" / image["disk"]["digest"].removeprefix("sha256:")
    assert stored.read_bytes() == bios_disk(), "and the image is as it was"
    assert "is used by" in cli.fails("image", "rm", "small")
    assert cli.json("verify")["passed"]
    places = [daemon.root / "instances" / each["instance"]["id"] for each in cli.json("ps")]
    assert len(places) == 2 and all((place / "disk").exists() for place in places), "the control"
    cli.ok("rm", "-f", "one", "two")
    assert not any(place.exists() for place in places)


def test_full_virtualization(cli: Cli, tmp_path: Path) -> None:
    """No device shows that it is a guest; the devices of an image can be replaced for an instance."""
    imported(cli, tmp_path, bios_disk(), "old", "--devices", "full")
    shown = started(cli, "full", "old")
    devices = re.search(r"devices (.*)", shown)
    assert devices and E1000 in devices[1] and IDE in devices[1] and "1af4" not in devices[1] and "mark A" in shown
    shown = started(cli, "para", "old", "--devices", "para")
    devices = re.search(r"devices (.*)", shown)
    assert devices and VIRTIO_NET in devices[1] and E1000 not in devices[1]
    cli.ok("rm", "-f", "full", "para")


def test_the_console_and_a_system_that_does_not_listen(cli: Cli, tmp_path: Path) -> None:
    """What is typed arrives, with a terminal and without; a restart by the guest is one; the button has no effect on a
    system that ignores it, so that it is killed when the time is over."""
    imported(cli, tmp_path, bios_disk(), "small")
    with cli.terminal("run", "--vm", "--rm", "-it", "--network", "none", "small") as console:
        console.expect("ready", LONG)
        console.type("xyz")
        console.expect("xyz", LONG)
        console.type("r")
        console.expect("mark B", LONG)
        console.expect("ready", LONG)
        console.type("i")
        console.expect("i", LONG)
        name = cli.json("ps")[0]["instance"]["name"]
        cli.ok("stop", "-t", "3", name, timeout=LONG)
        assert console.wait(LONG) == 137
    assert cli.json("ps", "-a") == []
    cli.ok("run", "-d", "-i", "--vm", "--name", "vm", "--network", "none", "small", timeout=LONG)
    until(lambda: "ready" in cli.ok("logs", "vm"), "it is ready", LONG)
    with cli.terminal("attach", "vm") as console:
        console.type("typed\n")
        for _ in range(2):  # the terminal's echo, and the machine's
            console.expect("typed", LONG)
    cli.ok("kill", "vm")
    assert cli.ok("wait", "vm") == "137"
    cli.ok("rm", "vm")


def test_what_needs_an_agent_says_so(cli: Cli, tmp_path: Path) -> None:
    imported(cli, tmp_path, bios_disk(), "small")
    started(cli, "vm", "small", "--network", "none")
    for words, failed in ((("exec", "vm", "true"), 125), (("cp", "vm:/etc", str(tmp_path / "to")), 1)):
        assert "agent" in cli.fails(*words, status=failed)
    assert "agent" in cli.fails("export", "-o", str(tmp_path / "all"), "vm")
    assert cli.json("inspect", "vm")[0]["guest_report"]["answered"] is False
    cli.ok("pause", "vm")
    assert status(cli, "vm")["state"] == "paused"
    cli.ok("unpause", "vm", timeout=LONG)
    assert status(cli, "vm")["state"] == "running"
    assert any("qemu" in each["command"] for each in cli.json("top", "vm"))
    assert "qemu" in cli.ok("explain", "vm")
    cli.ok("rm", "-f", "vm")
    for options in (("-e", "A=1"), ("--read-only",), ("--entrypoint", "/bin/sh"), ("--cold",), ("-m", "64m")):
        assert cli.run("run", "--vm", *options, "small").status == 125, options
    imported(cli, tmp_path, bios_disk(4 << 20), "large")
    assert "the disk of the image has 4M" in cli.fails("run", "--vm", "--disk", "1m", "large", status=125)
    assert "disk images" in cli.fails("run", "--vm", "--devices", "full", "busybox", status=125)
    assert cli.json("ps", "-a") == []


def test_the_screen(cli: Cli, tmp_path: Path) -> None:
    imported(cli, tmp_path, bios_disk(), "small")
    started(cli, "vm", "small", "--network", "none")
    file = tmp_path / "screen.png"

    def shows_text() -> bool:
        cli.ok("screenshot", "vm", "-o", file)
        width, height, pixels = decoded(file.read_bytes())
        assert (width, height) == (720, 400), "that of a text mode"
        return len(set(pixels)) > 1

    until(shows_text, "the screen shows the text", LONG)
    before = file.read_bytes()
    cli.ok("screenshot", "vm", "-o", file)
    assert decoded(file.read_bytes())[:2] == decoded(before)[:2], "again and again"
    cli.ok("rm", "-f", "vm")
    cli.ok("run", "-d", "--name", "container", "busybox", "sleep", "1000")
    assert "screen" in cli.fails("screenshot", "container")
    cli.ok("rm", "-f", "container")


def decoded(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and data of a picture (PNG, RFC 2083), whose rows are not unfiltered."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack_from(">II", png, 16)
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    return width, height, zlib.decompress(data)


def test_cloud_init_is_told_who_it_is(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    imported(cli, tmp_path, bios_disk(), "small")
    (tmp_path / "data").write_text("#cloud-config\npackages: [nginx]\n")
    (tmp_path / "keys").write_text("# mine\nssh-ed25519 AAAA ann\n\nssh-rsa BBBB ben\n")
    given = ("--user-data", str(tmp_path / "data"), "--ssh-key", str(tmp_path / "keys"), "--ssh-key", "ssh-rsa C c")
    started(cli, "vm", "small", *given, "--hostname", "web.example")
    started(cli, "other", "small")
    seeds = {}
    for each in cli.json("ps"):
        instance = each["instance"]
        path = daemon.root / "instances" / instance["id"] / "seed"
        assert path.stat().st_size == cloud_init.SIZE and path.stat().st_blocks * 512 < 1 << 20
        seeds[instance["name"]] = read(path.read_bytes())
        assert instance["id"].encode() in seeds[instance["name"]]["meta-data"]
        assert instance["ports"][0]["mac"].encode() in seeds[instance["name"]]["network-config"]
    assert seeds["vm"]["user-data"] == (tmp_path / "data").read_bytes()
    assert b'"local-hostname": "web.example"' in seeds["vm"]["meta-data"]
    assert b'["ssh-ed25519 AAAA ann", "ssh-rsa BBBB ben", "ssh-rsa C c"]' in seeds["vm"]["meta-data"]
    assert b"public-keys" not in seeds["other"]["meta-data"]
    cli.ok("rm", "-f", "vm", "other")


@pytest.mark.skipif(firmware.find() is None, reason="UEFI firmware is not installed: apt install ovmf")
def test_a_machine_boots_by_uefi_with_variables_of_its_own(cli: Cli, tmp_path: Path, daemon: Daemon) -> None:
    imported(cli, tmp_path, uefi_disk(), "modern", "--firmware", "uefi")
    for name, devices in (("para", "para"), ("full", "full")):
        assert "small system by UEFI" in started(cli, name, "modern", "--devices", devices)
    found = firmware.find()
    assert found is not None
    ids = {each["instance"]["name"]: each["instance"]["id"] for each in cli.json("ps")}
    paths = [daemon.root / "instances" / each / "variables" for each in ids.values()]
    assert len(paths) == 2 and all(path.stat().st_size == found.variables.stat().st_size for path in paths)
    assert all(path.read_bytes() != found.variables.read_bytes() for path in paths), "each has written its own"
    cli.ok("stop", "-t", "120", "para", timeout=LONG)
    assert status(cli, "para")["exit"]["exit_status"] == 0
    for name in ("disk", "variables"):
        with (daemon.root / "instances" / ids["para"] / name).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the control: a machine that has ended has none locked
            assert f"{name} of para is in use by process {os.getpid()} " in cli.fails("start", "para")
    for name in ("disk", "variables", "seed"):
        with (daemon.root / "instances" / ids["full"] / name).open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    cli.ok("start", "para", timeout=LONG)
    cli.ok("rm", "-f", "para", "full")
