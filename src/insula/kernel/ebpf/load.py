"""Loading eBPF programs and attaching them to control groups: bpf(2).

bpf(2) takes a command number and a union of structures (union bpf_attr of linux/bpf.h), whose unused parts are zero. A
program is a descriptor. It lives while one is open, or while it is attached to a group. With BPF_F_ALLOW_MULTI a group
may have several programs, and all must allow an access. BPF_F_REPLACE (Linux 5.6) replaces one program atomically.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

PROG_TYPE_SCHED_CLS, PROG_TYPE_CGROUP_DEVICE = 3, 15
CGROUP_DEVICE = 6
"""enum bpf_attach_type: for programs that run whenever a device node is opened or made."""

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_TEST_RUN = 5, 8, 9, 10
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 13, 15, 16
_ALLOW_MULTI, _REPLACE = 2, 4
_NUMBER = {"x86_64": 321, "ppc64le": 361, "s390x": 351}.get(os.uname().machine, 280)
_ATTR_SIZE = 128
_NAME_OFFSET = 64  # of bpf_prog_info.name
_INFO_SIZE = 96
_MOST_PROGRAMS = 64  # BPF_CGROUP_MAX_PROGS
_CONTEXT, _PRIORITY = 192, 32  # the length of struct __sk_buff, and where its priority is
_LICENSE = b"Apache-2.0"  # it uses nothing that the kernel has for GPL programs only

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def bpf(command: int, attr: bytes | ctypes.Array[ctypes.c_char], what: str) -> int:
    """Call bpf(2); returns its result, mostly a close-on-exec descriptor. OSError."""
    if isinstance(attr, bytes):
        attr = ctypes.create_string_buffer(attr, _ATTR_SIZE)
    result: int = _syscall(ctypes.c_long(_NUMBER), ctypes.c_long(command), attr, ctypes.c_long(_ATTR_SIZE))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"bpf({what}): {os.strerror(error)}")
    return result


def load(program: bytes, kind: int, name: str) -> int:
    """Load a program; returns a close-on-exec descriptor. OSError, with the verifier's log if it refused."""
    code, license_ = ctypes.create_string_buffer(program, len(program)), ctypes.create_string_buffer(_LICENSE)
    log = ctypes.create_string_buffer(0)

    def attr(level: int) -> bytes:
        head = struct.pack("=IIQQ", kind, len(program) // 8, ctypes.addressof(code), ctypes.addressof(license_))
        told = struct.pack("=IIQ", level, len(log), ctypes.addressof(log) if level else 0)
        return head + told + struct.pack("=II16s", 0, 0, name.encode()[:15])

    try:
        return bpf(_PROG_LOAD, attr(0), "BPF_PROG_LOAD")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL):
            raise
        log = ctypes.create_string_buffer(1 << 16)
        try:
            return bpf(_PROG_LOAD, attr(1), "BPF_PROG_LOAD")
        except OSError as again:
            lines = log.value.decode(errors="replace").strip().splitlines()
            raise OSError(again.errno, f"{again.strerror}: {' / '.join(lines[-3:])}") from None


def run(program: int, packet: bytes, context: bytes) -> int:
    """Run the program once on a packet and a context (struct __sk_buff), and return its result. BPF_PROG_TEST_RUN.

    It runs in the network namespace of the calling thread. OSError if the kernel can't run it.
    """
    data, around = ctypes.create_string_buffer(packet, len(packet)), ctypes.create_string_buffer(context, len(context))
    head = struct.pack("=IIIIQQII", program, 0, len(packet), 0, ctypes.addressof(data), 0, 1, 0)
    tail = struct.pack("=IIQQIII", len(context), 0, ctypes.addressof(around), 0, 0, 0, 0)
    attr = ctypes.create_string_buffer(head + tail, _ATTR_SIZE)
    bpf(_PROG_TEST_RUN, attr, "BPF_PROG_TEST_RUN")
    answer: int = struct.unpack_from("=i", attr, 4)[0]
    return answer


def priority(number: int, packet: bytes) -> int:
    """Return the priority that a packet (an Ethernet frame) has after the installed program with this number (its ID)
    has seen it: skb->priority. OSError if there is no such program, or if the kernel can't run it."""
    program = bpf(_PROG_GET_FD_BY_ID, struct.pack("=I", number), "BPF_PROG_GET_FD_BY_ID")
    try:
        data, after = ctypes.create_string_buffer(packet, len(packet)), ctypes.create_string_buffer(_CONTEXT)
        head = struct.pack("=IIIIQQII", program, 0, len(packet), 0, ctypes.addressof(data), 0, 1, 0)
        tail = struct.pack("=IIQQ", 0, _CONTEXT, 0, ctypes.addressof(after))
        bpf(_PROG_TEST_RUN, ctypes.create_string_buffer(head + tail, _ATTR_SIZE), "BPF_PROG_TEST_RUN")
    finally:
        os.close(program)
    return int(struct.unpack_from("=I", after, _PRIORITY)[0])


def attach(group: int, program: int, where: int, old: int | None = None) -> None:
    """Attach a program to the control group (version 2) behind the descriptor `group`, replacing the program `old`."""
    if old is not None:
        try:
            bpf(
                _PROG_ATTACH, struct.pack("=5I", group, program, where, _ALLOW_MULTI | _REPLACE, old), "BPF_PROG_ATTACH"
            )
            return
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    try:
        bpf(_PROG_ATTACH, struct.pack("=5I", group, program, where, _ALLOW_MULTI, 0), "BPF_PROG_ATTACH")
    except OSError as error:
        if error.errno != errno.EINVAL or old is None:  # EINVAL: the same program is there already
            raise
        return
    if old is not None:  # before Linux 5.6: for a moment both are asked
        detach(group, old, where)


def detach(group: int, program: int, where: int) -> None:
    """Detach the program from the control group."""
    bpf(_PROG_DETACH, struct.pack("=5I", group, program, where, 0, 0), "BPF_PROG_DETACH")


def attached(group: int, where: int, name: str) -> int | None:
    """Open the program of that name that is attached to the group itself; None if there is none."""
    ids = (ctypes.c_uint32 * _MOST_PROGRAMS)()
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQI", group, where, 0, 0, ctypes.addressof(ids), _MOST_PROGRAMS), _ATTR_SIZE
    )
    bpf(_PROG_QUERY, attr, "BPF_PROG_QUERY")
    (count,) = struct.unpack_from("=I", attr, 24)
    for number in ids[:count]:
        try:
            fd = bpf(_PROG_GET_FD_BY_ID, struct.pack("=I", number), "BPF_PROG_GET_FD_BY_ID")
        except FileNotFoundError:
            continue
        if _name(fd) == name:
            return fd
        os.close(fd)
    return None


def _name(fd: int) -> str:
    info = ctypes.create_string_buffer(_INFO_SIZE)
    attr = struct.pack("=IIQ", fd, _INFO_SIZE, ctypes.addressof(info))
    bpf(_OBJ_GET_INFO_BY_FD, attr, "BPF_OBJ_GET_INFO_BY_FD")
    return info.raw[_NAME_OFFSET : _NAME_OFFSET + 16].split(b"\0")[0].decode(errors="replace")
