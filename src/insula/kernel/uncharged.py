"""A limit for each tenant on what the kernel counts for no control group: socket queues, file locks, terminals.

The kernel charges these to no group: data in the receive queue of a netlink, raw or ping socket, data given to a UDP
socket with MSG_MORE and not sent yet, and locks on files (fcntl(2), flock(2)). So eBPF programs count them, attached to
the kernel functions that create and release them. The owner is the user who creates them: each tenant has `IDS` user
IDs of its own, and the host's users are not counted. The charges are:

    netlink, raw, ping   SO_RCVBUF plus SO_SNDBUF, at their current sizes: a queue may exceed the first by one message,
                         which is at most as large as the second
    UDP                  the maximum size of one datagram
    a lock               32 times the size of its structure, so that one tenant can't fill the kernel's table of locks

Beyond its budget a tenant gets errors: ENOBUFS from socket(2) and from setsockopt(2) of a buffer's size, ENOLCK from
fcntl(2) and flock(2).

Pseudo-terminals (pty(7)) are counted by number, in whichever devpts they are, for kernel.pty.max limits all of them
together: open(2) of /dev/ptmx fails with ENOSPC beyond the limit. One counts until both its ends are closed.

Programs and counters are pinned in a file system of type "bpf", so they outlive insulad.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO

from insula.kernel import syscalls
from insula.kernel.ebpf import trace as ebpf_trace
from insula.kernel.ebpf.assembler import Assembler
from insula.kernel.ebpf.btf import Types

UDP = 1 << 16
LOCK = 8 << 10
IDS = 1 << 16
_VERSION = "2"  # of the programs, in the names of pinned objects
_ENOSPC, _ENOLCK, _ENOBUFS = 28, 37, 105
_LOOKUP, _UPDATE, _DELETE, _UID_GID = 1, 2, 3, 15  # enum bpf_func_id
_MEMBERS = {("socket", "sk"), ("sock", "sk_rcvbuf"), ("sock", "sk_sndbuf"), ("file", "f_inode"), ("inode", "i_rdev")}
_PTMX = 5 << 20 | 2  # the device number of /dev/ptmx, as the kernel has it (MKDEV)
# the stack of each program, from its end (r10): a slot; a kernel pointer and a number; the entry of these (slot,
# charge, resizable); and what `uncharge` saves
_SLOT, _KEY, _ENTRY, _SAVED = -4, -24, -48, ((7, -56), (8, -64), (9, -72))
_KEY_SIZE, _ENTRY_SIZE = 16, 24


class Guard:
    """The programs for `slots` tenants, whose user IDs begin at `first`; they are pinned in `directory`.

    `budget` is in bytes for each tenant, `terminals` a number. At most `most` sockets, locks and terminals of all
    tenants are counted, which takes 16 to 110 bytes each; further ones are allowed uncounted.
    """

    def __init__(
        self, directory: str, first: int, slots: int, budget: int, most: int = 1 << 16, terminals: int = 1024
    ) -> None:
        self._directory, self._most = directory, most
        self._first, self._slots, self._budget, self._terminals = first, slots, budget, terminals

    def ensure(self) -> None:
        """Attach the programs, unless they are attached. OSError if that fails; nothing is changed then."""
        if self.attached():
            return
        self.remove()
        os.makedirs(self._directory, 0o700, exist_ok=True)
        syscalls.mount(
            "bpf", self._directory, "bpf", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC, "mode=0700"
        )
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    def attached(self) -> bool:
        return os.path.exists(self._path("complete"))

    def used(self, slot: int) -> int:
        """Return the bytes charged to the tenant with that number. OSError."""
        return self._count(slot)

    def terminals(self, slot: int) -> int:
        """Return the number of terminals of the tenant with that number. OSError."""
        return self._count(self._slots + slot)

    def _count(self, number: int) -> int:
        with _open(ebpf_trace.pinned(self._path("counts"))) as counts:
            return int.from_bytes(ebpf_trace.lookup(counts, number.to_bytes(4, "little"), 8) or b"", "little")

    def remove(self) -> None:
        """Remove programs and counters from the kernel; no error if there are none."""
        with contextlib.suppress(FileNotFoundError):
            with contextlib.suppress(OSError):  # EINVAL: nothing is mounted
                while True:
                    syscalls.umount2(self._directory, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
            os.rmdir(self._directory)

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}_{_VERSION}"

    def _attach(self) -> None:
        ebpf_trace.check_allowed()  # before the types are read, which takes half a second
        functions = {function for function, _, _ in _PROGRAMS}
        numbers, offsets = Types().find(functions, _MEMBERS)
        with contextlib.ExitStack() as stack:

            def kept(fd: int, name: str) -> int:
                stack.callback(os.close, fd)
                ebpf_trace.pin(fd, self._path(name))
                return fd

            array = ebpf_trace.create_map(ebpf_trace.ARRAY, 4, 8, 2 * self._slots, "insula_counts")
            counts = kept(array, "counts")
            table = ebpf_trace.create_map(
                ebpf_trace.HASH, _KEY_SIZE, _ENTRY_SIZE, self._most, "insula_owners", ebpf_trace.NO_PREALLOC
            )
            owners = kept(table, "owners")
            for function, when, write in _PROGRAMS:
                code = _Program(counts, owners, self._first, self._slots, self._budget, self._terminals, offsets)
                write(code)
                link = ebpf_trace.attach(code.assemble(), when, numbers[function], "insula_memory")
                kept(link, function)
            self._check(counts)
            ebpf_trace.pin(counts, self._path("complete"))

    def _check(self, counts: int) -> None:
        """Check that everything is counted, since a compiler may have inlined a function. OSError if something isn't.

        This thread creates one object of each kind, as a user of the last slot.
        """
        last = [(number * self._slots - 1).to_bytes(4, "little") for number in (1, 2)]

        def used() -> list[bytes | None]:
            return [ebpf_trace.lookup(counts, number, 8) for number in last]

        before, user = used(), self._first + (self._slots - 1) * IDS
        syscalls.set_thread_users(user, 0, 0)
        try:
            for kind, create in _SAMPLES.items():
                with create():
                    during = used()
                if during == before or used() != before:
                    raise OSError(f"the programs do not count {kind} on this kernel")
        finally:
            syscalls.set_thread_users(0, 0, 0)


@contextmanager
def _open(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


class _Program(Assembler):
    """An assembler with the programs' common parts. r6 is the input; after `load_tenant`, r9 the tenant's counter."""

    def __init__(
        self,
        counts: int,
        owners: int,
        first: int,
        slots: int,
        budget: int,
        terminals: int,
        offsets: dict[str, int],
    ) -> None:
        super().__init__()
        self._counts, self._owners, self._first, self._slots = counts, owners, first, slots
        self.budget, self.terminals, self.offsets = budget, terminals, offsets
        self.move_register(6, 1)

    def load_tenant(self, other: str, *, terminals: bool = False) -> None:
        """r9 = the counter of the current user's tenant, with its slot on the stack; go to `other` for a host user.

        It is the counter of bytes, or that of `terminals`, whose slots follow.
        """
        self.call(_UID_GID)
        self.shift_left(0, 32)  # the upper half is the group
        self.shift_right(0, 32)
        self.add(0, -self._first)
        self.shift_right(0, 16)
        self.move(1, self._slots - 1)
        self.jump_if_greater(0, 1, other)
        self.add(0, self._slots if terminals else 0)
        self.store32(10, _SLOT, 0)
        self.store64(10, _ENTRY, 0)
        self._find(self._counts, _SLOT)
        self.jump_if_equal(0, 0, other)
        self.move_register(9, 0)

    def refuse_beyond_budget(self, count: int, budget: int, refused: str) -> None:
        """Go to `refused` if the number that register r`count` points to is greater than `budget`."""
        self.load64(1, count, 0)
        self.load_constant(2, budget)
        self.jump_if_greater(1, 2, refused)

    def set_key(self, argument: int) -> None:
        """The key on the stack = the kernel pointer that is that argument, and 0."""
        self.load64(1, 6, 8 * argument)
        self.store64(10, _KEY, 1)
        self.move(1, 0)
        self.store64(10, _KEY + 8, 1)

    def set_terminal_key(self, failed: str) -> None:
        """The key on the stack = the devpts that is the first argument, and the terminal's index, which follows it.

        Go to `failed` for a negative index.
        """
        self.set_key(0)
        self.load32(1, 6, 8)
        self.move(2, 0x7FFFFFFF)
        self.jump_if_greater(1, 2, failed)
        self.store64(10, _KEY + 8, 1)

    def load_buffer_sizes(self, socket: int) -> None:
        """r7 = SO_RCVBUF + SO_SNDBUF of the struct socket that is that argument. Clobbers r1 and r2."""
        self.load64(1, 6, 8 * socket)
        self.load64(1, 1, self.offsets["socket.sk"])
        self.load32(7, 1, self.offsets["sock.sk_rcvbuf"])
        self.load32(2, 1, self.offsets["sock.sk_sndbuf"])
        self.add_register(7, 2)

    def charge(self, failed: str) -> None:
        """Charge r7 bytes to the tenant of r9, for the pointer on the stack; r8 is 1 for a charge that is resized.

        Go to `failed` if the table is full.
        """
        self.uncharge("new")  # the release of an earlier object at this address was missed
        self.label("new")
        self.store64(10, _ENTRY + 8, 7)
        self.store64(10, _ENTRY + 16, 8)
        self.load_map(1, self._owners)
        self._stack(2, _KEY)
        self._stack(3, _ENTRY)
        self.move(4, 0)
        self.call(_UPDATE)
        self.jump_if_not_equal(0, 0, failed)
        self.atomic_add64(9, 0, 7)

    def find_charge(self, otherwise: str) -> None:
        """r8 = the entry of the pointer on the stack, r9 = its tenant's counter; go to `otherwise` if it has none."""
        self._find(self._owners, _KEY)
        self.jump_if_equal(0, 0, otherwise)
        self.move_register(8, 0)
        self.load64(1, 8, 0)
        self.store32(10, _SLOT, 1)
        self._find(self._counts, _SLOT)
        self.jump_if_equal(0, 0, otherwise)
        self.move_register(9, 0)

    def uncharge(self, done: str) -> None:
        """Undo the charge of the pointer on the stack, if it has one, and go to `done`. Keeps r7, r8 and r9."""
        for register, place in _SAVED:
            self.store64(10, place, register)
        self.find_charge("unknown")
        self.load64(1, 8, 8)
        self.move(2, 0)
        self.subtract_register(2, 1)
        self.atomic_add64(9, 0, 2)
        self.load_map(1, self._owners)
        self._stack(2, _KEY)
        self.call(_DELETE)
        self.label("unknown")
        for register, place in _SAVED:
            self.load64(register, 10, place)
        self.jump(done)

    def return_(self, value: int) -> None:
        self.move(0, value)
        self.exit()

    def _find(self, map_: int, place: int) -> None:
        self.load_map(1, map_)
        self._stack(2, place)
        self.call(_LOOKUP)

    def _stack(self, register: int, place: int) -> None:
        self.move_register(register, 10)
        self.add(register, place)


