"""A disk that boots Linux by a BIOS: a loader in its boot sector, a kernel, and an initramfs of busybox.

The loader reads pieces of the disk into memory, as the table in the second sector says, and enters the kernel as a
hypervisor would do (PVH, Documentation/x86 of Linux and docs/misc/pvh.pandoc of Xen): the kernel is there without the
part that unpacks it. Its bytes are what binutils make of the text:

    as --32 LOADER.S -o LOADER.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary LOADER.o -o LOADER.bin
"""

from __future__ import annotations

import struct
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from insula.machine.guest.cpio import CpioArchive
from insula.machine.guest.modules import Modules
from tests.support.small_systems import BOOT_SECTOR, SECTOR

MEMORY = 256 << 20
"""Bytes of memory that the machine must have."""
INFO = 0x9000
"""The address of what a kernel is told of its start."""
_INITRAMFS = 96 << 20
_SOURCE = (
    BOOT_SECTOR
    + r"""
    cld
    mov [0x8400], dl
    mov dword ptr [lba], 1
    mov word ptr [count], 1
    mov word ptr [segment], 0x800
    call read
    mov bx, 0x8008
entry:
    mov eax, [bx]
    mov [lba], eax
    mov ebp, [bx + 4]
    mov edi, [bx + 8]
    test ebp, ebp
    jz go
chunk:
    mov ecx, 64
    cmp ebp, ecx
    jae 1f
    mov ecx, ebp
1:  mov [count], cx
    mov word ptr [segment], 0x1000
    call read
    call unreal
    push ecx
    mov esi, 0x10000
    shl ecx, 7
    addr32 rep movsd
    pop ecx
    add [lba], ecx
    sub ebp, ecx
    jnz chunk
    add bx, 12
    jmp entry
go:
    cli
    lgdt [table]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    ljmp 8, offset protected

read:
    pushad
    mov ah, 0x42
    mov dl, [0x8400]
    mov si, offset packet
    int 0x13
    popad
    jnc 2f
    mov al, '!'
    mov dx, 0x3f8
    out dx, al
    hlt
2:  ret

unreal:
    cli
    push ds
    push es
    lgdt [table]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    mov dx, 16
    mov ds, dx
    mov es, dx
    and al, 0xfe
    mov cr0, eax
    pop es
    pop ds
    sti
    ret

.code32
protected:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov ebx, [0x8004]
    jmp dword ptr [0x8000]

.balign 4
packet: .byte 16, 0
count:  .word 1
        .word 0
segment: .word 0
lba:    .quad 0
table:  .word 23
        .long descriptors
descriptors:
        .quad 0
        .quad 0x00cf9a000000ffff
        .quad 0x00cf92000000ffff
"""
)
_LOADER = b64decode(
    "McCO2I7AjtC8AHzqEHwAAPv8iBYAhGbHBvB8AQAAAMcG6nwBAMcG7nwACOhpALsIgGaLB2aj8Hxmi28EZot/CGaF7XQ/ZrlAAAAA"
    "ZjnNcwNmiemJDup8xwbufAAQ6DcA6E0AZlFmvgAAAQBmweEHZ2bzpWZZZgEO8HxmKc11xoPDDOut+g8BFvh8DyDADAEPIsDq0HwI"
    "AGZgtEKKFgCEvuh8zRNmYXMHsCG6+APu9MP6HgYPARb4fA8gwAwBDyLAuhAAjtqOwiT+DyLABx/7w2a4EACO2I7AjtCLHQSAAAD/"
    "JQCAAABmkBAAAQAAAAAAAAAAAAAAAAAXAP58AAAAAAAAAAAAAP//AAAAms8A//8AAACSzwA="
)
_DRIVERS = (
    *("virtio_pci", "virtio_blk", "virtio_net", "e1000", "ata_piix", "ahci", "sd_mod", "vfat"),
    *("nls_ascii", "nls_cp437", "nls_utf8", "nls_iso8859-1", "af_packet"),
)
_APPLETS = (
    *("sh", "ls", "cat", "echo", "insmod", "ip", "mount", "nc", "sleep", "tr", "udhcpc", "sync", "poweroff"),
    *("date", "mkdir", "head", "umount"),
)


class Piece(NamedTuple):
    """A part of memory, by its physical address."""

    address: int
    data: bytes


