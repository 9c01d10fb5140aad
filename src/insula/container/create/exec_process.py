"""The last steps of a process before it executes the user's program: rlimits, user, capabilities, seccomp, execve(2).

Each step takes a right that a later one gives up, which sets their order. The seccomp filter is loaded last, so that it
need not allow the system calls of the steps before. With no_new_privs set, loading takes no right. Without it, loading
takes CAP_SYS_ADMIN, and the filter is loaded before that is given up (runc has the same two places).

PID 1 waits for "start" with the rights that its program will have. Only two steps come after it: lower rlimits, with
which it might not be able to receive the message, and the filter, which need not allow that. Without no_new_privs PID 1
has CAP_SYS_ADMIN until the filter is loaded.

The service and `insula-oci` use the same function, for PID 1 and for a process that joins.
"""

from __future__ import annotations

import errno
import os

from insula.container.create import programs
from insula.container.create.steps import StepError, Steps, step
from insula.kernel import lsm, scheduling, syscalls
from insula.kernel.capabilities import Capabilities, after_setuid, before_setuid, keep_sys_admin, to_names
from insula.kernel.seccomp.load import SECCOMP_FILTER_FLAG_NEW_LISTENER, load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, NoReturn

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# asm-generic/resource.h, in its order; not of `resource`, which takes a quarter of a millisecond to import
_LIMITS = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME".split()  # noqa: SIM905
_RLIM_INFINITY = (1 << 64) - 1
_MAX_PASSWD = 1 << 20
_interpreter = os.stat("/proc/self/exe")


class Filter:
    """A compiled seccomp program, and the flags to load it with (seccomp(2))."""

    __slots__ = ("flags", "program")

    def __init__(self, program: bytes, flags: int = 0) -> None:
        self.program = program
        self.flags = flags


def exec_process(
    process: dict[str, Any],
    program: Filter | None,
    keep: int = 0,
    *,
    personality: Mapping[str, Any] | None = None,
    memory_policy: Mapping[str, Any] | None = None,
    joins: bool = False,
    listener: Callable[[int], object] | None = None,
    warn: Callable[[str], object] | None = None,
    wait: Callable[[], object] | None = None,
    last: Callable[[dict[str, str]], object] | None = None,
) -> NoReturn:
    """Become `process` (of the OCI runtime-spec), or raise StepError with the step that was refused.

    keep         descriptors from 3 on that the program inherits; all others are closed by execve
    personality, memory_policy  as in `linux` of the config
    joins        the process is not the container's first: execCPUAffinity holds for it
    listener     is given the descriptor of a filter that notifies, and returns when somebody else has it
    warn         is told what could not be granted and the spec lets pass
    wait         is called before the filter is loaded, and returns when the program shall run
    last         is called with the program's environment when nothing but its own rights are left

    The parent has set oom_score_adj, for which it needs /proc of the host, and the initial CPU affinity.
    """
    user = process.get("user") or {}
    environment = dict(entry.partition("=")[::2] for entry in process.get("env") or ())
    directory = process.get("cwd") or "/"
    limits = process.get("rlimits") or ()
    for limit in limits:
        step(Steps.SET_RLIMIT, raise_limit, limit, about=limit["type"])
    set_attributes(process, personality, joins)
    if memory_policy:
        step(Steps.SET_MEMORY_POLICY, scheduling.set_memory_policy, memory_policy)
    if not environment.get("HOME"):
        environment["HOME"] = home(user.get("uid", 0))
    entered = enter(directory)  # root may enter what the user may not, as runc has it
    syscalls.close_range(3 + keep, 0x7FFFFFFF, syscalls.CLOSE_RANGE_CLOEXEC)
    for fd in range(3, 3 + keep):
        os.set_inheritable(fd, True)
    wanted = Capabilities.from_oci(process.get("capabilities"))
    capabilities, missing = wanted.grantable()
    if missing and warn:
        tell_missing(wanted, capabilities, warn)
    restricted = process.get("noNewPrivileges")
    if restricted:
        step(Steps.SET_NO_NEW_PRIVS, syscalls.prctl, syscalls.PR_SET_NO_NEW_PRIVS, 1)
    step(Steps.DROP_CAPABILITIES, before_setuid, capabilities)
    step(Steps.CHANGE_USER, change_user, user)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # to change the user may have set it (proc_sys_fs(5), suid_dumpable)
    filter_first = program is not None and not restricted
    step(Steps.DROP_CAPABILITIES, lambda: keep_sys_admin(capabilities) if filter_first else after_setuid(capabilities))
    os.umask(user.get("umask", 0o022))
    if not entered:
        step(Steps.ENTER_DIRECTORY, change_directory, directory)
    if wait:
        wait()
    for limit in limits:
        step(Steps.SET_RLIMIT, set_limit, limit, about=limit["type"])
    if program is not None:
        step(Steps.LOAD_FILTER, load_filter, program, listener)
    if filter_first:
        step(Steps.DROP_CAPABILITIES, after_setuid, capabilities)
    if last:
        last(environment)
    execute(process["args"], environment)


