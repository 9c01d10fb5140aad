"""The kernel's side of an eBPF program in Python: an interpreter of the instructions that insula.kernel.ebpf makes."""

from __future__ import annotations

import struct

from insula.kernel.ebpf import assembler

_ALL = (1 << 64) - 1


def run(program: bytes, data: bytes) -> int:
    """The result of the program for `data`. AssertionError on anything that the kernel's verifier would refuse."""
    count, counter = len(program) // 8, 0
    registers: dict[int, int | None] = {1: None}  # r1 is a pointer, and no number
    while True:
        assert 0 <= counter < count, "ran off the end"
        code, both, offset, immediate = assembler.INSTRUCTION.unpack_from(program, 8 * counter)
        dst, src = both & 15, both >> 4
        counter += 1

        def value(register: int) -> int:
            number = registers[register]
            assert number is not None, "arithmetic on a pointer"
            return number

        match code:
            case assembler.LDX_MEM_W:
                assert registers[src] is None and 0 <= offset <= len(data) - 4
                (registers[dst],) = struct.unpack_from("<I", data, offset)
            case assembler.ALU64_MOV_K:
                registers[dst] = immediate & _ALL
            case assembler.ALU64_MOV_X:
                registers[dst] = value(src)
            case assembler.ALU64_AND_K:
                registers[dst] = value(dst) & immediate & _ALL
            case assembler.ALU64_RSH_K:
                registers[dst] = value(dst) >> immediate
            case assembler.JEQ_K | assembler.JNE_K:
                assert offset >= 0, "a loop"
                if (value(dst) == immediate & _ALL) == (code == assembler.JEQ_K):
                    counter += offset
            case assembler.EXIT:
                return value(0)
            case _:
                raise AssertionError(f"instruction {code:#x}")
