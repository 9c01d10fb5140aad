"""From birth in new namespaces to the user's program: what PID 1 of a container does before execve(2).

The child of clone3(2) with CLONE_NEWPID is process 1 of a new PID namespace (pid_namespaces(7)): it sees only its
own descendants, numbered from 1, while the host sees all of them under other numbers. It is their init: orphans
become its children, and when it dies the kernel kills the rest. Signals without a handler don't reach it from
inside, and from outside only SIGKILL and SIGSTOP do. With CLONE_NEWUSER it is root inside, and an ordinary user
of the host outside, so everything it does here needs no right of the host: what does, was made by
`insula.container.create.spawn` and is handed in as descriptors.

Its life before the program has stages, and words between them, over a socket to the parent:

    parent                                  child
    maps its IDs            "mapped"   →
                                            `first`:  control group, IDs, keyring, session, loopback, /proc,
                                                      /sys, /dev (nearly the same for many containers)
                         ←  "parked"
                            "launch"   →      (only if it is made ahead: `park`, `insula.container.service.warm_pool`)
                                            `second`: names, root, mounts
    opens sources        ←  "open"            (`insula-oci`, see `insula.container.create.sources`)
                            "opened"       →
    runs hooks           ←  "mounted"         (only if there are hooks)
                            "go on"    →      createContainer hooks, paths, pivot_root, streams
                                            `insula.container.create.exec_process`: user, rights
                         ←  "ready"
                            "start"    →    filter, startContainer hooks, execve(2)

The engine's spawner lives longer than its containers, and keeps the socket. `insula-oci create` does not: it says
"created" in place of "start", and goes. From then on the child waits at a listening socket of its own for `insula-oci
start`, which says "start" over a new connection. Either way the connection closes by execve, which is the sign that
all went well, or brings the error. It was forked from its parent and may import nothing more: files outside are out of
its reach.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import stat
import struct

from insula.container import wire
from insula.container.create import exec_process, no_pivot, rootfs
from insula.container.create.stdio import connect_stdio, open_console
from insula.container.create.steps import (
    INTERRUPTED,
    StepError,
    close_others,
    forbid_imports,
    hear,
    report,
    reset_signals,
    step,
    tell,
)
from insula.kernel import cgroups, linux, mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import Any, NoReturn

    from insula.container.create.cgroup_mount import Groups
    from insula.container.create.exec_process import Filter
    from insula.container.create.namespaces import Plan
    from insula.container.create.rootfs import Stage, Staged
    from insula.container.create.sources import Sources
else:
    import _signal

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_ENDING = (1, 2, 3, 15)
"""SIGHUP, SIGINT, SIGQUIT, SIGTERM: the signals that ask a process to end."""


class Inheritance:
    """What the parent made for the child: descriptors that take the host's rights, and the channel between them."""

    def __init__(
        self,
        *,
        sync: _socket.socket,
        root: int,
        sources: Sources,
        join: list[int],
        groups: Groups,
        stdio: list[int],
        program: Filter | None,
        tty: bool = False,
        keep: int = 0,
        pivot: bool = True,
        keyring: bool = True,
        in_order: bool = False,
        waits_at: _socket.socket | None = None,
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
        self.pivot = pivot
        self.keyring = keyring
        self.in_order = in_order  # nothing is staged, and the current directory is where the root is attached
        self.waits_at = waits_at  # listening socket for a `start` of another process
        self.state = state or {}  # of the runtime-spec, for hooks

    def descriptors(self) -> list[int]:
        sockets = [self.sync.fileno()] + ([self.waits_at.fileno()] if self.waits_at else [])
        root = [self.root] if self.root >= 0 else []
        return [*sockets, *root, *self.sources.descriptors(), *self.join, *self.stdio, *range(3, 3 + self.keep)]


def main(config: dict[str, Any], given: Inheritance, plan: Plan) -> NoReturn:
    """Run in the child, for ever: it ends as the user's program, or reports to the parent and exits."""

    def live() -> NoReturn:
        settle(given, plan)
        given.sources.sync = given.sync
        become(config, given, plan, first(plan, None if given.in_order else rootfs.Stage(config), given))

    reporting(given, live)


def park(stage: Stage, given: Inheritance, plan: Plan) -> NoReturn:
    """The same in a child that is made ahead: it hears only after `first` which container it will be."""
    from insula.container.service.assignment import (
        Handover,  # the spawner has loaded it; `insula-oci` has no use for it
    )

    def live() -> NoReturn:
        linux.set_name("insula-spare")
        settle(given, plan)
        staged = first(plan, stage, given)
        if staged:
            step("leave the host's files", lambda: rootfs.leave_host(staged))
            given.pivot = False  # done
        tell(given.sync, {"event": "parked"})
        handover = Handover.receive(given.sync)
        if handover is None:
            os._exit(INTERRUPTED)
        config = handover.read_config()
        given.root, given.sources, given.stdio = handover.root, handover.sources, handover.stdio
        given.program, given.tty = handover.read_program(), bool(config["process"].get("terminal"))
        become(config, given, plan, staged)

    reporting(given, live)


def reporting(given: Inheritance, live: Callable[[], NoReturn]) -> NoReturn:
    """Have an error told to the parent; nothing ever returns into what was forked."""
    try:
        live()
    except StepError as error:
        report(given.sync, error)
    except OSError as error:
        report(given.sync, StepError("prepare", error))
    finally:
        os._exit(125)


def settle(given: Inheritance, plan: Plan) -> None:
    """Nothing of the parent's is left here, nobody looks in, and the IDs are mapped."""
    forbid_imports()
    reset_signals()
    os.umask(0o022)
    close_others([*given.descriptors(), *plan.descriptors()])
    for fd in plan.descriptors():
        os.close(fd)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # nobody inside may look at this process through /proc
    hear(given.sync)  # the IDs are mapped from here on


def become(config: dict[str, Any], given: Inheritance, plan: Plan, staged: Staged | None) -> NoReturn:
    """From the end of stage 1 to the user's program."""
    second(config, given, plan, staged)
    if given.waits_at:
        find_program(config["process"])
    # nothing of the host's stays open while it waits, nor what led to the container's mounts
    waits = [given.waits_at.fileno()] if given.waits_at else []
    close_others([given.sync.fileno(), *waits, *range(3, 3 + given.keep)])
    last = None
    if (config.get("hooks") or {}).get("startContainer"):  # of the image, and so as little to be trusted as the program
        last = lambda environment: run_hooks(config, "startContainer", given, "created", environment)  # noqa: E731
    exec_process.departure(
        config["process"],
        given.program,
        given.keep,
        personality=config["linux"].get("personality"),
        memory_policy=config["linux"].get("memoryPolicy"),
        listener=lambda fd: offer_listener(given.sync.fileno(), fd),
        warn=lambda text: tell(given.sync, {"event": "warning", "message": text}),
        wait=lambda: wait_for_start(given),
        last=last,
    )


# -- stage 1: the same for many containers -----------------------------------------------------------------------------


def first(plan: Plan, stage: Stage | None, given: Inheritance) -> Staged | None:
    """What depends on nothing but namespaces, control group and the mounts of `stage`: who it is, /proc, /sys, /dev."""
    step("join the cgroup", lambda: cgroups.join(given.join))
    if plan.cgroup:
        # made only now: the cgroup that a process is in when it makes the namespace is the root that it will see
        step("make the cgroup namespace", lambda: linux.unshare(linux.CLONE_NEWCGROUP))
    if given.keyring:
        # while the host's root: an ordinary user, as a tenant is for the host, may have 200 keys in all (keyrings(7))
        step("leave the host's keyring", lambda: linux.join_session_keyring())
    step("become root inside", become_root)
    step("start a session", os.setsid)
    if plan.makes(linux.CLONE_NEWNET):
        step("bring up loopback", loopback_up)
    if not plan.makes(linux.CLONE_NEWUSER):  # with it the copies of shared mounts are slaves from the beginning
        step("part from the host's mounts", lambda: linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE))
    return rootfs.make_stage(stage, given.sources, given.groups) if stage else None


