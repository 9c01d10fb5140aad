"""Attacks on the runtime from inside of a container that it makes or joins."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

from tests.system.escape.attacks.calls import syscall

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
KEYCTL_LINK, KEYCTL_SEARCH, KEYCTL_READ, SESSION, USER = 8, 10, 11, -3, -4


def programs(seconds: float, ready: str) -> list[list[object]]:
    """CVE-2019-5736: opens the program of every process that comes, keeps it, and tries to open that for writing until
    nobody executes it any more. Writes what is there already: [device, inode, whether it could] of each.

    Ends `seconds` after it has both a file that it could write and one that it could not, or after 40.
    """
    held: dict[tuple[int, int], int] = {}
    written: set[tuple[int, int]] = set()
    open(ready, "w").close()
    end, decided = time.monotonic() + 40, False
    while time.monotonic() < end:
        if not decided and written and len(held) > len(written):
            end, decided = time.monotonic() + seconds, True
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) not in (os.getpid(), os.getppid()):
                with contextlib.suppress(OSError):
                    fd = os.open(f"/proc/{name}/exe", os.O_RDONLY)
                    status = os.fstat(fd)
                    key = (status.st_dev, status.st_ino)
                    if key in held:
                        os.close(fd)
                    else:
                        held[key] = fd
        for key in held.keys() - written:
            with contextlib.suppress(OSError):
                _write_again(held[key])
                written.add(key)
    return [[*key, key in written] for key in held]


def _write_again(fd: int) -> None:
    """Writes the first byte of the file as it is, through a descriptor that was open for reading."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    try:
        os.pwrite(again, os.pread(fd, 1, 0), 0)
    finally:
        os.close(again)


def where() -> dict[str, object]:
    """The working directory as the kernel has it, and what is to be seen from it and from every open directory."""
    seen = {}
    for path in (".", "../../../../../../..", *(f"/proc/self/fd/{n}" for n in range(3, 40))):
        with contextlib.suppress(OSError):
            seen[path] = sorted(os.listdir(path))[:20]
    try:
        here = os.getcwd()
    except OSError as error:
        here = str(error)
    return {"cwd": here, "seen": seen}


def key_of_the_session(name: str) -> str:
    """The content of a key in the session's keyring; keyrings (keyrings(7)) are inherited through fork and exec."""
    key = syscall("keyctl", KEYCTL_SEARCH, SESSION, b"user", name.encode(), 0)
    buffer = ctypes.create_string_buffer(100)
    size = syscall("keyctl", KEYCTL_READ, key, buffer, len(buffer), 0)
    return buffer.raw[:size].decode()


def masks(*paths: str) -> dict[str, list[int] | str]:
    """The mask of each path: type and device number, and how many bytes can be read; or why it can't be."""
    found: dict[str, list[int] | str] = {}
    for path in paths:
        try:
            status = os.stat(path)
            with open(path, "rb") as file:
                found[path] = [
                    status.st_mode >> 12,
                    os.major(status.st_rdev),
                    os.minor(status.st_rdev),
                    len(file.read(64)),
                ]
        except OSError as error:
            found[path] = str(error)
    return found


def mounts() -> list[list[str]]:
    """The mount points, and the type of each."""
    with open("/proc/self/mountinfo") as file:
        lines = [line.split() for line in file]
    return [[line[4], line[line.index("-") + 1]] for line in lines]


def a_new(fstype: str) -> int:
    """A file system of the kernel's without its masks: mounted in new user, PID, network and mount namespaces."""
    child = os.fork()
    if child == 0:
        try:
            syscall("unshare", CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS)
            inner = os.fork()
            if inner:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))
            syscall("mount", fstype.encode(), b"/tmp", fstype.encode(), 0, None)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise OSError(status, os.strerror(status), fstype)
    return status
