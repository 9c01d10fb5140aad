"""Device rules of version 2, as an eBPF program (cgroup-v2.rst, "Device controller").

The kernel runs the programs of a group and of its ancestors whenever a process opens or makes a device node. Each gets
struct bpf_cgroup_dev_ctx (linux/bpf.h) and returns 1 to allow or 0 to deny; one 0 denies the access.

    u32 access_type    (access << 16) | type: mknod 1, read 2, write 4; block 1, character 2
    u32 major, minor

The last rule that matches a device decides. So the program tests the rules from last to first and keeps in r2 the
requested accesses that no rule has decided yet. A matching allow rule clears its accesses in r2, and the program
returns 1 when none is left. A matching deny rule returns 0 if one of its accesses is left. After the first rule, the
remaining accesses are denied.

    r2  undecided accesses      r3  type      r4  major      r5  minor      r0  result
"""

from __future__ import annotations

import os

from insula.kernel.cgroups.devices import ANY, EVERY_ACCESS, DeviceRule
from insula.kernel.ebpf import assembler
from insula.kernel.ebpf import load as ebpf_load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

NAME = "insula_devices"
"""The program's name, which distinguishes it from other programs of a group, such as systemd's."""

_TYPES = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}
_ACCESS_TYPE, _MAJOR, _MINOR = 0, 4, 8  # offsets
_LEFT, _TYPE, _MAJOR_REGISTER, _MINOR_REGISTER = 2, 3, 4, 5

_kept: dict[bytes, int] = {}
_KEPT_AT_MOST = 16


def compile_rules(rules: Sequence[dict[str, Any]]) -> bytes:
    """Compile rules to the program. OSError for a rule of an unknown type."""
    code = assembler.Assembler()
    code.load32(_TYPE, 1, _ACCESS_TYPE)
    code.move_register(_LEFT, _TYPE)
    code.shift_right(_LEFT, 16)
    code.and_(_TYPE, 0xFFFF)
    code.load32(_MAJOR_REGISTER, 1, _MAJOR)
    code.load32(_MINOR_REGISTER, 1, _MINOR)
    for number, rule in enumerate(reversed([DeviceRule(rule) for rule in rules])):
        if rule.matches_all:
            _answer(code, int(rule.allow))
            break
        _rule(code, rule, f"after {number}")
    else:
        _answer(code, 0)
    return code.assemble()


def _rule(code: assembler.Assembler, rule: DeviceRule, following: str) -> None:
    if len(rule.types) == 1:
        code.jump_if_not_equal(_TYPE, _TYPES[rule.types], following)
    for register, number in ((_MAJOR_REGISTER, rule.major), (_MINOR_REGISTER, rule.minor)):
        if number != ANY:
            code.jump_if_not_equal(register, number, following)
    bits = sum(_ACCESS[letter] for letter in rule.access)
    if rule.allow:
        code.and_(_LEFT, ~bits)
        code.jump_if_not_equal(_LEFT, 0, following)
    elif rule.access != EVERY_ACCESS:
        code.move_register(0, _LEFT)
        code.and_(0, bits)
        code.jump_if_equal(0, 0, following)
    _answer(code, int(rule.allow))
    code.label(following)


def _answer(code: assembler.Assembler, value: int) -> None:
    code.move(0, value)
    code.exit()


def install(directory: str, rules: Sequence[dict[str, Any]]) -> None:
    """Attach the program to the group, replacing an older one without a gap. OSError names linux.resources.devices."""
    group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        program = _loaded(compile_rules(rules))
        old = ebpf_load.attached(group, ebpf_load.CGROUP_DEVICE, NAME)
        try:
            ebpf_load.attach(group, program, ebpf_load.CGROUP_DEVICE, old)
        finally:
            if old is not None:
                os.close(old)
    except OSError as error:
        raise OSError(error.errno, f"linux.resources.devices: {error.strerror}", directory) from None
    finally:
        os.close(group)


def _loaded(program: bytes) -> int:
    """Load the program into the kernel; its descriptor is cached, because every launch has the same rules."""
    fd = _kept.pop(program, None)
    if fd is None:
        fd = ebpf_load.load(program, ebpf_load.PROG_TYPE_CGROUP_DEVICE, NAME)
        if len(_kept) == _KEPT_AT_MOST:
            os.close(_kept.pop(next(iter(_kept))))
    _kept[program] = fd  # the order of a dict is the order of use
    return fd