def become_root() -> None:
    """ID 0 of the new user namespace, which the parent has mapped."""
    try:
        os.setgroups([])
    except PermissionError:  # who may not map groups gave up changing them (user_namespaces(7))
        if not exec_process.setgroups_denied():
            raise
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def loopback_up() -> None:
    """Set IFF_UP on lo (netdevice(7)): a new network namespace has it down."""
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(sock.fileno(), _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", request, 16)[0]
        fcntl.ioctl(sock.fileno(), _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))
    finally:
        sock.close()


# -- stage 2: this container -------------------------------------------------------------------------------------------


def second(config: dict[str, Any], given: Inheritance, plan: Plan, staged: Staged | None) -> None:
    """Take the container's place: its names, its root, its streams."""
    if hostname := config.get("hostname"):
        step("set the host name", lambda: _socket.sethostname(hostname))
    if domainname := config.get("domainname"):
        step("set the domain name", lambda: linux.setdomainname(domainname))
    tree = rootfs.Tree(config, given.root, given.sources, given.groups, plan)
    tree.build(staged, here=given.in_order)
    if config.get("hooks"):
        meet_hooks(config, given)
    # root's in `insula-oci`, as the peers have it; the user's in the engine, as if the image had it
    owner = {} if given.in_order else config["process"].get("user") or {}
    step("make the working directory", lambda: make_directory(given.root, config["process"].get("cwd") or "/", owner))
    for key, value in (config["linux"].get("sysctl") or {}).items():
        name = f"set the sysctl {key}"
        step(name, lambda k=key, v=value: rootfs.write_sysctl(given.root, staged, k, v))  # type: ignore[misc]
    rootfs.protect_paths(config, given.root, staged)
    if given.in_order and not given.pivot:
        step("enter the root", lambda: no_pivot.enter(given.root))
    else:
        step("enter the root", lambda: rootfs.enter(given.root, pivot=given.pivot))
    rootfs.propagate_root(config, given.root)
    if given.tty:
        step("open the terminal", lambda: open_console(config["process"], given.sync))
    else:
        step("connect standard input and output", lambda: connect_stdio(given.stdio))
    rootfs.seal(config, tree)
    os.close(given.root)


