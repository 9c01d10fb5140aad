"""Small programs for instances as machine code; they need no compiler, no library and no file of an image."""

from __future__ import annotations

import platform
import struct

ONLY = "x86_64"
"""The machine that the programs are for; a test that needs one is skipped elsewhere."""

# Starts a thread (clone(2) with CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM) that pauses for ever, then ends the main
# thread alone (_exit(2), which is not exit_group(2)): the process lives, and its main thread is a zombie.
_LEADER_GONE = bytes.fromhex(
    "b838000000"  # mov eax, 56  (clone)
    "bf000f0500"  # mov edi, 0x50f00
    "488db42400f0ffff"  # lea rsi, [rsp - 4096]
    "31d2"  # xor edx, edx
    "4531d2"  # xor r10d, r10d
    "4531c0"  # xor r8d, r8d
    "0f05"  # syscall
    "85c0"  # test eax, eax
    "7409"  # jz thread
    "b83c000000"  # mov eax, 60  (exit)
    "31ff"  # xor edi, edi
    "0f05"  # syscall
    # thread:
    "b822000000"  # mov eax, 34  (pause)
    "0f05"  # syscall
    "ebf7"  # jmp thread
)


def leader_gone() -> bytes:
    """A program whose main thread exits at once while another goes on (pthread_exit(3) in main())."""
    assert platform.machine() == ONLY
    return _static(_LEADER_GONE)


def _static(code: bytes) -> bytes:
    """An executable of one segment (elf(5)), whose only content is `code`."""
    base, head = 0x400000, 64 + 56
    size = head + len(code)
    ident = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)
    elf = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return ident + elf + segment + code
