"""PID 1 of a container, from clone3(2) into new namespaces to execve(2) of the user's program.

The child of clone3(2) with CLONE_NEWPID is process 1 of a new PID namespace (pid_namespaces(7)): it sees only its
own descendants, numbered from 1, while the host sees all of them under other numbers. It is their init: orphans
become its children, and when it dies the kernel kills the rest. Signals without a handler don't reach it from
inside, and from outside only SIGKILL and SIGSTOP do. With CLONE_NEWUSER it is root inside, and an ordinary user
of the host outside, so everything it does here needs no right of the host: what does, was made by
`insula.container.create.spawn` and is handed in as descriptors.

It goes through stages, between which it exchanges messages with its parent over a socket:

    parent                                  child
    maps its IDs            "mapped"   →
                                            `setup_namespaces`: control group, IDs, keyring, session, loopback,
                                                      /proc, /sys, /dev (nearly the same for many containers)
                         ←  "parked"
                            "launch"   →      (only a warm container, `insula.container.create.warm`)
                                            `setup_rootfs`: names, root, mounts
    opens sources        ←  "open"            (`insula-oci`, see `insula.container.create.sources`)
                            "opened"       →
    runs hooks           ←  "mounted"         (only if there are hooks)
                            "go on"    →      createContainer hooks, paths, pivot_root, streams
                                            `insula.container.create.exec_process`: user, rights
                         ←  "ready"
                            "start"    →    filter, startContainer hooks, execve(2)

The zygote of the service lives longer than its containers, and keeps the socket. `insula-oci create` does not: it sends
"created" in place of "start", and exits. From then on the child waits at a listening socket of its own for
`insula-oci start`, which sends "start" over a new connection. Either way execve closes the connection, which is the
sign of success; else the error comes over it. The child was forked from its parent and can import nothing more: files
outside are out of its reach.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from insula.container import wire
from insula.container.create import exec_process, no_pivot, rootfs
from insula.container.create.stdio import connect_stdio, open_console
from insula.container.create.steps import (
    StepError,
    Steps,
    close_others,
    forbid_imports,
    recv,
    reset_signals,
    send,
    send_error,
    step,
)
from insula.kernel import cgroups, mounts, syscalls
from insula.model.cpython import signal, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from insula.container.create.cgroup_mount import Groups
    from insula.container.create.exec_process import Filter
    from insula.container.create.namespaces import Plan
    from insula.container.create.rootfs import PremountPlan, Premounts
    from insula.container.create.sources import PreparedMounts

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_ENDING = (1, 2, 3, 15)
"""SIGHUP, SIGINT, SIGQUIT, SIGTERM: the signals that ask a process to end."""


class InitArgs:
    """The arguments of PID 1: descriptors that the parent opened with the host's rights, and the channel to it."""

    def __init__(
        self,
        *,
        sync: socket.socket,
        root: int,
        sources: PreparedMounts,
        join: list[int],
        groups: Groups,
        stdio: list[int],
        program: Filter | None,
        tty: bool = False,
        keep: int = 0,
        inherit: list[int] | None = None,
        pivot: bool = True,
        keyring: bool = True,
        in_order: bool = False,
        waits_at: socket.socket | None = None,
        notify_at: str = "",
        state: dict[str, Any] | None = None,
    ) -> None:
        self.sync = sync
        self.root = root  # detached mount of the root file system
        self.sources = sources
        self.join = join  # of Cgroup.open
        self.groups = groups
        self.stdio = stdio  # stdin, stdout, stderr; -1 is /dev/null inside; empty with a terminal
        self.program = program
        self.tty = tty
        self.keep = keep  # descriptors from 3 on that the program inherits
        self.inherit = inherit or []  # the same, with other numbers before
        self.pivot = pivot
        self.keyring = keyring
        self.in_order = in_order  # there are no premounts, and the current directory is where the root is attached
        self.waits_at = waits_at  # listening socket for a `start` of another process
        self.notify_at = notify_at  # directory inside for the socket of sd_notify(3); empty for none
        self.notifications: socket.socket | None = None  # that socket, which who starts the container gets
        self.state = state or {}  # of the runtime-spec, for hooks

    def descriptors(self) -> list[int]:
        sockets = [self.sync.fileno()] + ([self.waits_at.fileno()] if self.waits_at else [])
        root = [self.root] if self.root >= 0 else []
        kept = [*range(3, 3 + self.keep), *self.inherit]
        return [*sockets, *root, *self.sources.descriptors(), *self.join, *self.stdio, *kept]


def main(config: dict[str, Any], args: InitArgs, plan: Plan) -> NoReturn:
    """Run in the child: become the program of `config`, or send the parent an error and exit."""

    def body() -> NoReturn:
        sanitize(args, plan)
        args.sources.sync = args.sync
        premount_plan = None if args.in_order else rootfs.PremountPlan(config)
        exec_program(config, args, plan, setup_namespaces(plan, premount_plan, args))

    send_errors(args, body)