def _on_socket_created(code: _Program) -> None:
    """security_socket_post_create(sock, family, type, protocol, kern)."""
    for register, argument in ((0, 4), (1, 1), (2, 2), (3, 3)):
        code.load32(register, 6, 8 * argument)
    code.jump_if_not_equal(0, 0, "allowed")  # a socket of the kernel itself
    code.jump_if_equal(1, 16, "queue")  # AF_NETLINK
    code.jump_if_equal(1, 2, "internet")  # AF_INET
    code.jump_if_not_equal(1, 10, "allowed")  # AF_INET6
    code.label("internet")
    code.jump_if_equal(2, 3, "queue")  # SOCK_RAW
    code.jump_if_not_equal(2, 2, "allowed")  # SOCK_DGRAM
    code.jump_if_equal(3, 1, "queue")  # IPPROTO_ICMP
    code.jump_if_equal(3, 58, "queue")  # IPPROTO_ICMPV6
    code.load_constant(7, UDP)
    code.move(8, 0)
    code.jump("count")
    code.label("queue")
    code.load_buffer_sizes(0)
    code.move(8, 1)
    code.label("count")
    code.load_tenant("allowed")
    code.set_key(0)
    code.refuse_beyond_budget(9, code.budget, "refused")
    code.charge("allowed")
    code.label("allowed")
    code.return_(0)
    code.label("refused")
    code.return_(-_ENOBUFS)


