"""The seccomp profile of the container of a machine: what QEMU and the shim call, and nothing else (seccomp(2)).

QEMU executes a stranger's operating system. If the stranger takes QEMU over, the kernel of the host is what is left to
attack, by way of system calls. So there are 130 of the 380 that a container has, and none that makes a namespace or a
mount, renames or removes a file, looks into another process, loads a program into the kernel, changes the user, or
opens a socket but a local one. QEMU has filters of its own besides (`-sandbox`), which it sets when it has started;
this one is there before, and holds for the shim as well.

A call that is not listed fails with EPERM. clone3(2) fails with ENOSYS: its flags are in memory, where a filter can't
see them, and the C library then uses clone(2).
"""

from __future__ import annotations

import functools
from typing import Any, Final

_FILES: Final = """
    access close close_range dup dup2 dup3 faccessat faccessat2 fadvise64 fallocate fchdir fchmod fcntl fdatasync flock
    fstat fstatfs fsync ftruncate getcwd getdents64 ioctl lseek newfstatat openat pipe2 pread64 preadv preadv2 pwrite64
    pwritev pwritev2 read readlink readlinkat readv stat statfs lstat statx sync_file_range umask write writev
"""
_MEMORY: Final = (
    "brk get_mempolicy madvise mbind membarrier memfd_create mmap mprotect mremap msync munmap set_mempolicy"
)
_PROCESSES: Final = """
    arch_prctl execve exit exit_group futex get_robust_list getcpu getegid geteuid getgid getpgrp getpid getppid
    getrandom getrlimit gettid getuid kill pidfd_open prctl prlimit64 restart_syscall rseq sched_getaffinity sched_yield
    seccomp set_robust_list set_tid_address sysinfo tgkill uname vfork wait4 waitid
"""
_SIGNALS: Final = """
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait rt_sigpending rt_sigsuspend sigaltstack signalfd4
"""
_WAITING: Final = """
    clock_getres clock_gettime clock_nanosleep epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 gettimeofday
    nanosleep poll ppoll pselect6 select time timerfd_create timerfd_gettime timerfd_settime
"""
_SOCKETS: Final = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmsg sendmsg sendto setsockopt
    shutdown
"""
_AF_UNIX: Final = 1
_NEW_NAMESPACES: Final = 0x7E020080
"""CLONE_NEWTIME and all others of clone(2)."""


@functools.cache
def profile() -> dict[str, Any]:
    """The OCI `linux.seccomp` object."""
    names = [name for group in (_FILES, _MEMORY, _PROCESSES, _SIGNALS, _WAITING, _SOCKETS) for name in group.split()]
    local = [{"index": 0, "value": _AF_UNIX, "op": "SCMP_CMP_EQ"}]
    same = [{"index": 0, "value": _NEW_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"action": "SCMP_ACT_ALLOW", "names": names},
            {"action": "SCMP_ACT_ALLOW", "names": ["socket", "socketpair"], "args": local},
            {"action": "SCMP_ACT_ALLOW", "names": ["clone"], "args": same},
            {"action": "SCMP_ACT_ERRNO", "errnoRet": 38, "names": ["clone3"]},
        ],
    }
