"""A disk that boots Linux by UEFI firmware: a program that it finds on a file system, and the same pieces of memory as
in a disk for a BIOS (`linux_disk`) behind that file system.

The program reads the pieces, takes leave of the firmware, puts them in their places, and enters the kernel as a
hypervisor would do (PVH), with the address of the tables of ACPI. Its bytes are what binutils make of the text:

    as --64 LOADER.S -o LOADER.o && objcopy -O binary -j .text LOADER.o LOADER.bin
"""

from __future__ import annotations

import struct
from base64 import b64decode
from pathlib import Path

from insula.machine.disk import fat
from tests.support.linux_disk import INFO, linux_pieces
from tests.support.small_systems import SECTOR, program

MEMORY = 512 << 20
"""Bytes of memory that the machine must have: what the firmware uses is behind what Linux is told of."""
_FILE_SYSTEM, _PAGE = 16 << 20, 4096
_SOURCE = r"""
.intel_syntax noprefix
.code64
    cld
    mov r12, rcx
    mov r13, rdx
    mov r14, [rdx + 96]
    and rsp, -16
    sub rsp, 0x5000
    lea rdx, [rip + loaded_image]
    call handle
    mov rcx, [rax + 24]
    lea rdx, [rip + block_io]
    call handle
    mov r15, rax
    xor ecx, ecx
    mov edx, 2
    mov r8d, [rip + table + 4]
    lea r9, [rsp + 64]
    call [r14 + 40]
    test rax, rax
    jnz fail
    mov rdi, [rsp + 64]
    mov rbp, rdi
    mov rcx, r15
    mov rax, [r15 + 8]
    mov edx, [rax]
    mov r8d, [rip + table]
    mov r9d, [rip + table + 4]
    shl r9, 12
    mov [rsp + 32], rdi
    call [r15 + 24]
    test rax, rax
    jnz fail
    mov rcx, [r13 + 104]
    mov rsi, [r13 + 112]
1:  mov rax, [rsi]
    cmp rax, [rip + acpi]
    jne 2f
    mov rax, [rsi + 8]
    cmp rax, [rip + acpi + 8]
    je 3f
2:  add rsi, 24
    dec rcx
    jnz 1b
    jmp fail
3:  mov rbx, [rsi + 16]
4:  mov qword ptr [rsp + 64], 0x4000
    lea rcx, [rsp + 64]
    lea rdx, [rsp + 128]
    lea r8, [rsp + 72]
    lea r9, [rsp + 80]
    lea rax, [rsp + 88]
    mov [rsp + 32], rax
    call [r14 + 56]
    mov rcx, r12
    mov rdx, [rsp + 72]
    call [r14 + 232]
    test rax, rax
    jnz 4b
    cli
    lea r8, [rip + table + 16]
5:  mov ecx, [r8 + 4]
    jecxz 6f
    mov esi, [r8]
    add rsi, rbp
    mov edi, [r8 + 8]
    rep movsq
    add r8, 12
    jmp 5b
6:  mov eax, [rip + table + 12]
    mov [rax + 32], rbx
    mov ebx, eax
    mov edi, [rip + table + 8]
    lea rax, [rip + descriptors]
    mov word ptr [rsp + 64], 23
    mov [rsp + 66], rax
    lgdt [rsp + 64]
    lea rax, [rip + below]
    push 8
    push rax
    retfq

handle:
    lea r8, [rsp + 72]
    sub rsp, 40
    call [r14 + 152]
    add rsp, 40
    test rax, rax
    jnz fail
    mov rax, [rsp + 72]
    ret

fail:
    mov dx, 0x3f8
    mov al, '!'
    out dx, al
7:  hlt
    jmp 7b

.code32
below:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffffeff
    wrmsr
    xor eax, eax
    mov cr4, eax
    jmp edi

.balign 8
loaded_image: .quad 0x11d295625b1b31a1, 0x3b7269c9a0003f8e
block_io: .quad 0x11d26459964e5b21, 0x3b7269c9a000398e
acpi: .quad 0x11d3e4f18868e871, 0x81883cc7800022bc
descriptors:
    .quad 0
    .quad 0x00cf9a000000ffff
    .quad 0x00cf92000000ffff
table:
"""
_LOADER = b64decode(
    "/EmJzEmJ1UyLcmBIg+TwSIHsAFAAAEiNFZMBAADoNQEAAEiLSBhIjRWTAQAA6CUBAABJiccxyboCAAAARIsFuQEAAEyNTCRAQf9WKEiF"
    "wA+FIQEAAEiLfCRASIn9TIn5SYtHCIsQRIsFiwEAAESLDYgBAABJweEMSIl8JCBB/1cYSIXAD4XsAAAASYtNaEmLdXBIiwZIOwU0AQAA"
    "dQ1Ii0YISDsFLwEAAHQOSIPGGEj/yXXe6b0AAABIi14QSMdEJEAAQAAASI1MJEBIjZQkgAAAAEyNRCRITI1MJFBIjUQkWEiJRCQgQf9W"
    "OEyJ4UiLVCRIQf+W6AAAAEiFwHW++kyNBQEBAABBi0gEZ+MTQYswSAHuQYt4CPNIpUmDwAzr5osF3QAAAEiJWCCJw4s9zQAAAEiNBaYA"
    "AABmx0QkQBcASIlEJEIPAVQkQEiNBS4AAABqCFBIy0yNRCRISIPsKEH/lpgAAABIg8QoSIXAdQZIi0QkSMNmuvgDsCHu9Ov9uBAAAACO"
    "2I7AjtAPIMAl////fw8iwLmAAADADzIl//7//w8wMcAPIuD/5w8fRAAAoTEbW2KV0hGOPwCgyWlyOyFbTpZZZNIRjjkAoMlpcjtx6GiI"
    "8eTTEbwiAIDHPIiBAAAAAAAAAAD//wAAAJrPAP//AAAAks8A"
)


def linux_uefi_disk(kernel: Path, script: str) -> bytes:
    """A disk whose first program is a shell with this script. `kernel` is the directory of a kernel of Debian for all
    hardware (scripts/systems)."""
    entry, pieces = linux_pieces(kernel, script)
    table, body = b"", b""
    for address, data in pieces:
        table += struct.pack("<III", len(body), -(-len(data) // 8), address)
        body += data + bytes(-len(data) % SECTOR)
    body += bytes(-len(body) % _PAGE)
    head = struct.pack("<IIII", _FILE_SYSTEM // SECTOR, len(body) // _PAGE, entry, INFO)
    boot = {"EFI/BOOT/BOOTX64.EFI": program(_LOADER + head + table + bytes(12))}
    made = bytearray(_FILE_SYSTEM)
    for offset, piece in fat.build(boot, "SYSTEM", _FILE_SYSTEM):
        made[offset : offset + len(piece)] = piece
    return bytes(made) + body
