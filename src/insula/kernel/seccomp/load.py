"""Load a compiled seccomp filter into the calling thread (seccomp(2)), just before its execve(2).

From then on the kernel runs the filter before every system call of this thread and its children, and it can't be
removed. This module imports little, for the zygote; the compiler is in compiler.py.
"""

from __future__ import annotations

import os
import struct

from insula.kernel import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

SECCOMP_FILTER_FLAG_LOG = 2
SECCOMP_FILTER_FLAG_SPEC_ALLOW = 4
SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 32

FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 0,  # there is one thread when the filter is loaded
    "SECCOMP_FILTER_FLAG_LOG": SECCOMP_FILTER_FLAG_LOG,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": SECCOMP_FILTER_FLAG_SPEC_ALLOW,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
}
"""The flags that a profile may name."""

_SECCOMP_SET_MODE_FILTER = 1
_NR_SECCOMP = {"x86_64": 317, "aarch64": 277, "riscv64": 277}
_SOCK_FPROG = struct.Struct("HxxxxxxP")  # linux/filter.h: length in instructions, and the address of them
_INSTRUCTION = 8


def flags_of(profile: Mapping[str, Any]) -> int:
    """Return the flags to load a profile's filter with; `profile` is a checked linux.seccomp of the OCI runtime-spec.

    SCMP_ACT_NOTIFY needs a listener, and SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is valid only with one. A profile with
    an agent (listenerPath) gets a listener even without such a rule, as with crun: the agent then sees the container
    start, and gets no notifications.
    """
    flags = 0
    for name in profile.get("flags") or ():
        flags |= FLAGS[name]
    if profile.get("listenerPath"):  # without it no rule notifies: compiler.py checks that
        return flags | SECCOMP_FILTER_FLAG_NEW_LISTENER
    return flags & ~SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV


def load(program: bytes, flags: int = 0) -> int:
    """Install `program`, an array of struct sock_filter; with SECCOMP_FILTER_FLAG_NEW_LISTENER return its descriptor.

    The thread must have CAP_SYS_ADMIN in its user namespace, or no_new_privs set (PR_SET_NO_NEW_PRIVS); else the
    kernel answers EACCES. EINVAL means that the program is no valid filter. Both are raised as OSError.
    """
    if not program or len(program) % _INSTRUCTION:
        raise ValueError(f"a filter of {len(program)} bytes is not a whole number of instructions")
    number = _NR_SECCOMP.get(os.uname().machine)
    if number is None:
        raise OSError(38, f"seccomp: not known on {os.uname().machine}")
    code = libc.buffer(program)
    fprog = _SOCK_FPROG.pack(len(program) // _INSTRUCTION, libc.addressof(code))
    arguments = (libc.Long(each) for each in (number, _SECCOMP_SET_MODE_FILTER, flags))
    return libc.check(libc.syscall(*arguments, fprog), "seccomp")