def _check_resize(code: _Program) -> None:
    """security_socket_setsockopt(sock, level, optname): refuse another buffer size beyond the budget."""
    code.load32(1, 6, 8)
    code.jump_if_not_equal(1, 1, "allowed")  # SOL_SOCKET
    code.load32(1, 6, 16)
    code.jump_if_equal(1, 7, "buffer")  # SO_SNDBUF
    code.jump_if_not_equal(1, 8, "allowed")  # SO_RCVBUF
    code.label("buffer")
    code.set_key(0)
    code.find_charge("allowed")
    code.refuse_beyond_budget(9, code.budget, "refused")
    code.label("allowed")
    code.return_(0)
    code.label("refused")
    code.return_(-_ENOBUFS)


def _on_resized(code: _Program) -> None:
    """sock_setsockopt(sock, level, optname, …), after it: charge the new buffer sizes."""
    code.load32(1, 6, 16)
    code.jump_if_equal(1, 7, "buffer")
    code.jump_if_not_equal(1, 8, "end")
    code.label("buffer")
    code.set_key(0)
    code.find_charge("end")
    code.load64(1, 8, 16)
    code.jump_if_equal(1, 0, "end")  # UDP
    code.load_buffer_sizes(0)
    code.move_register(1, 7)
    code.exchange64(8, 8, 1)
    code.subtract_register(7, 1)
    code.atomic_add64(9, 0, 7)
    code.label("end")
    code.return_(0)