def send_errors(args: InitArgs, body: Callable[[], NoReturn]) -> NoReturn:
    """Run `body`, sending its error to the parent. Never returns into the code that forked."""
    try:
        body()
    except StepError as error:
        send_error(args.sync, error)
    except OSError as error:
        send_error(args.sync, StepError(Steps.PREPARE, error))
    finally:
        os._exit(125)


def sanitize(args: InitArgs, plan: Plan) -> None:
    """Close and reset what fork(2) copied from the parent, make the process undumpable, and wait for the ID mapping."""
    forbid_imports()
    reset_signals()
    os.umask(0o022)
    close_others([*args.descriptors(), *plan.descriptors()])
    for fd in plan.descriptors():
        os.close(fd)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # no process inside may inspect this one through /proc
    recv(args.sync)  # the IDs are mapped from here on


def exec_program(config: dict[str, Any], args: InitArgs, plan: Plan, premounts: Premounts | None) -> NoReturn:
    """Set up the root file system, and become the program of `config`."""
    setup_rootfs(config, args, plan, premounts)
    if args.waits_at:
        find_program(config["process"])
    if args.inherit:
        renumber(args)
    # nothing of the host's stays open while it waits, nor what led to the container's mounts
    waits = [each.fileno() for each in (args.waits_at, args.notifications) if each]
    close_others([args.sync.fileno(), *waits, *range(3, 3 + args.keep)])
    last = None
    if (config.get("hooks") or {}).get("startContainer"):  # of the image, and so as little to be trusted as the program
        last = lambda environment: run_hooks(config, "startContainer", args, "created", environment)  # noqa: E731
    exec_process.exec_process(
        config["process"],
        args.program,
        args.keep,
        personality=config["linux"].get("personality"),
        memory_policy=config["linux"].get("memoryPolicy"),
        listener=lambda fd: offer_listener(args.sync.fileno(), fd),
        warn=lambda text: send(args.sync, {"event": "warning", "message": text}),
        wait=lambda: wait_for_start(args),
        last=last,
    )


def renumber(args: InitArgs) -> None:
    """Give the descriptors that the program inherits the numbers from 3 on, and the channel to the parent another."""
    above = 3 + len(args.inherit)
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in args.inherit]
    args.sync = socket.socket(fileno=fcntl.fcntl(args.sync.detach(), fcntl.F_DUPFD_CLOEXEC, above))
    for number, source in enumerate(sources):
        os.dup2(source, 3 + number, inheritable=False)
    args.keep = len(sources)


# -- the same for many containers --------------------------------------------------------------------------------------


