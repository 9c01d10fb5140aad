"""System call numbers of each architecture, from libseccomp's tables.

An installed libseccomp that is older than the kernel lacks the newest calls. Calls from number 424 on have the same
number on all architectures (syscalls(2)), and the latest are listed here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from typing import Final, NamedTuple

from insula.model.errors import Unavailable

X32_BIT: Final = 0x40000000
"""The bit in the numbers of x32, the ABI of x86-64 with 32-bit pointers; both have the same audit architecture."""


class Arch(NamedTuple):
    """An ABI: its name and token in libseccomp, its value in seccomp_data.arch (linux/audit.h), its lowest number.

    `wide` tells whether arguments have 64 bits.
    """

    name: str
    token: int
    audit: int
    first: int = 0
    wide: bool = True


class Number(NamedTuple):
    """A call's number; with `multiplexer`, the number of a multiplexing call and its first argument for this one."""

    value: int
    multiplexer: int | None = None


X86_64: Final = Arch("SCMP_ARCH_X86_64", 0xC000003E, 0xC000003E)
X32: Final = Arch("SCMP_ARCH_X32", 0x4000003E, 0xC000003E, X32_BIT, wide=False)
X86: Final = Arch("SCMP_ARCH_X86", 0x40000003, 0x40000003, wide=False)
AARCH64: Final = Arch("SCMP_ARCH_AARCH64", 0xC00000B7, 0xC00000B7)
ARM: Final = Arch("SCMP_ARCH_ARM", 0x40000028, 0x40000028, wide=False)
RISCV64: Final = Arch("SCMP_ARCH_RISCV64", 0xC00000F3, 0xC00000F3)
ARCHS: Final = {arch.name: arch for arch in (X86_64, X32, X86, AARCH64, ARM, RISCV64)}

_FOREIGN = """
    MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PPC PPC64 PPC64LE S390 S390X PARISC PARISC64 LOONGARCH64 M68K
    SH SHEB
"""
FOREIGN: Final = frozenset(f"SCMP_ARCH_{name}" for name in _FOREIGN.split())
"""Other architectures that a profile may name. They are ignored: no supported kernel runs their programs."""

_NATIVE: Final = {"x86_64": X86_64, "aarch64": AARCH64, "riscv64": RISCV64}

_RECENT: Final = {
    "set_mempolicy_home_node": 450,
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
    "file_getattr": 468,
    "file_setattr": 469,
}

_NAME: Final = re.compile(r"[A-Za-z0-9_]{1,64}")

# 32-bit x86 has these calls twice: through socketcall(2) or ipc(2), and directly since Linux 4.3 and 5.1
_SOCKETCALL: Final = 102
_IPC: Final = 117
_X86_DIRECT: Final = {
    "recvmmsg": 337,
    "sendmmsg": 345,
    "socket": 359,
    "socketpair": 360,
    "bind": 361,
    "connect": 362,
    "listen": 363,
    "accept4": 364,
    "getsockopt": 365,
    "setsockopt": 366,
    "getsockname": 367,
    "getpeername": 368,
    "sendto": 369,
    "sendmsg": 370,
    "recvfrom": 371,
    "recvmsg": 372,
    "shutdown": 373,
    "semget": 393,
    "semctl": 394,
    "shmget": 395,
    "shmctl": 396,
    "shmat": 397,
    "shmdt": 398,
    "msgget": 399,
    "msgsnd": 400,
    "msgrcv": 401,
    "msgctl": 402,
}


def native() -> Arch:
    """Return the architecture of this machine's kernel; `Unavailable` if the seccomp compiler doesn't support it."""
    machine = os.uname().machine
    if machine not in _NATIVE:
        raise Unavailable(f"seccomp filters cannot be made on {machine}", f"use {', '.join(_NATIVE)}")
    return _NATIVE[machine]


@functools.lru_cache(8192)
def numbers(name: str, arch: Arch) -> tuple[Number, ...]:
    """Return every number of the call `name` on `arch`; none if there is no such call."""
    if not _NAME.fullmatch(name):
        return ()
    found: int = _library().seccomp_syscall_resolve_name_arch(ctypes.c_uint32(arch.token), name.encode())
    if found >= 0:
        return (Number(found),)
    # libseccomp's pseudo-numbers: -100 - n for socketcall n, -200 - n for ipc n
    if arch == X86 and -224 <= found < -100:
        multiplexed = Number(_SOCKETCALL, -found - 100) if found > -200 else Number(_IPC, -found - 200)
        return (multiplexed, Number(_X86_DIRECT[name])) if name in _X86_DIRECT else (multiplexed,)
    # -1: unknown to libseccomp; other negative numbers: known, but not on this architecture
    return (Number(arch.first + _RECENT[name]),) if found == -1 and name in _RECENT else ()


def is_known(name: str) -> bool:
    """Whether there is a call `name` on any architecture, as far as libseccomp and this module know."""
    if not _NAME.fullmatch(name):
        return False
    found: int = _library().seccomp_syscall_resolve_name_arch(ctypes.c_uint32(native().token), name.encode())
    return found != -1 or name in _RECENT


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise Unavailable("libseccomp is not installed", "apt-get install libseccomp2") from None
