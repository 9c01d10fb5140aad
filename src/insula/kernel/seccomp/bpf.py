"""An assembler for classic BPF, the virtual machine that runs seccomp filters in the kernel (seccomp(2), bpf(4)).

It has one 32-bit accumulator. A program loads words of its input (struct seccomp_data), compares the accumulator with
constants, jumps forward, and returns. So a program is an acyclic graph, and it is built as one from the returns to the
start: `Graph` makes nodes that refer to existing nodes, and equal nodes are made once. This sharing, and `switch`, a
binary search, keep filters small.

    graph = Graph()
    allow, refuse = graph.ret(0x7FFF0000), graph.ret(0x00050001)
    program = graph.assemble(graph.load(0, graph.switch([(0, allow), (57, refuse), (58, allow)])))

`assemble` places the nodes from the last instruction to the first. A conditional jump reaches 255 instructions ahead;
to a more distant target it goes through a jump with a 32-bit offset, or a copy of the target if that is a return.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

MAX_INSTRUCTIONS: Final = 4096  # BPF_MAXINSNS

LD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
JA: Final = 0x05  # BPF_JMP | BPF_JA
JEQ: Final = 0x15
JGT: Final = 0x25
JGE: Final = 0x35
RET: Final = 0x06  # BPF_RET | BPF_K

_SOCK_FILTER: Final = struct.Struct("=HBBI")  # linux/filter.h: code, jt, jf, k
_REACH: Final = 255
_EXCEPTIONS: Final = 4  # single values looked for one after another

Node = int
"""The number of a node: an instruction with everything after it."""


class Graph:
    """A program as a graph of instructions with shared equal parts."""

    def __init__(self) -> None:
        self._nodes: list[tuple[int, int, Node, Node]] = []  # code, k, next (if true), next if false
        self._known: dict[tuple[int, int, Node, Node], Node] = {}

    def ret(self, value: int) -> Node:
        """Return `value`."""
        return self._node(RET, value, -1, -1)

    def load(self, offset: int, then: Node) -> Node:
        """Load the 32-bit word at `offset` of the input into the accumulator."""
        return self._node(LD, offset, then, then)

    def mask(self, bits: int, then: Node) -> Node:
        """Keep only these bits of the accumulator."""
        return then if bits == 0xFFFFFFFF else self._node(AND, bits, then, then)

    def branch(self, code: int, k: int, yes: Node, no: Node) -> Node:
        """Go to `yes` if the accumulator is (JEQ) `k`, (JGT) greater or (JGE) not less."""
        return yes if yes == no else self._node(code, k, yes, no)

    def switch(self, ranges: Sequence[tuple[int, Node]]) -> Node:
        """Branch by the accumulator's value; `ranges` has the first value of each range and its node, ascending from 0.

        It is a binary search. A single value between two ranges with the same node takes one comparison instead of two.
        """
        groups = list(_with_exceptions(_merged(ranges)))
        return self._halve(groups)

    def _halve(self, groups: Sequence[tuple[int, Node, list[tuple[int, Node]]]]) -> Node:
        if len(groups) > 1:
            middle = len(groups) // 2
            return self.branch(JGE, groups[middle][0], self._halve(groups[middle:]), self._halve(groups[:middle]))
        _, node, exceptions = groups[0]
        for value, other in exceptions:
            node = self.branch(JEQ, value, other, node)
        return node

    def _node(self, code: int, k: int, yes: Node, no: Node) -> Node:
        key = (code, k, yes, no)
        node = self._known.setdefault(key, len(self._nodes))
        if node == len(self._nodes):
            self._nodes.append(key)
        return node

    def assemble(self, root: Node) -> bytes:
        """Return the program that starts at `root`, an array of struct sock_filter. ValueError if it is too long."""
        layout = _Placement(self._nodes)
        layout.place(root)
        if len(layout.code) > MAX_INSTRUCTIONS:
            raise ValueError(f"a filter of {len(layout.code)} instructions is longer than {MAX_INSTRUCTIONS}")
        return b"".join(_SOCK_FILTER.pack(*instruction) for instruction in reversed(layout.code))


class _Placement:
    """The placed instructions, from last to first, so that the target of every jump is placed before the jump."""

    def __init__(self, nodes: list[tuple[int, int, Node, Node]]) -> None:
        self.code: list[tuple[int, int, int, int]] = []
        self._nodes = nodes
        self._places: dict[Node, int] = {}  # the latest position of a node, of its copy or of a long jump to it

    def place(self, root: Node) -> None:
        """Place everything that `root` leads to, and then `root` itself as the first instruction."""
        for node in self._order(root):
            self._put(node)

    def _order(self, root: Node) -> Iterator[Node]:
        """Yield every node after the nodes that it leads to, with the true branch nearest to its jump."""
        seen: set[Node] = set()
        todo = [(root, False)]
        while todo:
            node, ready = todo.pop()
            if ready:
                yield node
            elif node not in seen:
                seen.add(node)
                todo.append((node, True))
                _, _, yes, no = self._nodes[node]
                todo += [(n, False) for n in (yes, no) if n >= 0]

    def _put(self, node: Node) -> None:
        code, k, yes, no = self._nodes[node]
        if code == RET:
            return  # placed by the jumps that need it
        if yes == no:
            if self._places.get(yes) != len(self.code) - 1:
                self._place_near(yes)
            self._emit(node, (code, 0, 0, k))
            return
        while self._distance(yes) > _REACH or self._distance(no) > _REACH:
            self._place_near(yes if self._distance(yes) > _REACH else no)
        self._emit(node, (code, self._distance(yes), self._distance(no), k))

    def _distance(self, node: Node) -> int:
        """Return the jump distance from the next instruction to a node; a number out of reach if it isn't placed."""
        place = self._places.get(node)
        return _REACH + 1 if place is None else len(self.code) - 1 - place

    def _place_near(self, node: Node) -> None:
        """Place a substitute for `node` here: a copy of a return, or a long jump."""
        code, k, _, _ = self._nodes[node]
        if code == RET:
            self._emit(node, (RET, 0, 0, k))
        else:
            self._emit(node, (JA, 0, 0, len(self.code) - 1 - self._places[node]))

    def _emit(self, node: Node, instruction: tuple[int, int, int, int]) -> None:
        self._places[node] = len(self.code)
        self.code.append(instruction)


def _merged(ranges: Sequence[tuple[int, Node]]) -> list[tuple[int, Node]]:
    """Merge adjacent ranges with the same node."""
    merged: list[tuple[int, Node]] = []
    for first, node in ranges:
        if not merged or merged[-1][1] != node:
            merged.append((first, node))
    return merged


def _with_exceptions(ranges: list[tuple[int, Node]]) -> Iterator[tuple[int, Node, list[tuple[int, Node]]]]:
    """Group ranges as (first value, node, single values within that have other nodes)."""
    index = 0
    while index < len(ranges):
        first, node = ranges[index]
        exceptions: list[tuple[int, Node]] = []
        while index + 2 < len(ranges):
            (value, other), (after, again) = ranges[index + 1 : index + 3]
            if after != value + 1 or again != node or len(exceptions) == _EXCEPTIONS:
                break
            exceptions.append((value, other))
            index += 2
        yield first, node, exceptions
        index += 1
