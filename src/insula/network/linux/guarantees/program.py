"""The eBPF program that writes the class of a tenant's packets into their priority, where HTB reads it.

It runs as a filter on the host's end of the tenant's uplink, for packets of one direction. By its place it knows the
tenant, and by an address which instance they belong to: an instance with a floor has an address of its own on the
uplink (naming.py). It returns -1: then the filter's action follows, which redirects the packet.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from ipaddress import ip_address

from insula.kernel.ebpf.assembler import Assembler
from insula.kernel.ebpf.load import PROG_TYPE_SCHED_CLS, load

_PROTOCOL, _PRIORITY = 16, 32  # of struct __sk_buff, linux/bpf.h
_SKB_LOAD_BYTES = 26  # bpf_skb_load_bytes
_ETHERNET = 14
_FAMILIES = {4: (0x0800, 12, 16, 4), 6: (0x86DD, 8, 24, 16)}  # EtherType; offsets of source, destination; length
_R0, _R1, _R2, _R3, _R4, _R6, _R7, _R10 = 0, 1, 2, 3, 4, 6, 7, 10


def classifier(rest: int, instances: Mapping[str, int], *, source: bool) -> bytes:
    """Return the program: packets from (`source`) or to the addresses in `instances` get these classes, others get
    `rest`."""
    code = Assembler()
    code.move_register(_R6, _R1)
    code.move(_R7, rest)
    if instances:
        code.load32(_R2, _R6, _PROTOCOL)
        for version, (ethertype, *_) in _FAMILIES.items():
            code.jump_if_equal(_R2, struct.unpack("=H", struct.pack("!H", ethertype))[0], f"ipv{version}")
        code.jump("done")
        for version in _FAMILIES:
            code.label(f"ipv{version}")
            _compare(code, version, instances, source=source)
            code.jump("done")
        code.label("done")
    code.store32(_R6, _PRIORITY, _R7)
    code.move(_R0, -1)
    code.exit()
    return code.assemble()


def _compare(code: Assembler, version: int, instances: Mapping[str, int], *, source: bool) -> None:
    _, from_, to, length = _FAMILIES[version]
    code.move_register(_R1, _R6)
    code.move(_R2, _ETHERNET + (from_ if source else to))
    code.move_register(_R3, _R10)
    code.add(_R3, -16)
    code.move(_R4, length)
    code.call(_SKB_LOAD_BYTES)
    code.jump_if_not_equal(_R0, 0, "done")
    words = [-16 + 4 * number for number in range(length // 4)]
    for register, word in enumerate(words, start=2):
        code.load32(register, _R10, word)
    for address, number in sorted(instances.items()):
        parsed = ip_address(address)
        if parsed.version == version:
            for register, value in enumerate(struct.unpack(f"={len(words)}i", parsed.packed), start=2):
                code.jump32_if_not_equal(register, value, address)
            code.move(_R7, number)
            code.jump("done")
            code.label(address)


def name(program: bytes) -> str:
    """Return the name of a program, by which it is recognised when it is read back."""
    return f"insula-{hashlib.sha256(program).hexdigest()[:16]}"


class LoadedProgram:
    """A loaded program, closed at the end of a `with` block; filters keep it. OSError if the kernel refuses it."""

    def __init__(self, program: bytes) -> None:
        self.descriptor = load(program, PROG_TYPE_SCHED_CLS, "insula_class")

    def __enter__(self) -> int:
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
