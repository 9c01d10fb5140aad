"""Start a resolver confined, because it parses packets of hostile instances.

A small Python process makes PID, mount, IPC and UTS namespaces (namespaces(7)). Its root has only the program, its
libraries, two devices and the tenant's names, all read-only. It joins the tenant's control group, changes to a user who
owns no files, keeps one capability (for port 53), disables privilege escalation (PR_SET_NO_NEW_PRIVS), loads a system
call filter (seccomp(2)) and executes the program as PID 1 of the namespace. It is not a fork of insulad, because a fork
copies the locks of other threads in their current state.

The first half of this module is for insulad; the second half is for the small process, and imports little.
"""

from __future__ import annotations

import os
import sys

from insula.kernel import capabilities, syscalls
from insula.kernel.seccomp import load as seccomp_load

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from typing import Final

DEVICES: Final = ("/dev/null", "/dev/urandom")
KEPT: Final = ("NET_BIND_SERVICE",)
_NEW_ROOT: Final = "/proc"  # mount point of the new root: exists on every host, and is not needed here
LIMITS: Final = (  # resource (getrlimit(2)) and limit
    (1, 0),  # RLIMIT_FSIZE: it writes no files
    (4, 0),  # RLIMIT_CORE
    (6, 1024),  # RLIMIT_NPROC, of its user
    (7, 4096),  # RLIMIT_NOFILE: at its start it closes every possible descriptor, one by one
    (9, 256 << 20),  # RLIMIT_AS
)
_SEPARATOR: Final = "--"
_NAMESPACES: Final = 0x7E020080
"""The namespace flags of clone(2): CLONE_NEWUSER, NEWPID, NEWNET, NEWIPC, NEWUTS, NEWCGROUP, NEWNS, NEWTIME."""
_CALLS: Final = """
    read readv pread64 write writev close close_range lseek open openat fcntl dup dup2 dup3 pipe pipe2
    stat lstat fstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd chdir umask
    inotify_init inotify_init1 inotify_add_watch inotify_rm_watch
    mmap munmap mremap mprotect madvise brk futex
    bind listen accept accept4 connect getsockname getpeername getsockopt setsockopt shutdown ioctl
    sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg
    poll ppoll select pselect6
    fork wait4 waitid kill exit exit_group execve setsid
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack restart_syscall alarm setitimer pause
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage sysinfo uname getrandom
    getpid getppid gettid getuid geteuid getgid getegid getgroups capget
    arch_prctl set_tid_address set_robust_list rseq prlimit64 getrlimit sched_yield sched_getaffinity
"""


def system_calls() -> bytes:
    """Compile the filter: it allows the calls that dnsmasq(8) needs. Any other call fails with EPERM.

    Allowed are IP and rtnetlink sockets, and processes without new namespaces. execve(2) starts the program; later it
    could only start the same program again, because the root has no other.
    """
    from insula.kernel.seccomp import compiler

    def allow(*names: str, **more: object) -> dict[str, object]:
        return {"names": names, "action": "SCMP_ACT_ALLOW", **more}

    def argument(index: int, value: int, op: str = "SCMP_CMP_EQ", value_two: int = 0) -> dict[str, object]:
        return {"index": index, "value": value, "op": op, "valueTwo": value_two}

    rules = [
        allow(*_CALLS.split()),
        *(allow("socket", args=[argument(0, family)]) for family in (2, 10)),  # AF_INET, AF_INET6
        allow("socket", args=[argument(0, 16), argument(2, 0)]),  # AF_NETLINK, NETLINK_ROUTE
        allow("clone", args=[argument(0, _NAMESPACES, "SCMP_CMP_MASKED_EQ", 0)]),
        # its flags are in memory, which a filter can't read; libc falls back to clone
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
    ]
    return compiler.compile({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})


