"""From birth in new namespaces to the user's program: what PID 1 of a container does before execve(2).

The child of clone3(2) with CLONE_NEWPID is process 1 of a new PID namespace (pid_namespaces(7)): it sees only its
own descendants, numbered from 1, while the host sees all of them under other numbers. It is their init: orphans
become its children, and when it dies the kernel kills the rest. Signals without a handler don't reach it from
inside, and from outside only SIGKILL and SIGSTOP do. With CLONE_NEWUSER it is root inside, and an ordinary user
of the host outside, so everything it does here needs no right of the host: what does, was made by
`insula.container.launch` and is handed in as descriptors.

The steps are in `birth` and, for all processes alike, in `insula.container.departure`. Between the two it waits for
the word to start, so that its network can be made meanwhile. It was forked from the spawner and may import nothing
more: files outside are out of its reach.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from typing import Any, NamedTuple, NoReturn

from insula.container import wire
from insula.container.bundle import INTERRUPTED
from insula.container.departure import Filter, departure
from insula.container.stdio import connect_stdio, open_console, open_null
from insula.container.steps import StepError, close_others, report, reset_signals, step, tell
from insula.kernel import cgroups, linux, mounts

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


class Inheritance(NamedTuple):
    """What the parent made for the child: descriptors that take the host's rights, and the channel between them."""

    sync: socket.socket
    root: int  # detached mount of the root file system
    mounts: dict[int, int]  # index into config.mounts → detached mount
    cgroups: list[int]  # of Cgroup.open
    stdio: list[int]  # stdin, stdout, stderr; -1 is /dev/null inside; empty with a terminal
    filter: Filter | None
    keep: int = 0  # descriptors from 3 on that the program inherits
    controllers: dict[str, str] | None = None  # version 1 hierarchies to mount, None on version 2


def main(config: dict[str, Any], given: Inheritance, tty: bool) -> NoReturn:
    """Run in the child, for ever: it ends as the user's program, or reports to the parent and exits."""
    try:
        reset_signals()
        os.umask(0o022)
        fixed = [given.sync.fileno(), given.root]
        close_others([*fixed, *given.mounts.values(), *given.cgroups, *given.stdio])
        if wire.receive(given.sync) is None:  # the IDs are mapped from here on
            os._exit(INTERRUPTED)
        birth(config, given, tty)
        tell(given.sync, {"event": "ready"})
        if wire.receive(given.sync) is None:
            os._exit(INTERRUPTED)
        departure(config["process"], given.filter, given.keep)
    except StepError as error:
        report(given.sync, error)
    except OSError as error:
        report(given.sync, StepError("prepare", error))
    finally:
        os._exit(125)


# -- birth: everything up to the wait --------------------------------------------------------------------


def birth(config: dict[str, Any], given: Inheritance, tty: bool) -> None:
    """Take the container's place in every namespace: cgroup, IDs, host name, root, terminal."""
    step("join the cgroup", lambda: cgroups.join(given.cgroups))
    # made only now: the cgroup that a process is in when it makes the namespace is the root that it will see
    step("make the cgroup namespace", lambda: linux.unshare(linux.CLONE_NEWCGROUP))
    # while the host's root: an ordinary user, as a tenant is for the host, may have 200 keys in all (keyrings(7))
    step("leave the host's keyring", lambda: linux.join_session_keyring("insula"))
    step("become root inside", become_root)
    step("start a session", os.setsid)
    if hostname := config.get("hostname"):
        step("set the host name", lambda: socket.sethostname(hostname))
    step("bring up loopback", loopback_up)
    root = given.root
    step("attach the root", lambda: linux.move_mount(root, linux.AT_FDCWD, "/"))
    for index, entry in enumerate(config.get("mounts", ())):
        destination = entry["destination"]
        step(f"mount {destination}", lambda i=index, e=entry: mount_entry(root, e, given, i))  # type: ignore[misc]
    for key, value in (config["linux"].get("sysctl") or {}).items():
        step(f"set the sysctl {key}", lambda k=key, v=value: write_sysctl(root, k, v))  # type: ignore[misc]
    step("enter the root", lambda: enter_root(root))
    if tty:
        step("open the terminal", lambda: open_console(config["process"], given.sync))
    else:
        step("connect standard input and output", lambda: connect_stdio(given.stdio))
    step("protect paths", lambda: protect(config["linux"]))
    if config["root"].get("readonly"):
        step("make the root read-only", lambda: remount_readonly(root))
    os.close(root)