def make_directory(root: int, path: str, owner: dict[str, Any]) -> None:
    """Make the directory `path` in the container, for `uid` and `gid` of `owner`, if there is nothing at `path`."""
    try:
        os.close(mounts.open_beneath(root, path))
    except FileNotFoundError:
        made = mounts.make_target(root, path, directory=True)
        os.chown(".", owner.get("uid", 0), owner.get("gid", 0), dir_fd=made)
        os.close(made)
    except OSError:  # whoever enters it tells what is wrong
        return


def meet_hooks(config: dict[str, Any], given: Inheritance) -> None:
    """prestart and createRuntime are the parent's to run; createContainer hooks run here, among the host's paths."""
    tell(given.sync, {"event": "mounted"})
    hear(given.sync)
    os.fchdir(given.root)
    run_hooks(config, "createContainer", given, "creating")


def run_hooks(
    config: dict[str, Any], kind: str, given: Inheritance, status: str, environment: dict[str, str] | None = None
) -> None:
    """Hooks of the container's namespaces: the PID in their state is the one inside."""
    from insula.container.create import hooks

    hooks.run(config, kind, {**given.state, "pid": os.getpid(), "status": status}, environment)


def offer_listener(sync: int, listener: int) -> None:
    """See `insula.container.create.notify`."""
    from insula.container.create import notify

    notify.offer(sync, listener)


def find_program(process: dict[str, Any]) -> None:
    """Whether there is something to execute, told by `create` already: engines expect it to be who says so."""
    name, path = process["args"][0], None
    for entry in process.get("env") or ():
        if entry.startswith("PATH="):
            path = entry.removeprefix("PATH=")
    directory = process.get("cwd") or "/"
    if "/" not in name and path is None:
        return
    places = [""] if "/" in name else (path or "").split(":")
    refusals = {refusal(os.path.join(directory, place, name)) for place in places}
    if 0 not in refusals:  # as execvp(3): who was found but may not be executed counts more than who was not found
        number = max(refusals)
        raise StepError("execute", OSError(number, os.strerror(number), name))


def refusal(path: str) -> int:
    """Why `path` can't be executed, as far as can be told without doing it: ENOENT, EACCES, or 0."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return errno.ENOENT
    except OSError:
        return 0
    return 0 if stat.S_ISREG(found.st_mode) and found.st_mode & 0o111 else errno.EACCES


def wait_for_start(given: Inheritance) -> None:
    """Until the parent says "start", or says "created" and somebody else comes to the socket and says it."""
    if given.waits_at:
        # process 1 of a PID namespace gets no signal without a handler; execve(2) restores the default actions
        for number in _ENDING:
            _signal.signal(number, end_by_signal)
    tell(given.sync, {"event": "ready"})
    if hear(given.sync)["event"] == "start":
        return
    if given.waits_at is None:
        raise OSError(errno.EPROTO, "there is nobody to wait for")
    given.sync.close()
    while True:
        fd, _ = given.waits_at._accept()  # type: ignore[attr-defined]
        sync = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
        received = wire.receive(sync)
        if received and received[0].get("event") == "start":
            given.sync = sync
            given.waits_at.close()
            return
        sync.close()


def end_by_signal(number: int, _frame: object) -> NoReturn:
    """What these signals do to a process that is not process 1: with the exit status that a shell shows for it."""
    os._exit(128 + number)
