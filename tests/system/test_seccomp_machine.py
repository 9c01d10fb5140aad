"""The seccomp profile of a machine's container, loaded into real processes: what a guest that has taken QEMU over can
still ask of the host's kernel."""

from __future__ import annotations

import errno
import os
import socket
import threading

import pytest

from insula.control.instances.drivers.container import seccomp_default
from insula.control.instances.drivers.machine import seccomp
from insula.kernel import capabilities, syscalls
from insula.kernel.seccomp import compiler
from tests.forked import errno_of, forked
from tests.system.test_seccomp import call, filtered

PROGRAM = compiler.compile(seccomp.profile())
OF_CONTAINERS = compiler.compile(seccomp_default.profile(capabilities.to_names(capabilities.DEFAULT)))
NOWHERE = 0xFFFFFFFF  # a descriptor that is not open
AF_ALG = 38

# name, arguments that do nothing, whether containers may call it
REFUSED = [
    ("ptrace", (0xFFFF, 0, 0, 0), True),
    ("process_vm_readv", (os.getpid(), 0, 0, 0, 0, 0xFF), True),
    ("process_vm_writev", (os.getpid(), 0, 0, 0, 0, 0xFF), True),
    ("unlinkat", (NOWHERE, 0, 0), True),
    ("mkdirat", (NOWHERE, 0, 0), True),
    ("mknodat", (NOWHERE, 0, 0, 0), True),
    ("symlinkat", (0, NOWHERE, 0), True),
    ("renameat2", (NOWHERE, 0, NOWHERE, 0, 0xFF), True),
    ("setresuid", (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), True),
    ("setgroups", (1 << 30, 0), True),
    ("chroot", (0,), True),
    ("inotify_init1", (0xFF,), True),
    ("shmget", (1, 0, 0), True),
    ("setpriority", (9, 0, 0), True),
    ("unshare", (syscalls.CLONE_NEWUSER,), False),
    ("setns", (NOWHERE, 0), False),
    ("bpf", (0xFFFF, 0, 0), False),
    ("mount", (0, 0, 0, 0, 0), False),
    ("keyctl", (0, 0xFFFFFFFD, 0), False),
    ("userfaultfd", (0xFF,), False),
    ("io_uring_setup", (0, 0), False),
    ("open_by_handle_at", (NOWHERE, 0, 0), False),
    ("perf_event_open", (0, 0, 0, 0, 0), False),
]


@pytest.mark.parametrize(("name", "args", "of_containers"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_neither_qemu_nor_the_shim_calls_is_refused(name: str, args: tuple[int, ...], of_containers: bool) -> None:
    """With EPERM, before the kernel looks at arguments; without a filter, it fails for these or succeeds."""
    unguarded = forked(lambda: call(name, *args))
    assert unguarded != errno.EPERM
    assert filtered(lambda: call(name, *args), PROGRAM) == errno.EPERM
    assert (filtered(lambda: call(name, *args), OF_CONTAINERS) == unguarded) is of_containers


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, AF_ALG])
def test_only_local_sockets_are_opened(family: int) -> None:
    def opened(family: int) -> int:
        return errno_of(lambda: socket.socket(family, socket.SOCK_DGRAM))

    assert filtered(lambda: opened(family), PROGRAM) == errno.EPERM
    assert filtered(lambda: opened(socket.AF_UNIX), PROGRAM) == 0


def test_processes_and_threads_are_made_but_no_namespaces() -> None:
    def made() -> tuple[int, int, int, bool]:
        namespaced = call("clone", syscalls.CLONE_NEWUSER, 0, 0, 0, 0)
        pid = os.fork()
        if pid == 0:
            os._exit(3)
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        return namespaced, call("clone3", 0, 0), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), thread.is_alive()

    assert filtered(made, PROGRAM) == (errno.EPERM, errno.ENOSYS, 3, False)
