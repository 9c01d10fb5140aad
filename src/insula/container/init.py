"""From birth in new namespaces to the user's program: what PID 1 of a container does before execve(2).

The child of clone3(2) with CLONE_NEWPID is process 1 of a new PID namespace (pid_namespaces(7)): it sees only its
own descendants, numbered from 1, while the host sees all of them under other numbers. It is their init: orphans
become its children, and when it dies the kernel kills the rest. Signals without a handler don't reach it from
inside, and from outside only SIGKILL and SIGSTOP do. With CLONE_NEWUSER it is root inside, and an ordinary user
of the host outside, so everything it does here needs no right of the host: what does, was made by
`insula.container.launch` and is handed in as descriptors.

The steps are in `birth` and `departure`. Between the two it waits for the word to start, so that its network can
be made meanwhile. It was forked from the spawner and may import nothing more: files outside are out of its reach.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from insula.container import wire
from insula.container.bundle import INTERRUPTED
from insula.kernel import cgroups, linux, mounts
from insula.kernel.capabilities import Capabilities, after_setuid, before_setuid
from insula.kernel.seccomp_load import load

_TIOCGPTN, _TIOCSPTLCK, _TIOCGPTPEER, _TIOCSCTTY = 0x80045430, 0x40045431, 0x5441, 0x540E
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_NULL_DEVICE = os.makedev(1, 3)
_PTMX_DEVICE = os.makedev(5, 2)
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Filter(NamedTuple):
    """A compiled seccomp program, and the flags to load it with (seccomp(2))."""

    program: bytes
    flags: int = 0


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


class StepError(Exception):
    """A step failed: what it was, and the error."""

    def __init__(self, step: str, error: OSError) -> None:
        self.message = {
            "step": step,
            "errno": error.errno or 0,
            "error": error.strerror or str(error),
            "path": error.filename,
        }
        super().__init__(self.message)


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


def report(sync: socket.socket, error: StepError) -> None:
    """Tell the parent why it failed."""
    tell(sync, {"event": "error", **error.message})


def tell(sync: socket.socket, message: wire.Message) -> None:
    """Send the parent a message; without a parent there is nothing to go on for."""
    try:
        wire.send(sync, message)
    except OSError:
        os._exit(INTERRUPTED)


def close_others(keep: list[int]) -> None:
    """Close what the spawner has open for others; without this its end of our own channel would live on in us."""
    first = 3  # the standard streams are replaced later
    for fd in sorted({fd for fd in keep if fd > 2}):
        if fd > first:
            linux.close_range(first, fd - 1)
        first = fd + 1
    linux.close_range(first, 0x7FFFFFFF)


def step(name: str, action: Callable[[], object]) -> None:
    """Run one step, naming it if it fails."""
    try:
        action()
    except OSError as error:
        raise StepError(name, error) from None


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


def reset_signals() -> None:
    """Undo what Python and whoever started us set: a program expects the default actions and nothing blocked."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if signal.getsignal(number) != signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


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


def open_null() -> int:
    """/dev/null of the container, if it really is that device: an image may hold anything at that path."""
    fd = os.open("/dev/null", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _NULL_DEVICE:
        raise OSError(errno.ENODEV, "it is not the null device", "/dev/null")
    return fd


def connect_stdio(stdio: list[int]) -> None:
    """dup2(2) the streams to 0, 1 and 2; -1 becomes /dev/null."""
    null = open_null() if -1 in stdio else -1
    # first out of the way of each other: a source may itself be 0, 1 or 2
    sources = [fcntl.fcntl(null if fd < 0 else fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in stdio]
    for number, source in enumerate(sources):
        os.dup2(source, number, inheritable=True)
        os.close(source)


def open_console(process: dict[str, Any], sync: socket.socket) -> None:
    """A pseudoterminal (pty(7)) of the container's own devpts: its other side goes to the parent."""
    master, slave = open_terminal(process)
    number = struct.unpack("I", fcntl.ioctl(master, _TIOCGPTN, bytes(4)))[0]
    console = mounts.bind(f"/dev/pts/{number}")
    try:
        os.close(os.open("/dev/console", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        target = os.open("/dev/console", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        mounts.attach(console, target)
        os.close(target)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    finally:
        os.close(console)
    wire.send(sync, {"event": "terminal"}, [master])
    os.close(master)
    take_terminal(slave)


def open_terminal(process: dict[str, Any]) -> tuple[int, int]:
    """Both sides of a new pseudoterminal, the second owned by the program's user."""
    master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(master)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _PTMX_DEVICE:
        raise OSError(errno.ENODEV, "it is not a terminal multiplexer", "/dev/pts/ptmx")
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    # by ioctl, not by name: whoever runs in the container can't put another file in between
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    os.fchown(slave, (process.get("user") or {}).get("uid", 0), -1)
    size = process.get("consoleSize")
    if size:
        fcntl.ioctl(slave, 0x5414, struct.pack("4H", size["height"], size["width"], 0, 0))  # TIOCSWINSZ
    return master, slave


def take_terminal(slave: int) -> None:
    """Make it the controlling terminal (TIOCSCTTY) and the standard streams."""
    fcntl.ioctl(slave, _TIOCSCTTY, 0)
    connect_stdio([slave, slave, slave])
    if slave > 2:
        os.close(slave)


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


# -- departure: give up what is left, and become the program ---------------------------------------------


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


_interpreter = os.stat("/proc/self/exe")


def _is_this_interpreter(path: str) -> bool:
    """Whether `path`, such as /proc/self/exe, is the host's file that runs this code (CVE-2019-5736)."""
    return os.path.samestat(os.stat(path), _interpreter)