def linux_disk(
    kernel: Path, script: str, *, drivers: Sequence[str] = _DRIVERS, files: Mapping[str, bytes] | None = None
) -> bytes:
    """A disk whose first program is a shell with this script. `kernel` is the directory of a kernel of Debian for all
    hardware (scripts/systems), unless others of its `drivers` are named. `files` are programs that it has as well."""
    entry, pieces = linux_pieces(kernel, script, drivers, files)
    table, body = struct.pack("<II", entry, INFO), b""
    for address, data in pieces:
        table += struct.pack("<III", 2 + len(body) // SECTOR, -(-len(data) // SECTOR), address)
        body += data + bytes(-len(data) % SECTOR)
    assert len(table) + 12 <= SECTOR
    return _LOADER.ljust(510, b"\0") + b"\x55\xaa" + table.ljust(SECTOR, b"\0") + body


def linux_pieces(
    kernel: Path, script: str, drivers: Sequence[str] = _DRIVERS, files: Mapping[str, bytes] | None = None
) -> tuple[int, list[Piece]]:
    """Where such a system is entered, and what it has in memory then; see `linux_disk`."""
    elf = (kernel / "vmlinux").read_bytes()
    initramfs = _initramfs(kernel / "modules", script, drivers, files or {})
    info = Piece(INFO, _start_info(len(initramfs), "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"))
    return _entry(elf), [info, *_segments(elf), Piece(_INITRAMFS, initramfs)]


def _start_info(initramfs: int, parameters: str) -> bytes:
    """struct hvm_start_info, with the lists that it leads to."""
    memory = [(0, 0x9F000), (1 << 20, MEMORY - (3 << 20))]  # at the end are tables of the firmware
    info = struct.pack("<IIIIQQQQII", 0x336EC578, 1, 0, 1, INFO + 64, INFO + 256, 0, INFO + 128, len(memory), 0)
    module = struct.pack("<QQQQ", _INITRAMFS, initramfs, 0, 0)
    areas = b"".join(struct.pack("<QQII", *each, 1, 0) for each in memory)
    return (info.ljust(64, b"\0") + module).ljust(128, b"\0") + areas.ljust(128, b"\0") + parameters.encode() + b"\0"


def _headers(elf: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type, offset, physical address and size of each segment (elf(5))."""
    table, size, count = *struct.unpack_from("<Q", elf, 32), *struct.unpack_from("<HH", elf, 54)
    for number in range(count):
        kind, _, offset, _, address, length = struct.unpack_from("<IIQQQQ", elf, table + number * size)
        yield kind, offset, address, length


def _segments(elf: bytes) -> list[Piece]:
    loaded = [each[1:] for each in _headers(elf) if each[0] == 1 and each[3]]
    return [Piece(address, elf[at : at + length]) for at, address, length in loaded]


def _entry(elf: bytes) -> int:
    """The address in the note XEN_ELFNOTE_PHYS32_ENTRY."""
    for kind, at, _, length in _headers(elf):
        end = at + length
        while kind == 4 and at + 12 <= end:
            name, description, number = struct.unpack_from("<III", elf, at)
            begin = at + 12 + -(-name // 4) * 4
            if number == 18 and elf[at + 12 : at + 16] == b"Xen\0":
                return int(struct.unpack_from("<I", elf, begin)[0])
            at = begin + -(-description // 4) * 4
    raise LookupError("the kernel can't be entered by PVH")


def _initramfs(modules: Path, script: str, drivers: Sequence[str], files: Mapping[str, bytes]) -> bytes:
    archive = CpioArchive()
    archive.device("/dev/console", 5, 1)
    for directory in ("/proc", "/sys", "/mnt"):
        archive.directory(directory)
    archive.file("/bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    for name in _APPLETS:
        archive.symlink(f"/bin/{name}", "busybox")
    for number, (name, data) in enumerate(Modules(modules).in_order(drivers)):
        archive.file(f"/modules/{number:02}-{name}.ko", data)
    for path, data in files.items():
        archive.file(path, data, 0o755)
    archive.file("/bin/lease", LEASE.encode(), 0o755)
    archive.file("/init", (BEGIN + script).encode(), 0o755)
    return archive.finish()


BEGIN = """\
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for each in /modules/*; do insmod $each; done
ip link set lo up
"""
LEASE = """\
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo "lease $ip router $router mtu $mtu"
"""