def setup_namespaces(plan: Plan, premount_plan: PremountPlan | None, args: InitArgs) -> Premounts | None:
    """Set up IDs, session, loopback, /proc, /sys and /dev: what is the same for all containers with the same plan."""
    step(Steps.JOIN_CGROUP, cgroups.join, args.join)
    if plan.cgroup:
        # made only now: the cgroup that a process is in when it makes the namespace is the root that it will see
        step(Steps.MAKE_CGROUP_NAMESPACE, syscalls.unshare, syscalls.CLONE_NEWCGROUP)
    if args.keyring:
        # while the host's root: an ordinary user, as a tenant is for the host, may have 200 keys in all (keyrings(7))
        step(Steps.LEAVE_KEYRING, syscalls.join_session_keyring)
    step(Steps.BECOME_ROOT, become_root)
    step(Steps.START_SESSION, os.setsid)
    if plan.makes(syscalls.CLONE_NEWNET):
        step(Steps.BRING_UP_LOOPBACK, loopback_up)
    if not plan.makes(syscalls.CLONE_NEWUSER):  # with it the copies of shared mounts are slaves from the beginning
        step(Steps.PART_FROM_MOUNTS, syscalls.mount, None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    return rootfs.make_premounts(premount_plan, args.sources, args.groups) if premount_plan else None


def become_root() -> None:
    """Become user and group 0 of the new user namespace, which the parent has mapped."""
    try:
        os.setgroups([])
    except PermissionError:  # without the right to map groups they can't be changed either (user_namespaces(7))
        if not exec_process.setgroups_denied():
            raise
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def loopback_up() -> None:
    """Set IFF_UP on lo (netdevice(7)): a new network namespace has it down."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(sock.fileno(), _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", request, 16)[0]
        fcntl.ioctl(sock.fileno(), _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))
    finally:
        sock.close()


# -- this container ----------------------------------------------------------------------------------------------------


def setup_rootfs(config: dict[str, Any], args: InitArgs, plan: Plan, premounts: Premounts | None) -> None:
    """Set host name, root file system and streams."""
    if hostname := config.get("hostname"):
        step(Steps.SET_HOSTNAME, socket.sethostname, hostname)
    if domainname := config.get("domainname"):
        step(Steps.SET_DOMAINNAME, syscalls.setdomainname, domainname)
    tree = rootfs.MountTree(config, args.root, args.sources, args.groups, plan)
    tree.build(premounts, here=args.in_order)
    if args.notify_at:
        from insula.container.create import sd_notify

        try:
            args.notifications = sd_notify.make(args.root, args.notify_at)
        except OSError as error:
            raise StepError(Steps.MAKE_NOTIFY_SOCKET, error) from None
    if config.get("hooks"):
        run_create_hooks(config, args)
    # root's in `insula-oci`, as the peers have it; the user's in the engine, as if the image had it
    owner = {} if args.in_order else config["process"].get("user") or {}
    step(Steps.MAKE_DIRECTORY, make_directory, args.root, config["process"].get("cwd") or "/", owner)
    for key, value in (config["linux"].get("sysctl") or {}).items():
        step(Steps.SET_SYSCTL, rootfs.write_sysctl, args.root, premounts, key, value, about=key)
    rootfs.protect_paths(config, args.root, premounts)
    if args.in_order and not args.pivot:
        step(Steps.ENTER_ROOT, no_pivot.enter, args.root)
    else:
        step(Steps.ENTER_ROOT, lambda: rootfs.enter(args.root, pivot=args.pivot))
    rootfs.propagate_root(config, args.root)
    if args.tty:
        step(Steps.OPEN_TERMINAL, open_console, config["process"], args.sync)
    else:
        step(Steps.CONNECT_STREAMS, connect_stdio, args.stdio)
    rootfs.seal(config, tree)
    os.close(args.root)


def make_directory(root: int, path: str, owner: dict[str, Any]) -> None:
    """Make the directory `path` in the container, for `uid` and `gid` of `owner`, if there is nothing at `path`."""
    try:
        os.close(mounts.open_beneath(root, path))
    except FileNotFoundError:
        made = mounts.make_target(root, path, directory=True)
        os.chown(".", owner.get("uid", 0), owner.get("gid", 0), dir_fd=made)
        os.close(made)
    except OSError:  # entering it fails too, with the reason
        return


def run_create_hooks(config: dict[str, Any], args: InitArgs) -> None:
    """Wait for the parent to run prestart and createRuntime hooks; run createContainer hooks among the host's paths."""
    send(args.sync, {"event": "mounted"})
    recv(args.sync)
    os.fchdir(args.root)
    run_hooks(config, "createContainer", args, "creating")


def run_hooks(
    config: dict[str, Any], kind: str, args: InitArgs, status: str, environment: dict[str, str] | None = None
) -> None:
    """Run the hooks of one kind in the container's namespaces: the PID in their state is the one inside."""
    from insula.container.create import hooks

    hooks.run(config, kind, {**args.state, "pid": os.getpid(), "status": status}, environment)


def offer_listener(sync: int, listener: int) -> None:
    """Offer the listener of a seccomp filter to the parent (`insula.container.create.notify`)."""
    from insula.container.create import notify

    notify.offer(sync, listener)


def find_program(process: dict[str, Any]) -> None:
    """Check that there is something to execute: engines expect `create` to fail if there isn't."""
    name, path = process["args"][0], None
    for entry in process.get("env") or ():
        if entry.startswith("PATH="):
            path = entry.removeprefix("PATH=")
    directory = process.get("cwd") or "/"
    if "/" not in name and path is None:
        return
    places = [""] if "/" in name else (path or "").split(":")
    refusals = {refusal(os.path.join(directory, place, name)) for place in places}
    if 0 not in refusals:  # as execvp(3): EACCES of one file counts more than ENOENT of others
        number = max(refusals)
        raise StepError(Steps.EXECUTE, OSError(number, os.strerror(number), name))


def refusal(path: str) -> int:
    """The error that execve(2) of `path` would have, as far as stat(2) tells: ENOENT, EACCES, or 0."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return errno.ENOENT
    except OSError:
        return 0
    return 0 if stat.S_ISREG(found.st_mode) and found.st_mode & 0o111 else errno.EACCES


def wait_for_start(args: InitArgs) -> None:
    """Wait until "start" comes, from the parent or by a later connection, and send the socket of sd_notify(3) back."""
    receive_start(args)
    if args.notifications:
        send(args.sync, {"event": "notifications"}, [args.notifications.fileno()])
        args.notifications.close()


def receive_start(args: InitArgs) -> None:
    """Wait until the parent sends "start", or sends "created" and a later connection to the socket sends it."""
    if args.waits_at:
        # process 1 of a PID namespace gets no signal without a handler; execve(2) restores the default actions
        for number in _ENDING:
            signal.signal(number, end_by_signal)
    send(args.sync, {"event": "ready"})
    if recv(args.sync)["event"] == "start":
        return
    if args.waits_at is None:
        raise OSError(errno.EPROTO, "there is no process to wait for")
    args.sync.close()
    while True:
        fd, _ = args.waits_at._accept()  # type: ignore[attr-defined]
        sync = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
        received = wire.receive(sync)
        if received and received[0].get("event") == "start":
            args.sync = sync
            args.waits_at.close()
            return
        sync.close()


def end_by_signal(number: int, _frame: object) -> NoReturn:
    """Exit with the status that a shell shows for a process that the signal ended: 128 and its number."""
    os._exit(128 + number)
