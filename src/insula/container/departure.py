"""The last steps of a process that becomes the user's program: give up what is left, then execve(2).

The order is what keeps it possible: each step takes a right that a later one gives away. The seccomp filter comes last,
so that it need not allow what the steps before it do; with no_new_privs set, loading one takes no right at all.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import Any, NamedTuple, NoReturn

from insula.container.steps import StepError, step
from insula.kernel import linux
from insula.kernel.capabilities import Capabilities, after_setuid, before_setuid
from insula.kernel.seccomp_load import load

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_interpreter = os.stat("/proc/self/exe")


class Filter(NamedTuple):
    """A compiled seccomp program, and the flags to load it with (seccomp(2))."""

    program: bytes
    flags: int = 0


def departure(process: dict[str, Any], program: Filter | None, keep: int = 0) -> NoReturn:
    """Limits, user, capabilities, filter, execve: in the order in which each still has the right to happen."""
    user = process.get("user") or {}
    capabilities = Capabilities.from_oci(process.get("capabilities"))
    for limit in process.get("rlimits") or ():
        number = getattr(resource, limit["type"])
        # RLIM_INFINITY is all ones in the spec, and -1 to Python
        value = tuple(-1 if limit[bound] == (1 << 64) - 1 else limit[bound] for bound in ("soft", "hard"))
        if resource.getrlimit(number) != value:
            step(f"set {limit['type']}", lambda n=number, v=value: set_limit(n, v))  # type: ignore[misc]
    if process.get("noNewPrivileges"):
        step("set no_new_privs", lambda: linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1))
    elif program is not None:  # without it a filter takes CAP_SYS_ADMIN, which is about to go
        step("load the seccomp filter", lambda: load(*program))
    step("drop capabilities", lambda: before_setuid(capabilities))
    step("change the user", lambda: change_user(user))
    step("drop capabilities", lambda: after_setuid(capabilities))
    os.umask(user.get("umask", 0o022))
    step("enter the working directory", lambda: os.chdir(process.get("cwd") or "/"))
    linux.close_range(3 + keep, 0x7FFFFFFF, linux.CLOSE_RANGE_CLOEXEC)
    for fd in range(3, 3 + keep):
        os.set_inheritable(fd, True)
    if program is not None and process.get("noNewPrivileges"):
        step("load the seccomp filter", lambda: load(*program))
    execute(process["args"], process.get("env") or [])


def set_limit(number: int, value: tuple[int, int]) -> None:
    """setrlimit(2), with an OSError as all else here: Python makes a ValueError of EPERM and EINVAL."""
    try:
        resource.setrlimit(number, value)
    except ValueError:
        raise PermissionError(errno.EPERM, "it is above what insulad itself may have") from None


def change_user(user: dict[str, Any]) -> None:
    os.setgroups(user.get("additionalGids") or [])
    gid, uid = user.get("gid", 0), user.get("uid", 0)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def execute(args: list[str], environment: list[str]) -> NoReturn:
    """execve(2) with the search of execvp(3) along the PATH of the new environment."""
    env = dict(entry.partition("=")[::2] for entry in environment)
    name = args[0]
    candidates = [name] if "/" in name else [f"{d or '.'}/{name}" for d in env.get("PATH", _PATH).split(":")]
    failure = OSError(errno.ENOENT, "no such file in the PATH", name)
    for candidate in candidates:
        try:
            if _is_this_interpreter(candidate):
                raise OSError(errno.EPERM, "it is the runtime's own program", name)
            os.execve(candidate, args, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            failure = OSError(error.errno, error.strerror, candidate)
        except OSError as error:
            raise StepError("execute", OSError(error.errno, error.strerror, candidate)) from None
    if "/" in name and failure.errno == errno.ENOENT:
        failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    raise StepError("execute", failure)


def _is_this_interpreter(path: str) -> bool:
    """Whether `path`, such as /proc/self/exe, is the host's file that runs this code (CVE-2019-5736)."""
    return os.path.samestat(os.stat(path), _interpreter)
