"""The processes of a tenant's egress by name: how they are started, confined, and started again.

A *supervisor* is PID 1 of a PID namespace of its own. It forks the lessor and the gate, and does nothing but wait for
them: when one ends, it ends the other and forks both again, with the rules in a file of insulad's and the leases in the
kernel. When the supervisor is killed, the kernel ends all processes of its namespace. None of them needs insulad.

Gate and lessor have users of their own who own no files, an empty root, no new privileges (PR_SET_NO_NEW_PRIVS), and a
filter of system calls. The gate has no capability. The lessor has CAP_NET_ADMIN, with which it can change sets of this
network namespace by sockets that it was given: its filter lets it open no others.

`start` is for insulad; the rest of this module runs in the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

from insula.kernel import syscalls
from insula.kernel.netlink.conntrack import ConntrackSocket
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.seccomp import load as seccomp_load
from insula.network.linux import confine
from insula.network.names import gate
from insula.network.names.lessor import Lessor
from insula.network.names.rules import EgressRules

LESSOR: Final = "insula-lessor"
"""The name of lessors, by which the kernel says that a change of sets is theirs."""
GROUP: Final = 0x71000000
"""The group of all gates, by which the rules of a tenant's namespace know their packets."""
_LIMITS: Final = (  # resource (getrlimit(2)) and limit
    (1, 0),  # RLIMIT_FSIZE
    (4, 0),  # RLIMIT_CORE
    (6, 64),  # RLIMIT_NPROC, of its user
    (7, 65536),  # RLIMIT_NOFILE: a relayed connection has two sockets, and sometimes two pipes
    (9, 1 << 30),  # RLIMIT_AS
)
_PAUSES: Final = (0.02, 0.1, 0.5, 1.0)  # seconds before processes that end again and again are started
_CALM: Final = 10.0  # seconds after which a start counts as the first
_COMMON: Final = """
    read readv write writev close recvfrom recvmsg sendto sendmsg getsockopt setsockopt getsockname getpeername shutdown
    accept accept4 fcntl fstat newfstatat lseek epoll_wait epoll_pwait epoll_pwait2 epoll_ctl poll ppoll
    mmap munmap mremap mprotect madvise brk futex getrandom exit exit_group
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getpid gettid getuid geteuid getgid getegid
    sched_yield rseq set_robust_list
"""
_FIONBIO: Final = 0x5421
_LAST: Final = 900  # the number of a descriptor


class GateSettings(msgspec.Struct, frozen=True):
    """What the processes are started with; `lock` to `gate_calls` are descriptors.

    `rules` is the path of a file with the tenant's `EgressRules`, and `control` that of the lessor's socket.
    """

    table: str
    gate_user: int
    lessor_user: int
    rules: str
    control: str
    lock: int
    groups: list[int]
    lessor_calls: int
    gate_calls: int


def system_calls(*, is_gate: bool) -> bytes:
    """Compile the filter of system calls of the gate or the lessor; any other call fails with EPERM."""
    from insula.kernel.seccomp import compiler

    def allow(*names: str, **more: object) -> dict[str, object]:
        return {"names": names, "action": "SCMP_ACT_ALLOW", **more}

    def argument(index: int, value: int) -> dict[str, object]:
        return {"index": index, "value": value, "op": "SCMP_CMP_EQ", "valueTwo": 0}

    rules = [allow(*_COMMON.split()), allow("ioctl", args=[argument(1, _FIONBIO)])]
    if is_gate:
        rules += [allow("connect", "splice", "pipe2"), *(allow("socket", args=[argument(0, each)]) for each in (2, 10))]
    return compiler.compile({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})


