"""Confinement of processes that read data from outside.

The extracting worker has namespaces of its own (no network, and no other processes visible), resource limits, the
target as its root directory, five capabilities, and a seccomp filter that allows system calls for files and memory
only. The tool that it needs, zstd(1), runs as a user who owns no files, and so does the process that converts disk
images, in an empty root (`enter_empty`). See namespaces(7), capabilities(7), seccomp(2),
getrlimit(2).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from insula.image.limits import MEMORY, ExtractionLimits
from insula.kernel import capabilities, syscalls
from insula.kernel.seccomp import load as seccomp_load
from insula.model.errors import InsulaError, Unavailable

if TYPE_CHECKING:
    import subprocess

USER = 0x3FFFFFFF
"""The user and group for tools, which own no files on the host: the last ID below those of tenants."""

NAMESPACES = (
    *("setpriv", "--pdeathsig=KILL"),
    *("unshare", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child=KILL"),
)
"""The start of a command line that runs in namespaces of its own, which end with the thread that starts it."""

KEPT = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETFCAP")
"""The capabilities for setting owners, modes, set-ID bits and file capabilities, which a layer's archive contains."""

OOM = "500"
"""The oom_score_adj of these processes: they are killed first when memory runs out, unlike insulad."""

_FILES = 64
_PROCESSES = 4096  # and threads, of all tools of `USER` together; a skopeo has a dozen
_CALLS = """
    read readv pread64 write writev pwrite64 lseek close close_range fsync fdatasync ftruncate fallocate
    open openat openat2 creat stat lstat fstat newfstatat fstatat64 statx fstatfs getdents getdents64 access faccessat
    faccessat2 readlink readlinkat mkdir mkdirat mknod mknodat symlink symlinkat link linkat unlink unlinkat rmdir
    rename renameat renameat2 chown fchown fchownat lchown chmod fchmod fchmodat fchmodat2 utimensat futimesat utime
    utimes setxattr fsetxattr getxattr fgetxattr listxattr flistxattr fcntl ioctl dup dup2 dup3 pipe2 poll ppoll select
    pselect6 mmap munmap mremap mprotect madvise brk futex rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack
    clock_gettime clock_getres gettimeofday time times getrusage getrandom getpid gettid getuid geteuid getgid getegid
    getcwd wait4 waitid sched_yield restart_syscall exit exit_group rseq set_robust_list prlimit64 umask uname sysinfo
"""


@cache
def system_calls() -> bytes:
    """Compile the filter for the worker: calls for files and memory are allowed, any other fails with EPERM."""
    from insula.kernel.seccomp import compiler

    allowed = {"names": _CALLS.split(), "action": "SCMP_ACT_ALLOW"}
    return compiler.compile({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [allowed]})


def limit(limits: ExtractionLimits) -> None:
    """Set resource limits for this process and the tools that it starts."""
    import resource

    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(OOM)
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_FSIZE, limits.bytes + limits.tar),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu, limits.cpu + 5))  # SIGXCPU first, then SIGKILL


def start(command: Sequence[str], stdin: int) -> subprocess.Popen[bytes]:
    """Start a tool that reads the descriptor `stdin`, with a pipe for its output; if we are root it runs as `USER`."""
    import subprocess

    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    other = USER if os.geteuid() == 0 else None
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            user=other,
            group=other,
            extra_groups=None if other is None else [],
        )
    except FileNotFoundError as e:
        raise missing(e) from None


def enter(target: int, filter: bytes) -> None:  # noqa: A002
    """Make the directory `target` the root, and drop all privileges that extraction doesn't need. For root."""
    os.fchdir(target)
    os.chroot(".")
    kept = capabilities.to_mask(KEPT)
    rights = capabilities.Capabilities(kept, kept, kept, 0, 0)
    os.setgroups([])
    capabilities.before_setuid(rights)
    capabilities.after_setuid(rights)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp_load.load(filter)


def enter_empty(empty: int, filter: bytes) -> None:  # noqa: A002
    """Make the empty directory `empty` the root, and become a user without a right beyond what is open. For root."""
    os.fchdir(empty)
    os.chroot(".")
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)  # this drops all capabilities (capabilities(7))
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp_load.load(filter)


def end_with_parent() -> None:
    """Have this process killed with the thread that started it, which reads its standard output."""
    import select

    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)
    answers = select.poll()
    answers.register(1, 0)
    if answers.poll(0):  # no reader: the parent died before PR_SET_PDEATHSIG was set
        sys.exit(1)


def missing(error: FileNotFoundError) -> InsulaError:
    """Return the error for a tool that is not installed."""
    name = os.path.basename(str(error.filename))
    package = {"setpriv": "util-linux", "unshare": "util-linux"}.get(name, name)
    return Unavailable(f"{name}(1) is not installed", f"apt install {package}")
