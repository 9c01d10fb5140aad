"""The kernel's side of a seccomp filter in Python: a classic BPF interpreter; and libseccomp as a second compiler."""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from collections.abc import Sequence
from typing import Any

_INSTRUCTION = struct.Struct("=HBBI")


def run(program: bytes, audit: int, number: int, args: Sequence[int] = ()) -> int:
    """The result of the filter. AssertionError on anything that the kernel's seccomp_check_filter() would refuse."""
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


# seccomp.h of libseccomp, not our own table of the same: that is what is tested
_OPS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
_ACTIONS = {
    "KILL": 0x00000000,
    "KILL_THREAD": 0x00000000,
    "KILL_PROCESS": 0x80000000,
    "TRAP": 0x00030000,
    "ERRNO": 0x00050000,
    "NOTIFY": 0x7FC00000,
    "TRACE": 0x7FF00000,
    "LOG": 0x7FFC0000,
    "ALLOW": 0x7FFF0000,
}
_EEXIST = 17


def libseccomp(profile: dict[str, Any]) -> bytes:
    """The filter that libseccomp makes of a profile when it is told what runc tells it, without runc's ENOSYS part."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(default)))
    assert context
    try:
        for name in profile.get("architectures", ()):
            token = lib.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
            assert token, name
            assert -lib.seccomp_arch_add(context, ctypes.c_uint32(token)) in (0, _EEXIST), name
        if len(profile["syscalls"]) > 32:
            lib.seccomp_attr_set(context, 8, ctypes.c_uint32(2))  # SCMP_FLTATR_CTL_OPTIMIZE
        for rule in profile["syscalls"]:
            action = _action(rule["action"], rule.get("errnoRet"))
            for name in rule["names"]:
                number = lib.seccomp_syscall_resolve_name(name.encode())
                if number == -1 or action == default:
                    continue
                for conditions in _split(rule.get("args") or []):
                    array = (_Comparison * max(1, len(conditions)))(*conditions)
                    done = lib.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(conditions), array)
                    assert done == 0, (name, done)
        with tempfile.TemporaryFile() as file:
            assert lib.seccomp_export_bpf(context, file.fileno()) == 0
            return os.pread(file.fileno(), 1 << 20, 0)
    finally:
        lib.seccomp_release(context)


def _action(name: str, errno: int | None) -> int:
    action = _ACTIONS[name.removeprefix("SCMP_ACT_")]
    return action | (1 if errno is None else errno) if action in (_ACTIONS["ERRNO"], _ACTIONS["TRACE"]) else action


def _split(conditions: list[dict[str, Any]]) -> list[list[_Comparison]]:
    """As runc does it: where an argument comes twice, each condition is a rule of its own."""
    made = [
        _Comparison(c["index"], _OPS[c["op"].removeprefix("SCMP_CMP_")], c["value"], c.get("valueTwo", 0))
        for c in conditions
    ]
    twice = len({c["index"] for c in conditions}) < len(conditions)
    return [[one] for one in made] if twice else [made]
