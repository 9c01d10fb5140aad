"""Disk images become sparse raw files with the same content, and tricks of hostile ones are refused."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from insula.cli.disk_image import format_of
from insula.cli.options import UsageError
from insula.image.disk import convert as conversion
from insula.image.disk.convert import BLOCK, ConvertedDisk, DiskFormat
from insula.image.disk.raw import firmware_of
from insula.model.errors import Invalid
from tests.support.qcow2 import extension, qcow2

_MOST = 1 << 30


def content(size: int = 3 << 20, seed: int = 1) -> bytes:
    """A disk with data at both ends, between holes, and over the border of a block."""
    made, some = bytearray(size), random.Random(seed)
    for at, length in ((0, 700), (BLOCK - 100, 300), (size // 2, 3 * BLOCK), (size - 512, 512)):
        made[at : at + length] = some.randbytes(length // 2) + b"\1" * (length - length // 2)
    return bytes(made)


def converted(tmp_path: Path, data: bytes, kind: DiskFormat, most: int = _MOST) -> tuple[ConvertedDisk, bytes]:
    """What a disk image becomes, and the bytes of the file."""
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "target").unlink(missing_ok=True)
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "xb") as target:
        made = conversion.convert(conversion.open_source(source.fileno(), kind), target.fileno(), most)
        os.truncate(target.fileno(), min(made.size, 1 << 27))
    return made, (tmp_path / "target").read_bytes()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_qcow2_is_the_disk_that_it_was_made_of(tmp_path: Path, bits: int, version: int, compressed: bool) -> None:
    data = content()
    raw, plain = converted(tmp_path, data, "raw")
    made, found = converted(tmp_path, qcow2(data, bits=bits, version=version, compressed=compressed), "qcow2")
    assert found == plain == data
    assert made == raw, "the digest and what is stored are of the content, not of the format"


def test_zeros_are_holes_whoever_wrote_them(tmp_path: Path) -> None:
    made, _ = converted(tmp_path, content(64 << 20), "raw")
    assert made.size == 64 << 20 and made.stored <= 8 * BLOCK
    assert (tmp_path / "target").stat().st_blocks * 512 < 4 << 20


@pytest.mark.parametrize("size", [512, BLOCK, BLOCK + 512, BLOCK - 512, 5 * BLOCK + 1024])
def test_any_number_of_sectors(tmp_path: Path, size: int) -> None:
    data = bytes([1]) * size
    for kind, image in (("raw", data), ("qcow2", qcow2(data))):
        made, found = converted(tmp_path, image, kind)  # type: ignore[arg-type]
        assert (made.size, made.stored, found) == (size, size, data)
    made, found = converted(tmp_path, bytes(size), "raw")
    assert (made.stored, found) == (0, bytes(size))


def test_the_digest_is_of_content_size_and_place(tmp_path: Path) -> None:
    disks = [content(), content(seed=2), content() + bytes(BLOCK), bytes(BLOCK) + content()]
    assert len({converted(tmp_path, disk, "raw")[0].digest for disk in disks}) == len(disks)
    assert converted(tmp_path, b"x", "raw")[0].size == 512, "a part of a sector is a sector"


def test_no_more_data_than_allowed(tmp_path: Path) -> None:
    """A small file that is a large disk: all of its clusters are one."""
    data = bytearray(qcow2(b"\1" * BLOCK * 64))
    table = struct.unpack_from(">Q", data, BLOCK)[0] & ~(1 << 63)
    first = data[table : table + 8]
    data[table : table + 64 * 8] = first * 64
    assert converted(tmp_path, bytes(data), "qcow2", 64 * BLOCK)[0].stored == 64 * BLOCK
    with pytest.raises(Invalid, match="of data"):
        converted(tmp_path, bytes(data), "qcow2", 63 * BLOCK)


def test_a_large_disk_that_is_empty_takes_no_time_and_no_space(tmp_path: Path) -> None:
    data = bytearray(qcow2(bytes(1 << 20)))
    struct.pack_into(">Q", data, 24, 1 << 38)  # 512 tables
    struct.pack_into(">I", data, 36, 512)
    made, _ = converted(tmp_path, bytes(data), "qcow2")
    assert made.size == 1 << 38 and made.stored == 0


Change = Callable[[bytearray], object]


def put(form: str, offset: int, *values: object) -> Change:
    return lambda data: struct.pack_into(form, data, offset, *values)


TABLE = 0x10000
REFUSED: dict[str, tuple[Change, str]] = {
    "backing file": (put(">QI", 8, 0x200, 12), "backing file"),
    "backing file without a name": (put(">Q", 8, 0x200), "backing file"),
    "AES": (put(">I", 32, 1), "encrypted"),
    "LUKS": (put(">I", 32, 2), "encrypted"),
    "data file": (put(">Q", 72, 1 << 2), "external data file"),
    "corrupt": (put(">Q", 72, 1 << 1), "corrupt"),
    "extended entries": (put(">Q", 72, 1 << 4), "extended"),
    "zstd": (put(">Q", 72, 1 << 3), "zstd"),
    "unknown feature": (put(">Q", 72, 1 << 17), "not known"),
    "version 1": (put(">I", 4, 1), "version 1"),
    "version 4": (put(">I", 4, 4), "version 4"),
    "other magic": (put(">4s", 0, b"KDMV"), "not of format qcow2"),
    "clusters of 256 bytes": (put(">I", 20, 8), "clusters"),
    "clusters of 4 MiB": (put(">I", 20, 22), "clusters"),
    "empty": (put(">Q", 24, 0), "empty"),
    "too large": (put(">Q", 24, 1 << 41), "may have"),
    "as large as can be": (put(">Q", 24, (1 << 64) - 1), "may have"),
    "table too short": (put(">I", 36, 0), "table"),
    "table outside": (put(">Q", 40, 1 << 40), "not in the file"),
    "table at the end of numbers": (put(">Q", 40, (1 << 64) - 512), "not in the file"),
    "header too long": (put(">I", 100, 1 << 31), "header"),
    "header too short": (put(">I", 100, 72), "header"),
    "second table outside": (put(">Q", TABLE, 1 << 40), "not in the file"),
    "second table unaligned": (put(">Q", TABLE, 0x10200), "table"),
    "second table reserved": (put(">Q", TABLE, 1 << 60 | 0x20000), "table"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path: Path, what: str) -> None:
    change, message = REFUSED[what]
    data = bytearray(qcow2(content()))
    converted(tmp_path, bytes(data), "qcow2")  # the control: unchanged it is a disk
    change(data)
    with pytest.raises(Invalid, match=message) as refused:
        converted(tmp_path, bytes(data), "qcow2")
    assert refused.value.hint and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (1 << 40, "leads to no cluster"),
        (0x10200, "reserved|leads to no cluster"),
        (1 << 57 | 0x20000, "reserved"),
        (1 << 62, "does not decompress"),
        (1 << 62 | 1 << 53, "does not decompress"),
        (1 << 62 | 0x10001, "does not decompress"),
    ],
)
def test_entries_that_are_refused(tmp_path: Path, entry: int, message: str) -> None:
    data = bytearray(qcow2(content()))
    table = struct.unpack_from(">Q", data, TABLE)[0] & ~(1 << 63)
    struct.pack_into(">Q", data, table, entry)
    with pytest.raises(Invalid, match=message):
        converted(tmp_path, bytes(data), "qcow2")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(0x44415441, "external data file"), (0xE2792ACA, "backing file"), (0x0537BE77, "encrypted")],
)
def test_extensions_that_are_refused(tmp_path: Path, kind: int, message: str) -> None:
    harmless = extension(0x6803F857, b"names of features")
    converted(tmp_path, qcow2(content(), extensions=harmless), "qcow2")
    with pytest.raises(Invalid, match=message):
        converted(tmp_path, qcow2(content(), extensions=harmless + extension(kind, b"/etc/shadow")), "qcow2")


def test_extensions_end_in_the_header(tmp_path: Path) -> None:
    data = qcow2(content(), extensions=struct.pack(">II", 0x6803F857, 0xFFFFFFFF))
    with pytest.raises(Invalid, match="header"):
        converted(tmp_path, data, "qcow2")


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 103, 104, 200, TABLE, TABLE + 4])
def test_what_is_cut_off(tmp_path: Path, length: int) -> None:
    with pytest.raises(Invalid):
        converted(tmp_path, qcow2(content())[:length], "qcow2")


def test_nothing_but_a_message_comes_of_noise(tmp_path: Path) -> None:
    some = random.Random(7)
    whole = qcow2(content(1 << 20), compressed=True)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(some.randint(1, 6)):
            data[some.choice([some.randrange(112), TABLE + some.randrange(16), some.randrange(len(data))])] = (
                some.randrange(256)
            )
        try:
            converted(tmp_path, bytes(data), "qcow2", 4 << 20)
        except Invalid as error:
            assert error.message and error.hint


@pytest.mark.parametrize(
    ("begin", "name"),
    [
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"KDMV", "vmdk"),
        (b'# Disk DescriptorFile\nRW 2048 FLAT "/etc/shadow" 0', "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"LUKS\xba\xbe", "luks"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
    ],
)
def test_a_raw_disk_is_not_the_header_of_another_format(tmp_path: Path, begin: bytes, name: str) -> None:
    with pytest.raises(Invalid, match=name):
        converted(tmp_path, begin.ljust(BLOCK, b"\0"), "raw")
    with pytest.raises(Invalid, match="empty"):
        converted(tmp_path, b"", "raw")


def test_the_name_tells_the_format() -> None:
    assert [format_of(name) for name in ("a.raw", "/b/c.QCOW2", "d.qcow")] == ["raw", "qcow2", "qcow2"]
    for name in ("a.img", "-", "raw", "json:{}", "a.vmdk", "b.qcow2.xz"):
        with pytest.raises(UsageError):
            format_of(name)


def test_the_firmware_that_a_disk_is_for() -> None:
    code = b"\xeb\x63".ljust(510, b"\x90") + b"\x55\xaa"
    assert firmware_of(code) == "bios"
    assert firmware_of(bytes(510) + b"\x55\xaa") == "uefi", "a protective partition table has no code"
    assert firmware_of(code[:510]) == firmware_of(bytes(512)) == "uefi"


def test_holes_of_a_raw_file_are_skipped(tmp_path: Path) -> None:
    source = tmp_path / "large"
    with source.open("wb") as file:
        file.truncate(1 << 38)
        file.seek(1 << 37)
        file.write(b"here")
    with source.open("rb") as file, (tmp_path / "target").open("xb") as target:
        made = conversion.convert(conversion.open_source(file.fileno(), "raw"), target.fileno(), _MOST)
    assert (made.size, made.stored) == (1 << 38, BLOCK)
    fd = os.open(tmp_path / "target", os.O_RDONLY)
    assert os.pread(fd, 4, 1 << 37) == b"here"
    os.close(fd)