def start(settings: GateSettings, passed: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start the processes in the caller's network namespace; `passed` are the descriptors in the settings.

    The returned process prints the supervisor's PID on its standard output and ends; if it prints nothing, its standard
    error has the reason.
    """
    import insula

    library = os.path.dirname(os.path.dirname(insula.__file__))
    paths = [library, *(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))]
    code = f"import sys; sys.path[:0] = {paths!r}; from insula.network.names.process import main; main()"
    return subprocess.Popen(
        [sys.executable, "-ISE", "-c", code, msgspec.json.encode(settings).decode()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=passed,
        cwd="/",
        env={"LC_ALL": "C.UTF-8"},
    )


# -- the supervisor --------------------------------------------------------------------------------------------------


def main() -> None:
    """Open the sockets, fork the supervisor into new namespaces, and print its PID."""
    settings = msgspec.json.decode(sys.argv[1].encode(), type=GateSettings)
    fcntl.fcntl(settings.lock, fcntl.F_DUPFD_CLOEXEC, _LAST)  # closed after the sockets, whose addresses are free then
    os.close(settings.lock)
    try:
        sockets = gate.open_sockets()
        control = _control_socket(settings.control)
        syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS)
        if child := os.fork():
            print(child, flush=True)
            return
        os.setsid()
        for group in settings.groups:
            os.write(group, b"0")
            os.close(group)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        for number in (1, 2):
            os.dup2(0, number)
    except OSError as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        os._exit(1)
    filters = [_read_and_close(number) for number in (settings.lessor_calls, settings.gate_calls)]
    gc.collect()
    gc.freeze()  # the collector would copy pages that the processes share
    _supervise(_Parts(settings, sockets, control, *filters))


def _read_and_close(number: int) -> bytes:
    """Read a memory file. What reads hostile data must not inherit it: the next start would load what it writes."""
    data = os.pread(number, os.fstat(number).st_size, 0)
    os.close(number)
    return data


def _control_socket(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.umask(0o077)
    directory, name = os.path.split(path)
    os.chdir(directory)  # a socket's path has at most 107 bytes
    sock.bind(name)
    os.chdir("/")
    sock.listen(16)
    return sock


class _Parts(NamedTuple):
    """What lessor and gate inherit, apart from the two ends of their conversation."""

    settings: GateSettings
    sockets: gate.GateSockets
    control: socket.socket
    lessor_filter: bytes
    gate_filter: bytes


def _supervise(parts: _Parts) -> NoReturn:
    """Keep lessor and gate running."""
    failures = 0
    while True:
        began = time.monotonic()
        ends = socket.socketpair()
        children = [_fork(_lessor, parts, *ends), _fork(_gate, parts, *ends)]
        for end in ends:
            end.close()
        os.wait()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        failures = 0 if time.monotonic() - began > _CALM else failures + 1
        time.sleep(_PAUSES[min(failures, len(_PAUSES) - 1)])


def _fork(
    run: Callable[[_Parts, socket.socket, socket.socket], None],
    parts: _Parts,
    lessor: socket.socket,
    other: socket.socket,
) -> int:
    if child := os.fork():
        return child
    try:
        run(parts, lessor, other)
    finally:
        os._exit(1)


# -- lessor and gate -------------------------------------------------------------------------------------------------


def _lessor(parts: _Parts, ours: socket.socket, other: socket.socket) -> None:
    other.close()
    for group in parts.sockets:
        for sock in group:
            sock.close()
    settings = parts.settings
    with open(settings.rules, "rb") as file:
        rules = msgspec.json.decode(file.read(), type=EgressRules)
    nftables, conntrack = NftablesSocket(), ConntrackSocket()
    syscalls.set_name(LESSOR)

    async def serve() -> None:
        lessor = Lessor(settings.table, nftables, conntrack, ours)
        lessor.start(rules)
        await lessor.serve(parts.control)

    _run(serve, settings.lessor_user, settings.lessor_user, ("NET_ADMIN",), parts.lessor_filter)


def _gate(parts: _Parts, other: socket.socket, ours: socket.socket) -> None:
    other.close()
    parts.control.close()
    _run(lambda: gate.serve(ours, parts.sockets), parts.settings.gate_user, GROUP, (), parts.gate_filter)


def _run(
    serve: Callable[[], Coroutine[Any, Any, None]], user: int, group: int, kept: Sequence[str], calls: bytes
) -> None:
    """Confine this process, and run the coroutine in an event loop."""
    with asyncio.Runner() as runner:
        runner.get_loop()
        syscalls.unshare(syscalls.CLONE_NEWNS)
        confine.enter_root(())
        confine.drop_privileges(user, kept, _LIMITS, group)
        seccomp_load.load(calls)
        runner.run(serve())