def _on_released(code: _Program) -> None:
    """netlink_release(sock), inet_release(sock), locks_release_private(lock): undo the charge."""
    code.move(7, 0)
    code.move(8, 0)
    code.move(9, 0)
    code.set_key(0)
    code.uncharge("end")
    code.label("end")
    code.return_(0)


def _on_lock_copied(code: _Program) -> None:
    """locks_copy_lock(new, lock): creates every lock that is kept; locks_release_private frees it."""
    code.load_tenant("end")
    code.set_key(0)
    code.move(7, LOCK)
    code.move(8, 0)
    code.charge("end")
    code.label("end")
    code.return_(0)


def _check_lock(code: _Program) -> None:
    """security_file_lock(file, cmd): refuse locks beyond the budget.

    Unlocking the middle of a locked range creates a lock, so unlocking is allowed up to 9/8 of the budget.
    """
    code.load_tenant("allowed")
    code.load32(1, 6, 8)
    code.jump_if_equal(1, 2, "unlock")  # F_UNLCK
    code.refuse_beyond_budget(9, code.budget, "refused")
    code.label("allowed")
    code.return_(0)
    code.label("unlock")
    code.refuse_beyond_budget(9, code.budget + code.budget // 8, "refused")
    code.return_(0)
    code.label("refused")
    code.return_(-_ENOLCK)


def _check_open(code: _Program) -> None:
    """security_file_open(file): refuse another terminal beyond the limit."""
    code.load64(1, 6, 0)
    code.load64(1, 1, code.offsets["file.f_inode"])
    code.load32(1, 1, code.offsets["inode.i_rdev"])
    code.jump_if_not_equal(1, _PTMX, "allowed")
    code.load_tenant("allowed", terminals=True)
    code.refuse_beyond_budget(9, code.terminals - 1, "refused")
    code.label("allowed")
    code.return_(0)
    code.label("refused")
    code.return_(-_ENOSPC)


def _on_terminal_created(code: _Program) -> None:
    """devpts_new_index(devpts), afterwards: count the terminal whose index it returned."""
    code.set_terminal_key("end")
    code.load_tenant("end", terminals=True)
    code.move(7, 1)
    code.move(8, 0)
    code.charge("end")
    code.label("end")
    code.return_(0)


def _on_terminal_removed(code: _Program) -> None:
    """devpts_kill_index(devpts, index)."""
    code.move(7, 0)
    code.move(8, 0)
    code.move(9, 0)
    code.set_terminal_key("end")
    code.uncharge("end")
    code.label("end")
    code.return_(0)


def _lock() -> IO[bytes]:
    file = os.fdopen(os.memfd_create("insula-lock", os.MFD_CLOEXEC), "wb")
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
    return file


def _terminal() -> IO[bytes]:
    return os.fdopen(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC), "rb+", buffering=0)


_SAMPLES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "netlink sockets": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "raw sockets": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "UDP sockets": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "file locks": _lock,
    "terminals": _terminal,
}
_PROGRAMS: tuple[tuple[str, int, Callable[[_Program], None]], ...] = (  # in this order: releases are counted first
    ("netlink_release", ebpf_trace.FENTRY, _on_released),
    ("inet_release", ebpf_trace.FENTRY, _on_released),
    ("locks_release_private", ebpf_trace.FENTRY, _on_released),
    ("devpts_kill_index", ebpf_trace.FENTRY, _on_terminal_removed),
    ("devpts_new_index", ebpf_trace.FEXIT, _on_terminal_created),
    ("security_file_open", ebpf_trace.MODIFY, _check_open),
    ("locks_copy_lock", ebpf_trace.FENTRY, _on_lock_copied),
    ("sock_setsockopt", ebpf_trace.FEXIT, _on_resized),
    ("security_socket_post_create", ebpf_trace.MODIFY, _on_socket_created),
    ("security_socket_setsockopt", ebpf_trace.MODIFY, _check_resize),
    ("security_file_lock", ebpf_trace.MODIFY, _check_lock),
)
