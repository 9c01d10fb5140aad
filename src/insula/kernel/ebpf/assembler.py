"""An assembler for eBPF, the virtual machine that runs small programs inside the kernel (bpf(2), RFC 9669).

It has ten registers of 64 bits and a stack. r1 holds the program's input at the start, r0 its return value at the end.
An instruction has eight bytes, struct bpf_insn of linux/bpf.h:

    code   8 bits    the operation; its last three bits are the class: load, 64-bit arithmetic, jump, …
    dst    4 bits    the register that is changed or compared
    src    4 bits    another register
    off   16 bits    an offset in memory, or the number of instructions to jump over
    imm   32 bits    a constant

The kernel's verifier follows every path through a program before it is loaded. It refuses one that could read memory
that it may not, or that might not terminate. So programs have forward jumps only, which here go to labels:

    code = Assembler()
    code.load32(0, 1, 4)                    # r0 = the second word of the input
    code.jump_if_not_equal(0, 7, "no")
    code.move(0, 1)
    code.exit()
    code.label("no")
    code.move(0, 0)
    code.exit()
    program = code.assemble()
"""

from __future__ import annotations

import struct
import sys

# instruction classes, and with what they are combined: linux/bpf_common.h, linux/bpf.h
LDX_MEM_W = 0x61  # dst = *(u32 *)(src + off)
LDX_MEM_DW = 0x79  # dst = *(u64 *)(src + off)
STX_MEM_W = 0x63  # *(u32 *)(dst + off) = src
STX_MEM_DW = 0x7B  # *(u64 *)(dst + off) = src
STX_ATOMIC_DW = 0xDB  # on *(u64 *)(dst + off), with src; imm tells what
LD_IMM64 = 0x18  # dst = a constant of 64 bits, in two instructions; with src 1 a map, by its descriptor
ALU64_ADD_K = 0x07  # dst += imm, whose sign is extended
ALU64_ADD_X = 0x0F  # dst += src
ALU64_SUB_X = 0x1F  # dst -= src
ALU64_LSH_K = 0x67  # dst <<= imm
ALU64_MOV_K = 0xB7  # dst = imm
ALU64_MOV_X = 0xBF  # dst = src
ALU64_AND_K = 0x57  # dst &= imm, whose sign is extended
ALU64_RSH_K = 0x77  # dst >>= imm
JEQ_K = 0x15  # if dst == imm, whose sign is extended, go on off instructions ahead
JNE_K = 0x55
JNE32_K = 0x56  # the same for the lower 32 bits
JGT_X = 0x2D  # if dst > src, without signs
JA = 0x05  # always
ATOMIC_ADD, ATOMIC_EXCHANGE = 0x00, 0xE1
CALL = 0x85  # r0 = a function of the kernel, by its number, of r1 to r5
EXIT = 0x95

INSTRUCTION = struct.Struct("<BBhi")


class Assembler:
    """A list of instructions; `assemble` computes the offsets of jumps."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int, int, str | None]] = []  # code, dst, src, off, imm, label
        self._labels: dict[str, int] = {}

    def load32(self, dst: int, src: int, offset: int) -> None:
        """dst = the 32 bits at src + offset."""
        self._add(LDX_MEM_W, dst, src, offset)

    def load64(self, dst: int, src: int, offset: int) -> None:
        """dst = the 64 bits at src + offset."""
        self._add(LDX_MEM_DW, dst, src, offset)

    def store32(self, dst: int, offset: int, src: int) -> None:
        """The 32 bits at dst + offset = src."""
        self._add(STX_MEM_W, dst, src, offset)

    def store64(self, dst: int, offset: int, src: int) -> None:
        """The 64 bits at dst + offset = src."""
        self._add(STX_MEM_DW, dst, src, offset)

    def atomic_add64(self, dst: int, offset: int, src: int) -> None:
        """The 64 bits at dst + offset += src, in one step."""
        self._add(STX_ATOMIC_DW, dst, src, offset, ATOMIC_ADD)

    def exchange64(self, dst: int, offset: int, src: int) -> None:
        """Exchange the 64 bits at dst + offset and src, in one step."""
        self._add(STX_ATOMIC_DW, dst, src, offset, ATOMIC_EXCHANGE)

    def load_constant(self, dst: int, value: int) -> None:
        """dst = value, of 64 bits."""
        self._wide(dst, 0, value)

    def load_map(self, dst: int, descriptor: int) -> None:
        """dst = the map that is open as `descriptor` in the process that loads the program."""
        self._wide(dst, 1, descriptor)

    def add(self, dst: int, value: int) -> None:
        """dst += value."""
        self._add(ALU64_ADD_K, dst, value=value)

    def add_register(self, dst: int, src: int) -> None:
        """dst += src."""
        self._add(ALU64_ADD_X, dst, src)

    def subtract_register(self, dst: int, src: int) -> None:
        """dst -= src."""
        self._add(ALU64_SUB_X, dst, src)

    def shift_left(self, dst: int, bits: int) -> None:
        """dst <<= bits."""
        self._add(ALU64_LSH_K, dst, value=bits)

    def move(self, dst: int, value: int) -> None:
        """dst = value."""
        self._add(ALU64_MOV_K, dst, value=value)

    def move_register(self, dst: int, src: int) -> None:
        """dst = src."""
        self._add(ALU64_MOV_X, dst, src)

    def and_(self, dst: int, bits: int) -> None:
        """dst &= bits."""
        self._add(ALU64_AND_K, dst, value=bits)

    def shift_right(self, dst: int, bits: int) -> None:
        """dst >>= bits."""
        self._add(ALU64_RSH_K, dst, value=bits)

    def jump_if_equal(self, dst: int, value: int, label: str) -> None:
        """Go to `label` if dst == value."""
        self._add(JEQ_K, dst, value=value, label=label)

    def jump_if_not_equal(self, dst: int, value: int, label: str) -> None:
        """Go to `label` if dst != value."""
        self._add(JNE_K, dst, value=value, label=label)

    def jump32_if_not_equal(self, dst: int, value: int, label: str) -> None:
        """Go to `label` if the lower 32 bits of dst are not `value`, a number with sign."""
        self._add(JNE32_K, dst, value=value, label=label)

    def jump_if_greater(self, dst: int, src: int, label: str) -> None:
        """Go to `label` if dst > src, as numbers without sign."""
        self._add(JGT_X, dst, src, label=label)

    def jump(self, label: str) -> None:
        """Go to `label`."""
        self._add(JA, label=label)

    def call(self, function: int) -> None:
        """r0 = the kernel's function of that number (enum bpf_func_id); r1 to r5 are its arguments, and lost."""
        self._add(CALL, value=function)

    def exit(self) -> None:
        """End, with the answer in r0."""
        self._add(EXIT)

    def label(self, name: str) -> None:
        """Jumps to `name` come here, to the next instruction."""
        self._labels[name] = len(self._code)

    def _wide(self, dst: int, src: int, value: int) -> None:
        low, high = struct.unpack("=ii", (value & (1 << 64) - 1).to_bytes(8, sys.byteorder))
        self._add(LD_IMM64, dst, src, value=low)
        self._add(0, value=high)

    def _add(
        self, code: int, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0, label: str | None = None
    ) -> None:
        self._code.append((code, dst, src, offset, value, label))

    def assemble(self) -> bytes:
        """Return the program as an array of struct bpf_insn. KeyError for an undefined label."""
        program = b""
        for index, (code, dst, src, offset, value, label) in enumerate(self._code):
            if label is not None:
                offset = self._labels[label] - index - 1
            program += INSTRUCTION.pack(code, src << 4 | dst, offset, value)
        return program
