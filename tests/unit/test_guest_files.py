"""The parts of a guest: the archive that the kernel unpacks, modules in order, and the kernel in a bzImage."""

from __future__ import annotations

import gzip
import struct
import subprocess
from pathlib import Path

import pytest

from insula.machine.guest import bzimage, modules
from insula.machine.guest.cpio import CpioArchive


def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    archive = CpioArchive()
    archive.file("/a/b/c", b"contents", 0o755)
    archive.file("/a/b/d", b"x" * 4097)
    archive.directory("/a/b")
    archive.symlink("/lib64/l", "../a/b/c")
    archive.device("/dev/null", 1, 3, 0o666)
    (tmp_path / "made").mkdir()
    data = archive.finish()
    done = subprocess.run(["busybox", "cpio", "-idm"], cwd=tmp_path / "made", input=data, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made/a/b/c").read_bytes() == b"contents"
    assert (tmp_path / "made/a/b/c").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "made/lib64/l").read_bytes() == b"contents"
    assert len((tmp_path / "made/a/b/d").read_bytes()) == 4097


def bz_image(payload: bytes, *, version: int = 0x20F) -> bytes:
    image = bytearray(2 * 512)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + bytes(16) + payload


def test_the_kernel_in_a_bzimage() -> None:
    kernel = bzimage.ELF + bytes(5000)
    assert bzimage.vmlinux(bz_image(gzip.compress(kernel))) == kernel
    size = struct.pack("<I", len(kernel))
    packed = subprocess.run(["zstd", "-c"], input=kernel, capture_output=True, check=True).stdout
    assert bzimage.vmlinux(bz_image(packed + size)) == kernel


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "no bzImage"),
        (bytes(4096), "no bzImage"),
        (bz_image(b"?", version=0x207), "older"),
        (bz_image(gzip.compress(b"text")), "no ELF"),
        (bz_image(b"????????"), "not known"),
        (bz_image(b"")[:600], "no bzImage|cut off|not known"),
    ],
)
def test_what_is_no_kernel(image: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        bzimage.vmlinux(image)


def elf(modinfo: bytes) -> bytes:
    """A 64-bit ELF file with one section beside its names."""
    names = b"\0.modinfo\0.shstrtab\0"
    body = 64
    table = body + len(modinfo) + len(names)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = [(0,) * 10]
    sections.append((1, 1, 0, 0, body, len(modinfo), 0, 0, 1, 0))
    sections.append((10, 3, 0, 0, body + len(modinfo), len(names), 0, 0, 1, 0))
    return header + modinfo + names + b"".join(struct.pack("<IIQQQQIIQQ", *each) for each in sections)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "kernel/drivers").mkdir(parents=True)
    needs = {"virtio-net": b"failover,virtio", "failover": b"", "virtio": b"virtio_ring", "virtio_ring": b""}
    for name, depends in needs.items():
        (tmp_path / f"kernel/drivers/{name}.ko").write_bytes(elf(b"license=GPL\0depends=" + depends + b"\0"))
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    found = [name for name, _ in modules.Modules(tmp_path).in_order(["virtio_net", "ext4", "virtio"])]
    assert found == ["failover", "virtio_ring", "virtio", "virtio_net"]
    with pytest.raises(LookupError, match="no module erofs"):
        modules.Modules(tmp_path).in_order(["erofs"])
    with pytest.raises(ValueError, match="no 64-bit ELF"):
        modules.dependencies(b"text")