def become_root() -> None:
    """ID 0 of the new user namespace, which the parent has mapped."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def loopback_up() -> None:
    """Set IFF_UP on lo (netdevice(7)): a new network namespace has it down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(sock, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", request, 16)[0]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def mount_entry(root: int, entry: dict[str, Any], given: Inheritance, index: int) -> None:
    """Attach one entry of `mounts`: made by the parent, or made here with the rights of the new namespaces."""
    destination, fstype = entry["destination"], entry.get("type", "bind")
    options = mounts.parse_options(entry.get("options", ()))
    if fstype == "cgroup":
        mount_cgroup(root, destination, options.attributes, given.controllers)
        return
    if index in given.mounts:
        mount = given.mounts[index]
        directory = stat.S_ISDIR(os.fstat(mount).st_mode)
    else:
        mount = mounts.filesystem(fstype, options.data, options.attributes, entry.get("source"))
        directory = True
    # nothing may redirect /proc or /sys: what masks paths in them would mask the wrong ones (CVE-2019-19921)
    links = fstype not in ("proc", "sysfs")
    target = mounts.make_target(root, destination, directory=directory, links=links)
    try:
        mounts.attach(mount, target, options.propagation)
    finally:
        os.close(target)
        os.close(mount)


def mount_cgroup(root: int, destination: str, attributes: int, controllers: dict[str, str] | None) -> None:
    """The container's own part of the cgroup tree: the cgroup namespace makes its group the root."""
    target = mounts.make_target(root, destination, directory=True)
    try:
        if controllers is None:
            mounts.attach(tree := mounts.filesystem("cgroup2", (), attributes), target)
            os.close(tree)
            return
        read_only = attributes & linux.MOUNT_ATTR_RDONLY
        tree = mounts.filesystem("tmpfs", ("mode=755", "size=65536"), attributes & ~read_only, "tmpfs")
        mounts.attach(tree, target)
        for name in controllers:
            os.mkdir(name, 0o755, dir_fd=tree)
            place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
            mounts.attach(group := mounts.filesystem("cgroup", (name,), attributes), place)
            os.close(group)
            os.close(place)
        if read_only:
            mounts.set_attributes(tree, read_only)
        os.close(tree)
    finally:
        os.close(target)


def write_sysctl(root: int, key: str, value: str) -> None:
    """A namespaced kernel parameter (sysctl(8)), below /proc/sys of the container."""
    path = "proc/sys/" + key.replace(".", "/")
    fd = mounts.open_beneath(root, path, links=False, flags=os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def enter_root(root: int) -> None:
    """Make the new root the only one: pivot_root(2) stacks the old one on it, and that is detached."""
    os.fchdir(root)
    linux.pivot_root(".", ".")
    linux.umount2(".", linux.MNT_DETACH)
    os.chdir("/")


def remount_readonly(root: int) -> None:
    mounts.set_attributes(root, linux.MOUNT_ATTR_RDONLY)


def protect(config: dict[str, Any]) -> None:
    """maskedPaths can't be read, readonlyPaths not written (OCI runtime-spec, config-linux.md)."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    null, empty = -1, -1
    try:
        for path in config.get("readonlyPaths") or ():
            if (target := _existing(root, path)) is not None:
                copy = mounts.bind("", recursive=True, dirfd=target, attributes=linux.MOUNT_ATTR_RDONLY)
                mounts.attach(copy, target)
                os.close(copy)
                os.close(target)
        for path in config.get("maskedPaths") or ():
            if (target := _existing(root, path)) is None:
                continue
            if stat.S_ISDIR(os.fstat(target).st_mode):
                if empty < 0:
                    empty = mounts.filesystem("tmpfs", ("size=0", "mode=555"), linux.MOUNT_ATTR_RDONLY, "tmpfs")
                    mounts.attach(empty, target)
                else:
                    mounts.attach(copy := mounts.bind("", dirfd=empty), target)
                    os.close(copy)
            else:
                null = null if null >= 0 else open_null()
                mounts.attach(copy := mounts.bind("", dirfd=null), target)
                os.close(copy)
            os.close(target)
    finally:
        for fd in (root, null, empty):
            if fd >= 0:
                os.close(fd)


def _existing(root: int, path: str) -> int | None:
    try:
        return mounts.open_beneath(root, path, links=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
