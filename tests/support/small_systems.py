"""Small operating systems for tests of disk images, which boot in a tenth of a second: one by a BIOS, one by UEFI.

The first is a boot sector. On the serial port and on the screen it shows a letter that is on its disk, and writes the
next one in its place; the sectors of its disk; the devices on the first two PCI buses; and then what is typed. It turns
the machine off when the power button is pressed, unless `i` was typed, and restarts it for `r`. A keyboard will do as
well as the serial port. The second shows that it runs, what is typed, and turns the machine off too.

The bytes are what binutils make of the text:

    as --32 BIOS.S -o BIOS.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary BIOS.o -o BIOS.bin
    as --64 UEFI.S -o UEFI.o && objcopy -O binary -j .text UEFI.o UEFI.bin
"""

from __future__ import annotations

import struct
from base64 import b64decode

from insula.machine.disk import fat

SECTOR = 512
DISK = 1 << 20
"""Bytes of the disk that boots by a BIOS."""
BOOT_SECTOR = r"""
.intel_syntax noprefix
.code16
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    ljmp 0, offset here
here:
    sti
"""
"""The beginning of a boot sector, which a BIOS jumps to: segments of 0, and a stack below it."""
_BIOS_SOURCE = (
    BOOT_SECTOR
    + r"""
    mov [0x8400], dl
    mov si, offset hello
    call print
    mov ah, 0x42
    call disk
    mov si, offset mark
    call print
    mov si, 0x8000
    call print
    inc byte ptr [0x8000]
    mov ax, 0x4300
    call disk
    mov si, offset sectors
    call print
    mov ah, 0x48
    mov dl, [0x8400]
    mov si, 0x8200
    mov word ptr [si], 0x1a
    int 0x13
    mov eax, [0x8210]
    call hex
    mov si, offset devices
    call print
    mov ecx, 0x80000000
1:  mov eax, ecx
    mov dx, 0xcf8
    out dx, eax
    mov dx, 0xcfc
    in eax, dx
    cmp ax, -1
    je 2f
    call hex
    mov al, ' '
    call put
2:  add ecx, 0x100
    cmp ecx, 0x80020000
    jb 1b
    mov dx, 0x602
    mov ax, 0x100
    out dx, ax
    mov si, offset ready
    call print
wait:
    mov dx, 0x600
    in ax, dx
    test ah, 1
    jnz off
    mov dx, 0x3fd
    in al, dx
    test al, 1
    jnz key
    mov ah, 1
    int 0x16
    jnz pressed
    hlt
    jmp wait
pressed:
    xor ah, ah
    int 0x16
    jmp typed
key:
    mov dx, 0x3f8
    in al, dx
typed:
    call put
    cmp al, 'i'
    jne 3f
    mov dx, 0x602
    xor ax, ax
    out dx, ax
3:  cmp al, 'r'
    jne wait
    mov al, 0xfe
    out 0x64, al
    jmp wait
off:
    mov si, offset bye
    call print
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
4:  hlt
    jmp 4b

disk:
    mov dl, [0x8400]
    mov si, offset packet
    int 0x13
    jnc 5f
    mov al, '!'
    call put
5:  ret

print:
    lodsb
    test al, al
    jz 5b
    call put
    jmp print

hex:
    push ecx
    mov ecx, 8
6:  rol eax, 4
    push eax
    and al, 15
    cmp al, 10
    jb 7f
    add al, 'a' - '0' - 10
7:  add al, '0'
    call put
    pop eax
    dec ecx
    jnz 6b
    pop ecx
    ret

put:
    pushad
    mov ah, 0x0e
    mov bx, 7
    int 0x10
    mov ah, al
    mov dx, 0x3fd
8:  in al, dx
    test al, 0x20
    jz 8b
    mov dx, 0x3f8
    mov al, ah
    out dx, al
    popad
    ret

packet: .byte 16, 0, 1, 0
    .word 0x8000, 0
    .quad 1
hello: .asciz "\r\nsmall system\r\n"
mark: .asciz "mark "
sectors: .asciz "\r\nsectors "
devices: .asciz "\r\ndevices "
ready: .asciz "\r\nready\r\n"
bye: .asciz "\r\noff\r\n"
"""
)
_UEFI_SOURCE = r"""
.intel_syntax noprefix
.code64
    lea rsi, [rip + text]
    call print
    mov dx, 0x602
    mov ax, 0x100
    out dx, ax
1:  mov dx, 0x600
    in ax, dx
    test ah, 1
    jnz 2f
    mov dx, 0x3fd
    in al, dx
    test al, 1
    jz 3f
    mov dx, 0x3f8
    in al, dx
    call put
    jmp 1b
3:  hlt
    jmp 1b
2:  lea rsi, [rip + bye]
    call print
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
4:  hlt
    jmp 4b
print:
    lodsb
    test al, al
    jz 5f
    call put
    jmp print
5:  ret
put:
    mov ah, al
    mov dx, 0x3fd
6:  in al, dx
    test al, 0x20
    jz 6b
    mov dx, 0x3f8
    mov al, ah
    out dx, al
    ret
text: .asciz "\r\nsmall system by UEFI\r\nready\r\n"
bye: .asciz "\r\noff\r\n"
"""
_BIOS = b64decode(
    "McCO2I7AjtC8AHzqEHwAAPuIFgCEvkt96NYAtELowAC+XH3oywC+AIDoxQD+BgCAuABD6KoAvmJ96LUAtEiKFgCEvgCCxwQaAM0TZqEQ"
    "guipAL5tfeiZAGa5AAAAgGaJyLr4DGbvuvwMZu2D+P90COiIALAg6KcAZoHBAAEAAGaB+QAAAoBy1roCBrgAAe++eH3oXAC6AAbt9sQB"
    "dTK6/QPsqAF1D7QBzRZ1A/Tr5jDkzRbrBLr4A+zoYwA8aXUGugIGMcDvPHJ1y7D+5mTrxb6CfegbALoEBrgAIO/06/2KFgCEvjt9zRNz"
    "BbAh6C8Aw6yEwHT66CYA6/ZmUWa5CAAAAGbBwARmUCQPPApyAgQnBDDoCQBmWGZJdedmWcNmYLQOuwcAzRCIxLr9A+yoIHT7uvgDiODu"
    "ZmHDEAABAACAAAABAAAAAAAAAA0Kc21hbGwgc3lzdGVtDQoAbWFyayAADQpzZWN0b3JzIAANCmRldmljZXMgAA0KcmVhZHkNCgANCm9m"
    "Zg0KAA=="
)
_UEFI = b64decode(
    "SI01awAAAOhGAAAAZroCBma4AAFm72a6AAZm7fbEAXUYZrr9A+yoAXQMZrr4A+zoKwAAAOvg9OvdSI01UgAAAOgNAAAAZroEBma4"
    "ACBm7/Tr/ayEwHQH6AMAAADr9MOIxGa6/QPsqCB0+2a6+AOI4O7DDQpzbWFsbCBzeXN0ZW0gYnkgVUVGSQ0KcmVhZHkNCgANCm9m"
    "Zg0KAA=="
)


