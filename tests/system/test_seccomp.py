"""The default profile loaded into real processes: the system calls that the kernel allows then."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from insula.control.instances.drivers.container import seccomp_default
from insula.kernel import capabilities, syscall_numbers, syscalls
from insula.kernel.seccomp import compiler
from insula.kernel.seccomp.load import load
from tests.forked import Killed, errno_of, forked

T = TypeVar("T")
PROGRAM = compiler.compile(seccomp_default.profile(capabilities.to_names(capabilities.DEFAULT)))
NATIVE = syscall_numbers.native()
AF_PACKET, AF_VSOCK = 17, 40

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def filtered(function: Callable[[], T], program: bytes = PROGRAM) -> T:
    """Run `function` in a child, still root, under the filter, and return its result."""

    def child() -> T:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        load(program)
        return function()

    return forked(child)


def call(name: str, *args: int) -> int:
    """The errno of a raw system call, 0 if it succeeds; every argument as the 64 bits that it is."""
    number = syscall_numbers.numbers(name, NATIVE)[0].value
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in args))
    return ctypes.get_errno() if result < 0 else 0


# name, arguments that are harmless, what root gets without the filter
REFUSED = [
    ("keyctl", (0, 0xFFFFFFFD, 0)),  # KEYCTL_GET_KEYRING_ID of the session
    ("unshare", (syscalls.CLONE_NEWUSER,)),
    ("unshare", (syscalls.CLONE_NEWNS,)),
    ("setns", (0xFFFFFFFF, 0)),
    ("bpf", (0xFFFF, 0, 0)),
    ("mount", (0, 0, 0, 0, 0)),
    ("umount2", (0, 0)),
    ("pivot_root", (0, 0)),
    ("init_module", (0, 0, 0)),
    ("kexec_load", (0, 1 << 40, 0, 0)),
    ("perf_event_open", (0, 0, 0, 0, 0)),
    ("open_by_handle_at", (0xFFFFFFFF, 0, 0)),
    ("io_uring_setup", (0, 0)),
    ("fsopen", (0, 0)),
    ("sethostname", (0, 1 << 30)),
    ("ptrace", (0xFFFF, 0, 0, 0)),  # allowed: the control
]


@pytest.mark.parametrize(("name", "args"), REFUSED, ids=[f"{n}-{a[0]:#x}" for n, a in REFUSED])
def test_calls_are_refused_before_the_kernel_checks_arguments(name: str, args: tuple[int, ...]) -> None:
    """Without the filter each fails for its arguments or succeeds; with it, with EPERM whatever they are."""
    unguarded = forked(lambda: call(name, *args))
    guarded = filtered(lambda: call(name, *args))
    if name == "ptrace":
        assert guarded == unguarded
    else:
        assert guarded == errno.EPERM
        assert unguarded != errno.EPERM


def test_ordinary_programs_work() -> None:
    def work() -> str:
        thread = threading.Thread(target=lambda: None)  # clone3, which is answered ENOSYS, then clone
        thread.start()
        thread.join()
        left, right = socket.socketpair()
        left.send(b"x")
        assert right.recv(1) == b"x"
        os.close(os.open("/etc/passwd", os.O_RDONLY))
        return subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True).stdout

    assert filtered(work) == "42\n"


def test_clone_without_new_namespaces_only() -> None:
    assert filtered(lambda: call("clone3", 0, 0)) == errno.ENOSYS
    assert forked(lambda: call("clone3", 0, 0)) == errno.EINVAL
    assert filtered(lambda: call("clone", syscalls.CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)) == errno.EPERM


def test_personality() -> None:
    address_no_randomize = 0x0040000

    def personalities() -> list[int]:
        return [call("personality", p) for p in (0xFFFFFFFF, 0, 8, 0x20000, 0x20008, address_no_randomize, 1 << 32)]

    assert filtered(personalities) == [0, 0, 0, 0, 0, errno.EPERM, errno.EPERM]
    assert forked(lambda: call("personality", address_no_randomize)) == 0


def test_socket_families() -> None:
    """Of all families of the kernel, four are allowed; a refusal comes before a module is searched for."""

    def families(name: str, kind: int) -> dict[int, int]:
        return {family: call(name, family, kind, 0, 0) for family in range(100)}  # the last is for socketpair

    opened = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}
    for name, kinds in (("socket", (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW)), ("socketpair", (1,))):
        for kind in kinds:
            unguarded, guarded = (run(lambda n=name, k=kind: families(n, k)) for run in (forked, filtered))  # type: ignore[misc]
            for family in range(100):
                if family in (opened if name == "socket" else {socket.AF_UNIX}):
                    assert guarded[family] == unguarded[family], (name, kind, family)
                else:
                    assert guarded[family] == errno.EPERM != unguarded[family], (name, kind, family)
    packet = call_of(AF_PACKET, socket.SOCK_RAW)
    assert filtered(packet) == errno.EPERM
    assert filtered(packet, compiled(families=["packet"])) == forked(packet) == 0, "the control: an option opens it"


def call_of(family: int, kind: int, protocol: int = 0) -> Callable[[], int]:
    return lambda: call("socket", family, kind, protocol)


def compiled(**options: Any) -> bytes:
    return compiler.compile(seccomp_default.profile(capabilities.to_names(capabilities.DEFAULT), **options))


def attach(option: int, level: int = socket.SOL_SOCKET) -> int:
    """The errno of setsockopt(2) with a BPF program of one instruction that accepts everything."""
    program = (ctypes.c_uint64 * 1)(0xFFFF << 32 | 0x06)
    filter_ = (ctypes.c_uint64 * 2)(1, ctypes.addressof(program))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return call("setsockopt", sock.fileno(), level, option, ctypes.addressof(filter_), 16)


@pytest.mark.parametrize("option", [26, 51], ids=["SO_ATTACH_FILTER", "SO_ATTACH_REUSEPORT_CBPF"])
def test_no_filters_on_sockets(option: int) -> None:
    """Their machine code is limited for the whole host, and most of its memory is charged to no group."""
    assert forked(lambda: attach(option)) == 0, "the control"
    for level in (1, 1 << 32 | 1):
        assert filtered(lambda level=level: attach(option, level)) == errno.ENOPROTOOPT  # type: ignore[misc]
    assert filtered(lambda: attach(1 << 32 | option)) == errno.ENOPROTOOPT
    assert filtered(lambda: attach(option), compiled(families=["packet"])) == 0, "tcpdump needs them"

    def only_ipv6() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # 26 too

    filtered(only_ipv6)


def test_asynchronous_io_is_as_if_the_kernel_had_none() -> None:
    context = (ctypes.c_uint64 * 1)()

    def setup() -> int:
        return call("io_setup", 1, ctypes.addressof(context))

    assert filtered(setup) == errno.ENOSYS
    assert filtered(setup, compiled(aio=True)) == forked(setup) == 0, "the control"


def test_the_page_cache_cannot_be_queried() -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    answer = (ctypes.c_char * 1)()

    def mincore() -> int:
        return call("mincore", address, mmap.PAGESIZE, ctypes.addressof(answer))

    assert filtered(mincore) == errno.ENOSYS
    assert forked(mincore) == 0, "the control"


def test_the_upper_half_of_the_family_hides_nothing() -> None:
    """socket(2³² + AF_INET) is socket(AF_INET) to the kernel: a rule "greater than 40" would let AF_VSOCK through."""

    def sockets() -> tuple[int, int]:
        return call("socket", 1 << 32 | socket.AF_INET, 1, 0), call("socket", 1 << 32 | AF_VSOCK, 1, 0)

    assert forked(sockets)[0] == 0
    assert filtered(sockets) == (errno.EPERM, errno.EPERM)

    naive = compiler.compile(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {
                    "names": ["socket"],
                    "action": "SCMP_ACT_ERRNO",
                    "args": [{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_EQ"}],
                }
            ],
        }
    )
    assert filtered(lambda: call("socket", AF_VSOCK, 1, 0), naive) == errno.EPERM
    assert filtered(sockets, naive) == forked(sockets)


@pytest.mark.skipif(NATIVE != syscall_numbers.X86_64, reason="int 0x80 is of x86")
def test_32_bit_calls_are_filtered_too() -> None:
    """Through int 0x80: getpid works, mount is refused, socketcall fails with ENOSYS."""

    def calls() -> list[int]:
        return [_int80(20), _int80(21), _int80(102)]  # getpid, mount, socketcall

    unguarded = forked(calls)
    if unguarded[0] <= 0:
        pytest.skip("this kernel has no 32-bit calls")
    pid, mount, socketcall = filtered(calls)
    assert pid > 0
    assert mount == -errno.EPERM != unguarded[1]
    assert socketcall == -errno.ENOSYS != unguarded[2]


def _int80(number: int) -> int:
    """A 32-bit system call without arguments, by a few bytes of machine code."""
    # push rbx; mov eax, number; xor ebx..edx, esi, edi; int 0x80; pop rbx; ret
    code = b"\x53\xb8" + number.to_bytes(4, "little") + b"\x31\xdb\x31\xc9\x31\xd2\x31\xf6\x31\xff\xcd\x80\x5b\xc3"
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(ctypes.CFUNCTYPE(ctypes.c_int32)(address)())


def test_an_unknown_call_is_enosys() -> None:
    assert filtered(lambda: (_libc.syscall(ctypes.c_long(9999)), ctypes.get_errno())) == (-1, errno.ENOSYS)


@pytest.mark.skipif(NATIVE != syscall_numbers.X86_64, reason="x32 is of x86-64")
def test_unknown_abi_kills() -> None:
    program = compiler.compile({"defaultAction": "SCMP_ACT_ALLOW", "architectures": [NATIVE.name]})
    with pytest.raises(Killed) as caught:
        filtered(lambda: _libc.syscall(ctypes.c_long(syscall_numbers.X32_BIT | 39)), program)
    assert caught.value.signum == signal.SIGSYS


def test_loading_needs_no_new_privs_or_privilege() -> None:
    def unprivileged() -> int:
        os.setuid(65534)
        return errno_of(lambda: load(PROGRAM))

    assert forked(unprivileged) == errno.EACCES


def test_not_a_program() -> None:
    with pytest.raises(ValueError):
        load(b"")
    with pytest.raises(ValueError):
        load(PROGRAM[:-3])
    assert forked(lambda: errno_of(lambda: load(PROGRAM[:-8]))) == errno.EINVAL  # its last jump leads out


def test_the_filter_stays_over_exec_and_is_counted() -> None:
    def status() -> str:
        command = ["/bin/grep", "-E", "^(Seccomp|NoNewPrivs)", "/proc/self/status"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert filtered(status).split() == ["NoNewPrivs:", "1", "Seccomp:", "2", "Seccomp_filters:", "1"]
