"""What machines of disk images are given beside their disk: the file system of the seed disk, and firmware."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from insula.machine.disk import cloud_init, fat, firmware
from insula.machine.disk.cloud_init import SeedInterface
from insula.machine.qemu import disk_machine
from insula.machine.qemu.command_line import GuestDisk, GuestInterface
from insula.machine.qemu.disk_machine import DiskMachine
from tests.support import linux_disk, small_iso, small_systems


def read(disk: bytes) -> dict[str, bytes]:
    """The files of a FAT16, by an own reading of the format."""
    sector, per, reserved, fats, entries = struct.unpack_from("<HBHBH", disk, 11)
    length = struct.unpack_from("<H", disk, 22)[0]
    root = (reserved + fats * length) * sector
    table = struct.unpack_from(f"<{length * sector // 2}H", disk, reserved * sector)
    data = root + entries * 32
    copy = disk[(reserved + length) * sector : (reserved + 2 * length) * sector]
    assert copy == disk[reserved * sector : (reserved + length) * sector]

    def chain(cluster: int) -> bytes:
        found = b""
        while cluster and cluster < 0xFFF8:
            at = data + (cluster - 2) * per * sector
            found += disk[at : at + per * sector]
            cluster = table[cluster]
        return found

    def directory(raw: bytes, path: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        name = ""
        for at in range(0, len(raw), 32):
            entry = raw[at : at + 32]
            if entry[0] == 0:
                break
            if entry[11] == 0x0F:
                text = (entry[1:11] + entry[14:26] + entry[28:32]).decode("utf-16-le")
                name = text.partition("\0")[0].rstrip("\uffff") + name
                continue
            short = entry[:8].decode().rstrip() + ("." + entry[8:11].decode().rstrip()).rstrip(".")
            cluster, size = struct.unpack_from("<HI", entry, 26)
            own, name = path + (name or short), ""
            if entry[11] == 0x10 and entry[:1] != b".":
                found |= directory(chain(cluster), f"{own}/")
            elif entry[11] == 0x20:
                found[own] = chain(cluster)[:size]
        return found

    return directory(disk[root:data], "")


def image(files: dict[str, bytes], size: int = 16 << 20) -> bytes:
    made = bytearray(size)
    for offset, piece in fat.build(files, "CIDATA", size):
        made[offset : offset + len(piece)] = piece
    return bytes(made)


def test_files_are_found_by_their_names() -> None:
    files = {
        "meta-data": b"x" * 5000,
        "user-data": b"",
        "network-config": b"{}",
        "EFI/BOOT/BOOTX64.EFI": bytes(range(256)) * 300,
        "EFI/BOOT/a name of 26 characters.txt": b"1",
        "EFI/BOOT/exactly-13.ab": b"2",
        "EFI/BOOT/twenty-six-characters-1234": b"3",
    }
    assert read(image(files)) == files
    assert b"CIDATA" in image(files)[:64]


@pytest.mark.parametrize("size", [1 << 20, 8 << 30])
def test_sizes_that_are_no_fat16(size: int) -> None:
    with pytest.raises(ValueError, match="FAT16"):
        fat.build({}, "X", size)
    with pytest.raises(ValueError, match="large"):
        fat.build({"a": bytes(17 << 20)}, "X", 16 << 20)


def test_what_cloud_init_is_told() -> None:
    first_port = SeedInterface("02:00:00:00:00:02", 1450, "fd00::2/64", "fd00::1")
    interfaces = [first_port, SeedInterface("02:00:00:00:00:03", 1500)]
    files = cloud_init.files("id-1", "web", interfaces, ["ssh-ed25519 AAAA ann"], None)
    about, network = json.loads(files["meta-data"]), json.loads(files["network-config"])
    assert about == {"instance-id": "id-1", "local-hostname": "web", "public-keys": ["ssh-ed25519 AAAA ann"]}
    assert files["user-data"].startswith(b"#cloud-config\n")
    first, second = network["ethernets"].values()
    assert first["match"] == {"macaddress": "02:00:00:00:00:02"} and first["mtu"] == 1450 and first["dhcp4"]
    assert first["addresses"] == ["fd00::2/64"] and first["routes"] == [{"to": "::/0", "via": "fd00::1"}]
    assert second["dhcp4-overrides"] == {"use-routes": False} and "addresses" not in second
    assert not any("set-name" in each for each in network["ethernets"].values())
    given = cloud_init.files("id-1", "web", [], [], "#!/bin/sh\necho hi\n")
    assert given["user-data"] == b"#!/bin/sh\necho hi\n" and "public-keys" not in json.loads(given["meta-data"])


def descriptor(directory: Path, name: str, **changes: object) -> None:
    code, variables = directory / "code.fd", directory / "vars.fd"
    code.touch()
    variables.touch()
    names = {"executable": code, "nvram-template": variables}
    files = {part: {"filename": str(path), "format": "raw"} for part, path in names.items()}
    found: dict[str, object] = {
        "interface-types": ["uefi"],
        "mapping": {"device": "flash", **files},
        "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": ["acpi-s3", "verbose-dynamic"],
    }
    (directory / name).write_text(json.dumps(found | changes))


def test_firmware_is_found_by_its_descriptors(tmp_path: Path) -> None:
    own, system = tmp_path / "own", tmp_path / "system"
    own.mkdir()
    system.mkdir()
    assert firmware.find([own, system]) is None and firmware.find([tmp_path / "none"]) is None
    descriptor(system, "40-secure.json", features=["requires-smm", "enrolled-keys"])
    descriptor(system, "41-bios.json", **{"interface-types": ["bios"]})
    descriptor(system, "42-arm.json", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    (system / "43-broken.json").write_text("{")
    (system / "44-list.json").write_text("[]")
    assert firmware.find([own, system]) is None
    descriptor(system, "60-plain.json")
    found = firmware.find([own, system])
    assert found and found.code == system / "code.fd" and found.variables == system / "vars.fd"
    descriptor(own, "60-plain.json")
    found = firmware.find([own, system])
    assert found and found.code == own / "code.fd", "that of the host's administrator replaces it"
    (own / "60-plain.json").write_bytes(b"")
    assert firmware.find([own, system]) is None, "and an empty one hides it"
    (own / "60-plain.json").unlink()
    (system / "code.fd").unlink()
    assert firmware.find([own, system]) is None


def words(**changes: object) -> str:
    interfaces = [GuestInterface("02:00:00:00:00:02", 9, 1450)]
    machine = DiskMachine(256, disk=5, seed=6, qmp=4, interfaces=interfaces)
    return " ".join(disk_machine.arguments(machine._replace(**changes)))  # type: ignore[arg-type]


def test_the_devices_of_a_machine() -> None:
    para, full = words(), words(devices="full")
    assert "virtio-blk-pci,drive=disk" in para and "host_mtu=1450" in para and "virtio-rng" in para
    assert "e1000,netdev=net1" in full and "ide-hd,bus=ide.0,drive=disk" in full and "virtio" not in full
    for each in (para, full):
        assert "format=" not in each and "driver=raw" in each and "mac=02:00:00:00:00:02" in each
        assert each.count("bootindex") == 1 and "strict=on" in each and "elevateprivileges=deny" in each
    assert "pflash0" not in para and "-M pc," in full
    assert "-device virtio-net-pci,host_mtu=1450" in para and "bus=bridge,addr=0x1" in para and "bus=pci.0" in full
    further = [GuestDisk("data", 10), GuestDisk("more", 11)]
    para, full = words(further=further), words(further=further, devices="full")
    assert "virtio-blk-pci,drive=further9,id=further9,serial=data,bus=bridge,addr=0x9" in para
    assert "ide-hd,bus=ahci0.1,drive=further-1,id=further-1,serial=more" in full and full.count("ich9-ahci") == 1
    assert words(further=7 * further[:1], devices="full").count("ich9-ahci") == 2
    for each in (words(code=7, variables=8), words(code=7, variables=8, devices="full")):
        assert "-M q35,smm=off,memory-backend=ram,pflash0=code,pflash1=variables" in each
        assert "fdset/7,node-name=code-file,locking=off,read-only=on" in each


@pytest.mark.skipif(not shutil.which("as") or not shutil.which("ld"), reason="binutils are not installed")
def test_the_small_systems_are_what_their_source_says(tmp_path: Path) -> None:
    def run(*command: str) -> None:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)

    (tmp_path / "bios.S").write_text(small_systems._BIOS_SOURCE)
    (tmp_path / "uefi.S").write_text(small_systems._UEFI_SOURCE)
    (tmp_path / "linux.S").write_text(linux_disk._SOURCE)
    (tmp_path / "installer.S").write_text(small_iso._SOURCE)
    for name in ("bios", "linux", "installer"):
        run("as", "--32", f"{name}.S", "-o", f"{name}.o")
        run("ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", f"{name}.o", "-o", f"{name}.bin")
    run("as", "--64", "uefi.S", "-o", "uefi.o")
    run("objcopy", "-O", "binary", "-j", ".text", "uefi.o", "uefi.bin")
    assert (tmp_path / "bios.bin").read_bytes() == small_systems._BIOS
    assert (tmp_path / "linux.bin").read_bytes() == linux_disk._LOADER
    assert (tmp_path / "installer.bin").read_bytes() == small_iso._CODE
    assert (tmp_path / "uefi.bin").read_bytes() == small_systems._UEFI
