"""The kernel's side of a seccomp filter in Python: a classic BPF interpreter, and libseccomp as another compiler."""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from collections.abc import Sequence
from typing import Any

from insula.kernel import seccomp, syscalls

_INSTRUCTION = struct.Struct("=HBBI")


def run(program: bytes, audit: int, number: int, args: Sequence[int] = ()) -> int:
    """What the filter returns. AssertionError on anything that seccomp_check_filter() of the kernel would refuse."""
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, audit, 0, *args, *(0,) * (6 - len(args)))
    count, counter, accumulator = len(program) // 8, 0, 0
    while True:
        assert counter < count, "ran off the end"
        code, jt, jf, k = _INSTRUCTION.unpack_from(program, 8 * counter)
        counter += 1
        match code:
            case 0x20:
                assert k % 4 == 0
                assert k < len(data)
                (accumulator,) = struct.unpack_from("=I", data, k)
            case 0x54:
                accumulator &= k
            case 0x05:
                counter += k
            case 0x15:
                counter += jt if accumulator == k else jf
            case 0x25:
                counter += jt if accumulator > k else jf
            case 0x35:
                counter += jt if accumulator >= k else jf
            case 0x45:
                counter += jt if accumulator & k else jf
            case 0x06:
                return int(k)
            case _:
                raise AssertionError(f"instruction {code:#x}")


class _Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


_OPS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}


def libseccomp(profile: dict[str, Any]) -> bytes:
    """The filter that libseccomp makes of a profile when it is told what runc tells it, without runc's ENOSYS part."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    checked = seccomp.parse(profile)
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(checked.default)))
    assert context
    try:
        for arch in checked.archs:
            if arch != syscalls.native():
                assert lib.seccomp_arch_add(context, ctypes.c_uint32(arch.token)) == 0
        if len(checked.rules) > 32:
            lib.seccomp_attr_set(context, 8, ctypes.c_uint32(2))  # SCMP_FLTATR_CTL_OPTIMIZE
        for rule in checked.rules:
            if rule.action == checked.default:
                continue
            conditions = (_Comparison * max(1, len(rule.conditions)))(
                *(_Comparison(c.argument, _OPS[c.op], c.value, c.value_two) for c in rule.conditions)
            )
            for name in rule.names:
                number = lib.seccomp_syscall_resolve_name(name.encode())
                if number == -1:
                    continue
                done = lib.seccomp_rule_add_array(
                    context, ctypes.c_uint32(rule.action), number, len(rule.conditions), conditions
                )
                assert done == 0, (name, done)
        with tempfile.TemporaryFile() as file:
            assert lib.seccomp_export_bpf(context, file.fileno()) == 0
            return os.pread(file.fileno(), 1 << 20, 0)
    finally:
        lib.seccomp_release(context)