def start(
    command: Sequence[str], user: int, readable: Sequence[str], groups: Sequence[int], calls: bytes, lock: int
) -> subprocess.Popen[bytes]:
    """Start `command` as `user` in the caller's network namespace; its standard error is a pipe.

    `readable` are the files and directories in its root, including the program and its libraries. `groups` are
    descriptors of `Cgroup.open`, and `calls` is a compiled filter. `lock` is a descriptor that the program inherits.
    The returned process prints the program's PID on its standard output and ends; if it prints nothing, its standard
    error has the reason.
    """
    import subprocess

    import insula

    library = os.path.dirname(os.path.dirname(insula.__file__))
    code = f"import sys; sys.path.insert(0, {library!r}); from insula.network.linux.confine import main; main()"
    compiled = os.memfd_create("seccomp")
    try:
        os.write(compiled, calls)
        numbers = ",".join(map(str, groups))
        arguments = [str(user), str(compiled), str(lock), numbers, *readable, _SEPARATOR, *command]
        return subprocess.Popen(
            [sys.executable, "-ISE", "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[compiled, *groups, lock],
            cwd="/",
            env={"LC_ALL": "C"},
        )
    finally:
        os.close(compiled)


# -- the process that executes the program -----------------------------------------------------------------------


def main() -> None:
    """Fork a child into new namespaces, which executes the program, and print its PID. Arguments are from `start`."""
    user, compiled, lock, numbers, *rest = sys.argv[1:]
    end = rest.index(_SEPARATOR)
    readable, command = rest[:end], rest[end + 1 :]
    try:
        syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS)
        if child := os.fork():
            print(child, flush=True)
            return
        os.dup2(0, 1)  # close the pipe: the reader sees its end when the parent exits
        os.setsid()
        for number in filter(None, numbers.split(",")):
            os.write(int(number), b"0")
        calls = os.pread(int(compiled), os.fstat(int(compiled)).st_size, 0)
        enter_root(readable)
        drop_privileges(int(user))
        syscalls.close_range(3, 0xFFFFFFFF, syscalls.CLOSE_RANGE_CLOEXEC)
        os.set_inheritable(int(lock), True)
        seccomp_load.load(calls)
        os.execve(command[0], command, {"LC_ALL": "C"})
    except OSError as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        os._exit(1)


def enter_root(readable: Sequence[str]) -> None:
    """Make a root with only these paths and `DEVICES`, and enter it with pivot_root(2)."""
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount(
        "tmpfs", _NEW_ROOT, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC, "size=64k,mode=755"
    )
    common = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID
    for path in (*DEVICES, *readable):
        inside = _NEW_ROOT + path
        if os.path.isdir(path):
            os.makedirs(inside, 0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside), 0o755, exist_ok=True)
            os.mknod(inside, 0o600)
        syscalls.mount(path, inside, None, syscalls.MS_BIND)
        more = syscalls.MOUNT_ATTR_NOEXEC if path in DEVICES else syscalls.MOUNT_ATTR_NODEV
        syscalls.mount_setattr(syscalls.AT_FDCWD, inside, set_=common | more, flags=0)
    syscalls.mount_setattr(syscalls.AT_FDCWD, _NEW_ROOT, set_=common, flags=0)
    os.chdir(_NEW_ROOT)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")


def drop_privileges(
    user: int, kept: Sequence[str] = KEPT, limits: Sequence[tuple[int, int]] = LIMITS, group: int | None = None
) -> None:
    """Set resource limits, change to a user and group, keep these capabilities, and set no_new_privs.

    The group has the number of the user unless another is given.
    """
    for kind, most in limits:
        _, hard = syscalls.prlimit(kind)
        syscalls.prlimit(kind, (min(most, hard), min(most, hard)))
    mask = capabilities.to_mask(kept)
    rights = capabilities.Capabilities(mask, mask, mask, mask, mask)
    group = user if group is None else group
    os.setgroups([])
    capabilities.before_setuid(rights)
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    capabilities.after_setuid(rights)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
