"""Raw system calls by number, for those that Python has no function for."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# x86-64 and the others differ in what is older than 2011 (asm-generic/unistd.h); from 424 on all are the same
_X86_64 = {
    "mincore": 27, "io_setup": 206,
    "clone": 56, "ptrace": 101, "syslog": 103, "capset": 126, "personality": 135, "pivot_root": 155, "acct": 163,
    "mount": 165, "umount2": 166, "swapon": 167, "reboot": 169, "sethostname": 170, "iopl": 172, "init_module": 175,
    "quotactl": 179, "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
    "unshare": 272, "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "kcmp": 312, "bpf": 321, "userfaultfd": 323,
}  # fmt: skip
_GENERIC = {
    "io_setup": 0, "mincore": 232,
    "umount2": 39, "mount": 40, "pivot_root": 41, "quotactl": 60, "acct": 89, "capset": 91, "personality": 92,
    "unshare": 97, "kexec_load": 104, "init_module": 105, "clock_settime": 112, "syslog": 116, "ptrace": 117,
    "reboot": 142, "sethostname": 161, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220,
    "swapon": 224, "perf_event_open": 241, "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265,
    "setns": 268, "process_vm_readv": 270, "kcmp": 272, "bpf": 280, "userfaultfd": 282,
}  # fmt: skip
_NEW = {
    "io_uring_setup": 425, "open_tree": 428, "fsopen": 430, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438,
    "mount_setattr": 442,
}  # fmt: skip
NUMBERS = (_X86_64 if os.uname().machine == "x86_64" else _GENERIC) | _NEW


def syscall(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """The result of a system call; raises OSError. Buffers and bytes are passed by their address."""
    number = NUMBERS[name]
    words = [ctypes.c_ulong(a & (1 << 64) - 1) if isinstance(a, int) else a for a in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    return result
