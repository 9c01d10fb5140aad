"""CDs that boot, for tests: with a BIOS an installer, which writes a small system to the first disk, and restarts the
machine when a key is pressed; with UEFI the small system itself.

The bytes of the installer are what binutils make of the text:

    as --32 INSTALLER.S -o INSTALLER.o
    ld -m elf_i386 -Ttext 0x7c00 --oformat binary INSTALLER.o -o INSTALLER.bin
"""

from __future__ import annotations

import struct
from base64 import b64decode

from insula.machine.disk import fat
from tests.support.small_systems import BOOT_SECTOR, SECTOR, UEFI_FILES, bios_disk

BLOCK = 2048
_ROOT, _CATALOG, _INSTALLER, _FAT = 19, 20, 21, 22  # blocks
_FAT_SIZE = 3 << 20
_SOURCE = (
    BOOT_SECTOR
    + r"""
    mov si, offset hello
    call print
    mov ax, 0x4300
    mov dl, 0x80
    mov si, offset packet
    int 0x13
    mov si, offset failed
    jc 1f
    mov si, offset done
1:  call print
wait:
    mov dx, 0x3fd
    in al, dx
    test al, 1
    jz wait
    mov al, 0xfe
    out 0x64, al
2:  hlt
    jmp 2b

print:
    lodsb
    test al, al
    jz 4f
    mov ah, al
    mov dx, 0x3fd
3:  in al, dx
    test al, 0x20
    jz 3b
    mov dx, 0x3f8
    mov al, ah
    out dx, al
    jmp print
4:  ret

packet: .byte 16, 0, 2, 0
    .word 0x7e00, 0
    .quad 0
hello: .asciz "\r\ninstaller\r\n"
done: .asciz "installed\r\n"
failed: .asciz "there is no disk\r\n"
"""
)
_CODE = b64decode(
    "McCO2I7AjtC8AHzqEHwAAPu+Y3zoJAC4AEOygL5TfM0Tvn18cgO+cXzoDwC6/QPsqAF0+LD+5mT06/2shMB0EojEuv0D7KggdPu6+AOI"
    "4O7r6cMQAAIAAH4AAAAAAAAAAAAADQppbnN0YWxsZXINCgBpbnN0YWxsZWQNCgB0aGVyZSBpcyBubyBkaXNrDQoA"
)


def iso(*, bios: bool = True, uefi: bool = False, data: bytes = b"") -> bytes:
    """An ISO 9660 with a boot catalog (El Torito). `data` is at its end, a file with the name data."""
    made = bytearray((_FAT * BLOCK) + (_FAT_SIZE if uefi else 0))
    boots = [(0, _INSTALLER, 4)] * bios + [(0xEF, _FAT, _FAT_SIZE // SECTOR)] * uefi
    if bios:
        _put(made, _INSTALLER, _CODE.ljust(SECTOR, b"\0") + bios_disk(2 * SECTOR))
    if uefi:
        for offset, piece in fat.build(UEFI_FILES, "SYSTEM", _FAT_SIZE):
            made[_FAT * BLOCK + offset : _FAT * BLOCK + offset + len(piece)] = piece
    root = [_record(b"\0", _ROOT, BLOCK), _record(b"\1", _ROOT, BLOCK)]
    _put(made, _ROOT, b"".join([*root, _record(b"DATA.;1", len(made) // BLOCK, len(data))]))
    made += data + bytes(-len(data) % BLOCK)
    _put(made, 16, _volume(len(made) // BLOCK))
    if boots:
        record = b"\0CD001\1" + b"EL TORITO SPECIFICATION".ljust(64, b"\0") + struct.pack("<I", _CATALOG)
        _put(made, 17, record)
        _put(made, _CATALOG, _catalog(boots))
    _put(made, 18, b"\xffCD001\1")
    return bytes(made)


def _put(made: bytearray, block: int, data: bytes) -> None:
    made[block * BLOCK : block * BLOCK + len(data)] = data


def _volume(blocks: int) -> bytes:
    """The primary volume descriptor (ECMA-119, 8.4), as far as anybody looks."""
    made = bytearray(b"\1CD001\1\0".ljust(BLOCK, b"\0"))
    made[40:72] = b"SMALL".ljust(32)
    struct.pack_into("<I", made, 80, blocks)
    struct.pack_into(">I", made, 84, blocks)
    struct.pack_into("<HH", made, 120, 1, 0x100)
    struct.pack_into("<HH", made, 128, BLOCK, 8)
    made[156:190] = _record(b"\0", _ROOT, BLOCK)
    return bytes(made)


def _record(name: bytes, block: int, size: int) -> bytes:
    """A directory record (ECMA-119, 9.1), of a directory if its name is a number."""
    numbers = b"".join(struct.pack("<I", each) + struct.pack(">I", each) for each in (block, size))
    made = numbers + bytes(7) + struct.pack("<BBBHHB", 2 if len(name) == 1 else 0, 0, 0, 1, 0x100, len(name)) + name
    made += bytes(len(made) % 2)
    return struct.pack("<BB", len(made) + 2, 0) + made


def _catalog(boots: list[tuple[int, int, int]]) -> bytes:
    """A validation entry, the default entry, and a section for each further one: platform, block, sectors."""
    head = struct.pack("<BBH24sHBB", 1, boots[0][0], 0, b"", 0, 0x55, 0xAA)
    check = -sum(struct.unpack("<16H", head)) & 0xFFFF
    entries = [struct.pack("<BBH24sHBB", 1, boots[0][0], 0, b"", check, 0x55, 0xAA), _entry(*boots[0][1:])]
    for number, (platform, *place) in enumerate(boots[1:], 2):
        entries += [struct.pack("<BBH28s", 0x91 if number == len(boots) else 0x90, platform, 1, b""), _entry(*place)]
    return b"".join(entries)


def _entry(block: int, sectors: int) -> bytes:
    return struct.pack("<BBHBBHI20s", 0x88, 0, 0, 0, 0, sectors, block, b"")