def bios_disk(size: int = DISK, data: bytes = b"") -> bytes:
    """A disk that boots by a BIOS. `data` is behind the boot sector and the letter."""
    head = _BIOS.ljust(510, b"\0") + b"\x55\xaa" + b"A".ljust(SECTOR, b"\0") + data
    return head.ljust(size, b"\0")


def uefi_disk() -> bytes:
    """A disk that boots by UEFI: a FAT16 on all of it, with the program that firmware looks for."""
    size = 16 << 20
    made = bytearray(size)
    for offset, piece in fat.build(UEFI_FILES, "SYSTEM", size):
        made[offset : offset + len(piece)] = piece
    return bytes(made)


def program(code: bytes) -> bytes:
    """An UEFI application with this code, which needs no relocation (PE32+, Microsoft's PE Format)."""
    size = -(-len(code) // SECTOR) * SECTOR
    dos = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, 1, 0, 0, 0, 112 + 16 * 8, 0x22E)
    optional = struct.pack(
        "<HBBIIIIIQIIHHHHHHIIIIHHQQQQII",
        *(0x20B, 0, 0, size, 0, 0, 0x1000, 0x1000, 0, 0x1000, SECTOR, 0, 0, 0, 0, 0, 0, 0),
        *(0x1000 + -(-size // 0x1000) * 0x1000, SECTOR, 0, 10, 0, 0, 0, 0, 0, 0, 16),
    )
    section = struct.pack("<8sIIIIIIHHI", b".text", len(code), 0x1000, size, SECTOR, 0, 0, 0, 0, 0x60000020)
    head = dos + coff + optional + bytes(16 * 8) + section
    return head.ljust(SECTOR, b"\0") + code.ljust(size, b"\0")


UEFI_FILES = {"EFI/BOOT/BOOTX64.EFI": program(_UEFI)}
"""The program that UEFI firmware looks for on a file system."""