def set_attributes(process: dict[str, Any], personality: Mapping[str, Any] | None, joins: bool) -> None:
    """Set scheduling, personality, AppArmor profile and SELinux label, which take rights of the host."""
    if scheduler := process.get("scheduler"):
        step(Steps.SET_SCHEDULER, scheduling.set_scheduler, scheduler)
    if priority := process.get("ioPriority"):
        step(Steps.SET_IO_PRIORITY, scheduling.set_io_priority, priority)
    if joins and (affinity := process.get("execCPUAffinity")):
        step(Steps.SET_AFFINITY, scheduling.set_affinity, affinity.get("final") or scheduling.ALL)
    if personality:
        step(Steps.SET_PERSONALITY, scheduling.set_personality, personality)
    profile, label = process.get("apparmorProfile"), process.get("selinuxLabel")
    if profile and profile != "unconfined":
        step(Steps.SET_APPARMOR, lsm.set_apparmor_profile, profile, about=profile)
    if label:
        step(Steps.SET_SELINUX, lsm.set_selinux_label, label, about=label)


def tell_missing(wanted: Capabilities, granted: Capabilities, warn: Callable[[str], object]) -> None:
    """Warn once of each capability that is left out of a set; with runc's message if only the ambient set lacks it."""
    missing = [asked & ~got for asked, got in zip(wanted, granted, strict=True)]
    ambient = missing.pop()
    others = missing[0] | missing[1] | missing[2] | missing[3]
    if others:
        warn(f"capabilities that cannot be granted: {', '.join(to_names(others))}")
    for name in to_names(ambient & ~others):
        warn(f"can't raise ambient capability {name}: it must be permitted and inheritable, too")


def raise_limit(limit: Mapping[str, Any]) -> None:
    """Raise a hard limit, which takes a right; `set_limit` does the rest."""
    number, (_, hard) = _wanted(limit)
    soft, highest = syscalls.prlimit(number)
    if hard > highest:
        try:
            syscalls.prlimit(number, (soft, hard))
        except PermissionError:
            raise PermissionError(errno.EPERM, "it is above what insulad itself may have") from None


def set_limit(limit: Mapping[str, Any]) -> None:
    """Set soft and hard limit (setrlimit(2)), unless they are as wanted."""
    number, wanted = _wanted(limit)
    if syscalls.prlimit(number) != wanted:
        syscalls.prlimit(number, wanted)


def _wanted(limit: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
    wanted = (limit["soft"], limit["hard"])
    if any(1 << 63 <= bound < _RLIM_INFINITY for bound in wanted):  # some kinds are counted with a sign
        raise OSError(errno.EINVAL, "it is above what Linux counts to, and not infinite")
    return _LIMITS.index(limit["type"].removeprefix("RLIMIT_")), wanted


def home(uid: int) -> str:
    """The home directory of the user in /etc/passwd inside, "/" if there is none."""
    try:
        fd = os.open("/etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            lines = os.read(fd, _MAX_PASSWD).split(b"\n")
        finally:
            os.close(fd)
    except OSError:
        return "/"
    for line in lines:
        fields = line.split(b":")
        if len(fields) >= 6 and fields[2] == b"%d" % uid and fields[5]:
            return os.fsdecode(fields[5]).replace("\0", "") or "/"
    return "/"


def enter(directory: str) -> bool:
    """Enter the working directory; False if this user may not, and the program's user may be able to."""
    try:
        change_directory(directory)
    except PermissionError:
        return False
    except OSError as error:
        raise StepError(Steps.ENTER_DIRECTORY, error) from None
    return True


def change_directory(path: str) -> None:
    """chdir(2) within the root."""
    os.chdir(path)
    try:
        syscalls.getcwd()
    except FileNotFoundError:  # such as /proc/self/fd/7, if that were a directory of the host (CVE-2024-21626)
        raise PermissionError(errno.EACCES, "it is outside of the container", path) from None


def load_filter(program: Filter, listener: Callable[[int], object] | None) -> None:
    """Load the filter; from here on each system call goes through it."""
    result = load(program.program, program.flags)
    if program.flags & SECCOMP_FILTER_FLAG_NEW_LISTENER:
        if listener is None:
            raise OSError(errno.EOPNOTSUPP, "no process receives its notifications")
        listener(result)


def change_user(user: dict[str, Any]) -> None:
    """Set the groups and IDs of `process.user`. Where setgroups(2) is denied, an empty list of groups is no error."""
    groups = user.get("additionalGids") or []
    try:
        os.setgroups(groups)
    except PermissionError:
        if groups or not setgroups_denied():
            raise
    gid, uid = user.get("gid", 0), user.get("uid", 0)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def setgroups_denied() -> bool:
    """Whether the user namespace forbids setgroups(2), as one made by an ordinary user does (user_namespaces(7))."""
    try:
        with open("/proc/self/setgroups") as file:
            return file.read(5) == "deny\n"
    except OSError:
        return False


def execute(args: list[str], environment: dict[str, str]) -> NoReturn:
    """execve(2) with the search of execvp(3) along the PATH of the new environment."""
    name = args[0]
    candidates = [name] if "/" in name else [f"{d or '.'}/{name}" for d in environment.get("PATH", _PATH).split(":")]
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT) if "/" in name else "no such file in the PATH", name)
    for candidate in candidates:
        try:
            if _is_this_interpreter(candidate):
                raise OSError(errno.EPERM, "it is the runtime's own program", name)
            os.execve(candidate, args, environment)
        except (FileNotFoundError, NotADirectoryError) as error:
            if os.path.lexists(candidate) and failure.errno == errno.ENOENT:
                failure = programs.explained(candidate, error)
        except PermissionError as error:
            failure = programs.explained(candidate, error)
        except OSError as error:
            raise StepError(Steps.EXECUTE, programs.explained(candidate, error)) from None
    raise StepError(Steps.EXECUTE, failure)


def _is_this_interpreter(path: str) -> bool:
    """Whether `path`, such as /proc/self/exe, is the interpreter that runs this code, which must not be executed."""
    return os.path.samestat(os.stat(path), _interpreter)
