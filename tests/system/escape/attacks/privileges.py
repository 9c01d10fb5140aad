"""Privilege escalation: by a file, by exec, by a new user namespace, by prctl(2)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import struct
import sys
from collections.abc import Callable

from tests.system.escape.attacks.calls import syscall
from tests.system.escape.attacks.processes import identity

CAP_SYS_ADMIN, CAP_NET_RAW, CAP_CHOWN = 21, 13, 0
PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAPBSET_READ, PR_SET_KEEPCAPS = 28, 38, 47, 23, 8
PR_CAP_AMBIENT_RAISE = 2
EVERYTHING = struct.pack("<5I", 0x02000000, 0xFFFFFFFF, 0, 0x1FF, 0)
"""security.capability (capabilities(7)): version 2, all permitted, nothing inheritable."""
_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: int) -> int:
    words = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    result = int(_libc.prctl(option, *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), "prctl")
    return result


def after_exec(program: str) -> dict[str, object]:
    """The privileges of `program` after execve(2): it must be a copy of Python, and runs this file's `identity`."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]);"
        "from tests.system.escape.attacks.processes import identity; print(json.dumps(identity()))"
    )
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        path = next(p for p in sys.path if os.path.exists(f"{p}/tests/system/escape/attacks"))
        try:
            os.execve(program, [program, "-S", "-B", "-c", code, path], {"PYTHONHOME": sys.base_prefix})
        except OSError as error:
            os._exit(error.errno or 255)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise OSError(status, "exec", program)
    found: dict[str, object] = json.loads(said)
    return found


def more_capabilities() -> dict[str, str]:
    """Every way that capabilities(7) knows to get one that isn't permitted: the errno of each, "" where it works."""
    header = struct.pack("Ii", 0x20080522, 0)
    everything = struct.pack("6I", *(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF) * 2)
    ways: dict[str, Callable[[], object]] = {
        "capset": lambda: syscall("capset", header, everything),
        "ambient": lambda: prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_SYS_ADMIN),
        "forget no_new_privs": lambda: prctl(PR_SET_NO_NEW_PRIVS, 0),
        "setuid": _become_root,
        "map IDs": _map_ids,
        "lower the bounding set's guard": lambda: prctl(PR_SET_SECUREBITS, 0x2F),
    }
    found = {}
    for name, way in ways.items():
        try:
            way()
            found[name] = ""
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


def _become_root() -> None:
    os.setresuid(0, 0, 0)


def _map_ids() -> None:
    with open("/proc/self/uid_map", "w") as file:
        file.write("0 0 4294967295")


def privileged_files(program: str, directory: str) -> dict[str, object]:
    """Copies of `program` with every mark that exec rewards: set-uid root, all capabilities (version 2 and 3)."""
    marks: dict[str, object] = {}
    for name, mark in (
        ("setuid", _set_uid),
        ("setgid", _set_gid),
        ("caps2", _capabilities_2),
        ("caps3", _capabilities_3),
    ):
        path = f"{directory}/{name}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with open(program, "rb") as source, open(path, "wb") as copy:
            copy.write(source.read())
        os.chmod(path, 0o755)
        try:
            mark(path)
            marks[name] = ""
        except OSError as error:
            marks[name] = errno.errorcode[error.errno or 0]
    return marks


def _set_uid(path: str) -> None:
    os.chmod(path, 0o4755)


def _set_gid(path: str) -> None:
    os.chmod(path, 0o2755)


def _capabilities_2(path: str) -> None:
    os.setxattr(path, "security.capability", EVERYTHING)


def _capabilities_3(path: str) -> None:
    """Version 3 names the root for whom it counts: here the host's."""
    os.setxattr(path, "security.capability", struct.pack("<6I", 0x03000000, 0xFFFFFFFF, 0, 0x1FF, 0, 0))


def nested() -> dict[str, object]:
    """A user namespace in the user namespace, in which one is root with all capabilities: and what they reach."""
    syscall("unshare", 0x10000000)
    found: dict[str, object] = dict(identity())
    found["mount"] = _errno(lambda: (syscall("unshare", 0x20000), syscall("mount", b"n", b"/tmp", b"tmpfs", 0, None)))
    found["core_pattern"] = _errno(lambda: os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY)))
    found["mknod"] = _errno(lambda: os.mknod("/tmp/node", 0o20666, os.makedev(1, 1)))
    found["chown"] = _errno(lambda: os.chown("/etc/passwd", 1, 1))
    return found


def _errno(function: Callable[[], object]) -> str:
    try:
        function()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""
