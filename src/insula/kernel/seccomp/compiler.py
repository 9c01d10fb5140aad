"""The compiler from an OCI seccomp profile to a filter for seccomp(2).

A profile (`linux.seccomp` of the OCI runtime-spec) has system calls by name, with an action for each. The kernel needs
a program that decides by numbers, which differ between architectures. A profile has the same meaning as with runc,
which uses libseccomp:

- The native architecture is always included. A call of an architecture that is not in the profile kills its thread.
- If a call has rules without conditions, the first of these decides. Otherwise the first rule decides whose conditions
  all hold, and if there is none, the default action.
- Conditions compare 64-bit arguments, or the lower 32 bits on a 32-bit architecture. Two conditions on one argument
  make two rules (runc's old behaviour).
- A rule with the default action is ignored.
- A call that is newer than all calls in the profile returns ENOSYS instead of the default action, unless that allows
  it: programs then fall back to an older call, while they would fail on EPERM.
- 32-bit x86 has two ways to call the socket and System V IPC calls; a rule for one is a rule for both (socketcall(2)).
  The arguments of a multiplexed call are in memory, which a filter can't read: conditions on them are dropped.

Numbers come from libseccomp's tables. Its own filters are several times as large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from insula.kernel import syscall_numbers
from insula.kernel.seccomp import bpf
from insula.kernel.seccomp.load import FLAGS, flags_of
from insula.kernel.syscall_numbers import Arch
from insula.model.errors import Invalid
from insula.model.units import shorten

EPERM: Final = 1
ENOSYS: Final = 38

# linux/seccomp.h: return values of a filter, and offsets in struct seccomp_data
RET_KILL_THREAD: Final = 0x00000000
RET_KILL_PROCESS: Final = 0x80000000
RET_TRAP: Final = 0x00030000
RET_ERRNO: Final = 0x00050000
RET_USER_NOTIF: Final = 0x7FC00000
RET_TRACE: Final = 0x7FF00000
RET_LOG: Final = 0x7FFC0000
RET_ALLOW: Final = 0x7FFF0000
_NUMBER: Final = 0
_ARCH: Final = 4
_ARGUMENTS: Final = 16  # six of eight bytes, little-endian here

_ACTIONS: Final = {
    "SCMP_ACT_KILL": RET_KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": RET_KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": RET_KILL_PROCESS,
    "SCMP_ACT_TRAP": RET_TRAP,
    "SCMP_ACT_ERRNO": RET_ERRNO,
    "SCMP_ACT_TRACE": RET_TRACE,
    "SCMP_ACT_ALLOW": RET_ALLOW,
    "SCMP_ACT_LOG": RET_LOG,
    "SCMP_ACT_NOTIFY": RET_USER_NOTIF,
}
_OPERATORS: Final = frozenset(f"SCMP_CMP_{op}" for op in ("EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"))
_HINT: Final = "see linux.seccomp in config-linux.md of the OCI runtime-spec"


class Condition(NamedTuple):
    """A comparison of an argument, 0 to 5: with `value`, or for MASKED_EQ of its bits `value` with `value_two`."""

    argument: int
    op: str
    value: int
    value_two: int = 0


class SyscallRule(NamedTuple):
    """Return `action` for the calls `names` if all conditions hold."""

    names: tuple[str, ...]
    action: int
    conditions: tuple[Condition, ...] = ()


class Profile(NamedTuple):
    """A checked profile; actions are return values of the filter."""

    default: int
    archs: tuple[Arch, ...]
    rules: tuple[SyscallRule, ...]
    flags: int


def parse(profile: Mapping[str, Any]) -> Profile:
    """Parse an OCI seccomp object. `Invalid` has the path of the wrong field, as in ``syscalls[3].action``."""
    if not isinstance(profile, Mapping):
        raise Invalid("seccomp profile is not an object", _HINT)
    if profile.get("defaultAction") == "SCMP_ACT_NOTIFY":
        raise Invalid("seccomp defaultAction may not be SCMP_ACT_NOTIFY", "notify about named calls only")
    default = _action(profile.get("defaultAction"), profile.get("defaultErrnoRet"), "defaultAction", "defaultErrnoRet")
    archs = {syscall_numbers.native()}
    for name in _list(profile.get("architectures"), "architectures"):
        if not isinstance(name, str) or not (name in syscall_numbers.ARCHS or name in syscall_numbers.FOREIGN):
            raise Invalid(f"seccomp architecture {shorten(name)} is unknown", f"use {', '.join(syscall_numbers.ARCHS)}")
        if name in syscall_numbers.ARCHS:
            archs.add(syscall_numbers.ARCHS[name])
    for name in _list(profile.get("flags"), "flags"):
        if not isinstance(name, str) or name not in FLAGS:
            raise Invalid(f"seccomp flag {shorten(name)} is unknown", f"use {', '.join(FLAGS)}")
    rules: list[SyscallRule] = []
    for index, entry in enumerate(_list(profile.get("syscalls"), "syscalls")):
        rules += _rules(entry, f"syscalls[{index}]")
    _check_listener(profile, rules)
    return Profile(default, tuple(sorted(archs)), tuple(rules), flags_of(profile))


def compile(profile: Mapping[str, Any] | Profile) -> bytes:  # noqa: A001
    """Compile a profile to a filter for this machine, an array of struct sock_filter for `seccomp_load.load`.

    `Invalid` for a wrong profile, or if the filter is longer than the kernel allows (4096 instructions); `Unavailable`
    without libseccomp.
    """
    checked = profile if isinstance(profile, Profile) else parse(profile)
    graph = bpf.Graph()
    kill = root = graph.ret(RET_KILL_THREAD)
    tables: dict[int, dict[int, bpf.Node]] = {}  # by audit architecture: the node from each number up
    for arch in checked.archs:
        tables.setdefault(arch.audit, {0: kill}).update(_Outcomes(graph, checked, arch).ranges())
    for audit, ranges in sorted(tables.items()):
        if audit == syscall_numbers.X86_64.audit and syscall_numbers.X32 not in checked.archs:
            # a tracer sets -1 to skip a call; other numbers in this range belong to an ABI that the profile lacks
            ranges.update({syscall_numbers.X32_BIT: kill, 0xFFFFFFFF: graph.ret(checked.default)})
        root = graph.branch(bpf.JEQ, audit, graph.load(_NUMBER, graph.switch(sorted(ranges.items()))), root)
    try:
        return graph.assemble(graph.load(_ARCH, root))
    except ValueError as error:
        raise Invalid(f"seccomp profile: {error}", "use fewer rules with conditions") from None


def refuse_unknown(profile: Mapping[str, Any]) -> None:
    """Raise `Invalid` if a rule names a call that no architecture has: the spec lets such rules pass."""
    for index, rule in enumerate(_list(profile.get("syscalls"), "syscalls")):
        for name in rule.get("names") or ():
            if not syscall_numbers.is_known(name):
                hint = "leave it out, or the annotation run.oci.seccomp_fail_unknown_syscall"
                raise Invalid(f"seccomp syscalls[{index}].names: there is no system call {shorten(name)}", hint)


# -- checking a profile ---------------------------------------------------------------------------------------------


def _check_listener(profile: Mapping[str, Any], rules: Sequence[SyscallRule]) -> None:
    path, metadata = (profile.get(field) or "" for field in ("listenerPath", "listenerMetadata"))
    for field, value in (("listenerPath", path), ("listenerMetadata", metadata)):
        if not isinstance(value, str):
            raise Invalid(f"seccomp {field} is not a string", _HINT)
    notifying = [rule for rule in rules if rule.action == RET_USER_NOTIF]
    if any("write" in rule.names for rule in notifying):
        complaint = "seccomp: SCMP_ACT_NOTIFY cannot be used for the write syscall"
        raise Invalid(complaint, "the listener itself is passed on with write(2)")
    if not path and (notifying or metadata):
        raise Invalid("seccomp listenerPath is missing", "name the socket of the agent that is notified")


def _rules(entry: Any, where: str) -> Iterable[SyscallRule]:
    if not isinstance(entry, Mapping):
        raise Invalid(f"seccomp {where} is not an object", _HINT)
    names = tuple(_list(entry.get("names"), f"{where}.names"))
    if not names or not all(isinstance(name, str) and name for name in names):
        raise Invalid(f"seccomp {where}.names must name at least one call", _HINT)
    action = _action(entry.get("action"), entry.get("errnoRet"), f"{where}.action", f"{where}.errnoRet")
    conditions = [_condition(c, f"{where}.args[{i}]") for i, c in enumerate(_list(entry.get("args"), f"{where}.args"))]
    if len({c.argument for c in conditions}) < len(conditions):
        return [SyscallRule(names, action, (c,)) for c in conditions]
    return [SyscallRule(names, action, tuple(conditions))]


def _condition(entry: Any, where: str) -> Condition:
    op = entry.get("op") if isinstance(entry, Mapping) else None
    if not isinstance(op, str) or op not in _OPERATORS:
        raise Invalid(f"seccomp {where}.op must be one of {', '.join(sorted(_OPERATORS))}", _HINT)
    index = _integer(entry.get("index", 0), 5, f"{where}.index")
    values = [
        0 if entry.get(field) is None else _integer(entry[field], (1 << 64) - 1, f"{where}.{field}")
        for field in ("value", "valueTwo")
    ]
    if op == "SCMP_CMP_MASKED_EQ":
        values[1] &= values[0]  # a value with bits outside of the mask can't match
    return Condition(index, op.removeprefix("SCMP_CMP_"), *values)


def _action(name: Any, errno: Any, where: str, where_errno: str) -> int:
    if not isinstance(name, str) or name not in _ACTIONS:
        raise Invalid(f"seccomp {where} {shorten(name)} is unknown", f"use {', '.join(_ACTIONS)}")
    action = _ACTIONS[name]
    if action in (RET_ERRNO, RET_TRACE):
        limit = 4095 if action == RET_ERRNO else 0xFFFF
        return action | (EPERM if errno is None else _integer(errno, limit, where_errno))
    if errno is not None:
        raise Invalid(f"seccomp {where_errno}: {name} has no errno", "SCMP_ACT_ERRNO and SCMP_ACT_TRACE have")
    return action


def _integer(value: Any, limit: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise Invalid(f"seccomp {where} {shorten(value)} is not a number from 0 to {limit}", _HINT)
    return value


def _list(value: Any, where: str) -> Sequence[Any]:
    if value is not None and not isinstance(value, list | tuple):
        raise Invalid(f"seccomp {where} is not a list", _HINT)
    return value or ()


# -- from rules to a decision ---------------------------------------------------------------------------------------


class _Outcomes:
    """The outcomes of all numbers on one architecture: a node of the graph for each range of numbers."""

    def __init__(self, graph: bpf.Graph, profile: Profile, arch: Arch) -> None:
        self._graph = graph
        self._arch = arch
        self._default = profile.default
        self._allows = profile.default in (RET_ALLOW, RET_LOG) or profile.default & 0xFFFF0000 == RET_TRACE
        self._last = -1
        self._rules: dict[int, list[SyscallRule]] = {}
        for rule in profile.rules:
            self._add(rule)

    def ranges(self) -> dict[int, bpf.Node]:
        """Return the first number and the node of each range, over all numbers of this architecture."""
        default = self._graph.ret(self._default)
        ranges = {self._arch.first: default}
        for number, rules in sorted(self._rules.items()):
            ranges.update({number: self._decide(rules), number + 1: default})
        if not self._allows and self._last > 0:
            ranges[self._last + 1] = self._graph.ret(RET_ERRNO | ENOSYS)
        return ranges

    def _add(self, rule: SyscallRule) -> None:
        for name in rule.names:
            for number in syscall_numbers.numbers(name, self._arch):
                self._last = max(self._last, number.value)
                if rule.action == self._default:
                    continue
                conditions = rule.conditions
                if number.multiplexer is not None:
                    others = (c for c in conditions if c.argument != 0)
                    conditions = (Condition(0, "EQ", number.multiplexer), *others)
                self._rules.setdefault(number.value, []).append(rule._replace(conditions=conditions))

    def _decide(self, rules: list[SyscallRule]) -> bpf.Node:
        """Return the node that decides about one call."""
        for rule in rules:
            if not rule.conditions:
                return self._graph.ret(rule.action)
        by_value = _by_one_argument(rules, self._default)
        if by_value is not None:
            return self._argument(*by_value)
        node = self._graph.ret(self._default)
        for rule in reversed(rules):
            otherwise, node = node, self._graph.ret(rule.action)
            for condition in reversed(rule.conditions):
                node = self._test(condition, node, otherwise)
        return node

    def _argument(self, index: int, ranges: list[tuple[int, int]]) -> bpf.Node:
        """Return the node that decides by one argument: by its upper word, and where needed also by its lower word."""
        graph, upper = self._graph, []
        words = {0, *(w for first, _ in ranges for w in (first >> 32, (first >> 32) + 1) if w < 1 << 32)}
        for word in sorted(words) if self._arch.wide else [0]:
            start, end = word << 32, (word + 1) << 32
            within = [(max(first, start) - start, graph.ret(a)) for first, a in _overlapping(ranges, start, end)]
            single = len({node for _, node in within}) == 1
            upper.append((word, within[0][1] if single else graph.load(_low(index), graph.switch(within))))
        single = len({node for _, node in upper}) == 1
        return upper[0][1] if single else graph.load(_high(index), graph.switch(upper))

    def _test(self, condition: Condition, yes: bpf.Node, no: bpf.Node) -> bpf.Node:
        """Return the node that goes to `yes` if the condition holds: it compares upper words, then lower words."""
        graph, (index, op, value, value_two) = self._graph, condition
        if op in ("NE", "LT", "LE"):
            op, yes, no = {"NE": "EQ", "LT": "GE", "LE": "GT"}[op], no, yes
        mask, wanted = (value, value_two) if op == "MASKED_EQ" else ((1 << 64) - 1, value)
        if yes == no:
            return no
        code = {"GE": bpf.JGE, "GT": bpf.JGT}.get(op, bpf.JEQ)
        lower = graph.branch(code, wanted & 0xFFFFFFFF, yes, no)
        node = graph.load(_low(index), graph.mask(mask & 0xFFFFFFFF, lower)) if mask & 0xFFFFFFFF else yes
        if not self._arch.wide:  # the upper word is 0
            return no if wanted >> 32 else node
        if not mask >> 32:
            return node
        upper = graph.branch(bpf.JEQ, wanted >> 32, node, no)
        if code != bpf.JEQ:
            upper = graph.branch(bpf.JGT, wanted >> 32, yes, upper)
        return graph.load(_high(index), graph.mask(mask >> 32, upper))


def _low(index: int) -> int:
    return _ARGUMENTS + 8 * index


def _high(index: int) -> int:
    return _ARGUMENTS + 8 * index + 4


def _by_one_argument(rules: list[SyscallRule], default: int) -> tuple[int, list[tuple[int, int]]] | None:
    """Return the argument and the action for each range of its values, from 0 up, if all rules use only that one."""
    conditions = [rule.conditions[0] for rule in rules if len(rule.conditions) == 1]
    if len(conditions) < len(rules) or len({c.argument for c in conditions}) > 1:
        return None
    if any(c.op == "MASKED_EQ" for c in conditions):
        return None
    borders = sorted({0, *(v for c in conditions for v in (c.value, c.value + 1) if v < 1 << 64)})
    ranges = []
    for value in borders:  # all values up to the next boundary have the same action
        action = next((r.action for r in rules if _holds(r.conditions[0], value)), default)
        ranges.append((value, action))
    return conditions[0].argument, ranges


def _holds(condition: Condition, argument: int) -> bool:
    value = condition.value
    match condition.op:
        case "EQ":
            return argument == value
        case "NE":
            return argument != value
        case "LT":
            return argument < value
        case "LE":
            return argument <= value
        case "GT":
            return argument > value
        case "GE":
            return argument >= value
    raise AssertionError(condition.op)


def _overlapping(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return the ranges with values from `start` to below `end`."""
    ends = [first for first, _ in ranges[1:]] + [1 << 64]
    return [item for item, until in zip(ranges, ends, strict=True) if item[0] < end and until > start]
