"""Device rules in version 1, where a group has a list of exceptions (the kernel's cgroup-v1/devices.rst).

A group either denies everything but its exceptions (devices.allow adds to the list, devices.deny removes from it), or
allows everything but them. The list has no order, so the rules are brought to that form first (`normalise`). A rule
that takes one device out of an exception about many has no such form, and is refused.

A new group begins with the exceptions of its parent. So the list in force is read first and only the difference is
written: for a tenant's instances, whose parent has the right list already, that is nothing.
"""

from __future__ import annotations

from insula.kernel.cgroups.devices import ANY, Rule
from insula.kernel.cgroups.files import read, write
from insula.kernel.cgroups.settings import unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    Device = tuple[str, int, int]  # type, major, minor; ANY for a number
    Exceptions = dict[Device, frozenset[str]]

_ALLOWS_ALL = "a *:* rwm"


def apply(directory: str, rules: Sequence[dict[str, Any]]) -> None:
    """Put the rules in force in the group's directory. OSError names linux.resources.devices, and the file."""
    in_force = read(f"{directory}/devices.list") or ""
    for file, line in changes(in_force, _wanted(rules)):
        try:
            write(f"{directory}/{file}", line)
        except OSError as error:
            what = "allow" if file == "devices.allow" else "deny"
            raise OSError(error.errno, f"linux.resources.devices: {what} {line}: {error.strerror}", directory) from None


class Exempt:
    """Everything is `allowed` or nothing, but for the `exceptions`. `listed` is what devices.list says of it then, and
    `anew` the writes that bring it about from any state."""

    __slots__ = ("allowed", "anew", "exceptions", "listed")

    def __init__(self, allowed: bool, exceptions: Exceptions) -> None:
        self.allowed = allowed
        self.exceptions = exceptions
        lines = [_line(device, access) for device, access in exceptions.items()]
        self.listed = _ALLOWS_ALL if allowed else "\n".join(lines)
        first, then = ("devices.allow", "devices.deny") if allowed else ("devices.deny", "devices.allow")
        self.anew = [(first, "a"), *((then, line) for line in lines)]


_last: tuple[list[dict[str, Any]], Exempt] | None = None


def _wanted(rules: Sequence[dict[str, Any]]) -> Exempt:
    """`normalise`, whose result is kept: every launch has the same rules."""
    global _last
    if _last is None or _last[0] != rules:
        _last = [dict(rule) for rule in rules], normalise(rules)
    return _last[1]


def normalise(rules: Iterable[dict[str, Any]]) -> Exempt:
    """The rules in the form of version 1. OSError if they can't be said so."""
    allowed = False
    exceptions: dict[Device, set[str]] = {}
    for rule in map(Rule, rules):
        if rule.about_all:
            allowed, exceptions = rule.allow, {}
            continue
        for kind in rule.types:
            device = (kind, rule.major, rule.minor)
            if rule.allow == allowed:
                _remove(exceptions, device, rule.access)
            else:
                exceptions.setdefault(device, set()).update(rule.access)
    if not allowed:
        _complete(exceptions)
    return Exempt(allowed, {device: frozenset(access) for device, access in exceptions.items() if access})


def _remove(exceptions: dict[Device, set[str]], device: Device, access: frozenset[str]) -> None:
    for other, theirs in exceptions.items():
        if _covers(device, other):
            theirs -= access
        elif theirs & access and _meet(device, other):
            hole, whole = _line(device, access), _line(other, theirs)
            raise unsupported("devices", f"cgroup v1 has no way to take {hole} out of {whole}")


def _complete(exceptions: dict[Device, set[str]]) -> None:
    """The kernel allows what one exception allows whole: so each has what those that cover it have, too."""
    # whose meetings are among them; two without a wildcard don't meet
    meetings = {_meet(one, other) for one in exceptions if ANY in one for other in exceptions}
    for meeting in meetings - exceptions.keys():
        if meeting:
            exceptions[meeting] = set()
    general = [(other, theirs) for other, theirs in exceptions.items() if ANY in other]
    for device, access in exceptions.items():
        for other, theirs in general:
            if _covers(other, device):
                access |= theirs


def _covers(one: Device, other: Device) -> bool:
    return all(a in (b, ANY) for a, b in zip(one, other, strict=True))


def _meet(one: Device, other: Device) -> Device | None:
    """What both are about."""
    if one[0] != other[0] or any(ANY not in (a, b) and a != b for a, b in zip(one[1:], other[1:], strict=True)):
        return None
    return (one[0], max(one[1], other[1]), max(one[2], other[2]))


def changes(in_force: str, wanted: Exempt) -> list[tuple[str, str]]:
    """(file, line) to write so that what devices.list says becomes what is wanted.

    Where it can, a list is changed entry by entry: a group that has groups below it can't begin anew.
    """
    if wanted.allowed or in_force == _ALLOWS_ALL:  # whose exceptions are not shown
        return wanted.anew
    if in_force == wanted.listed:
        return []
    have = dict(map(_parse, in_force.splitlines()))
    none: frozenset[str] = frozenset()
    superfluous = {device: access - wanted.exceptions.get(device, none) for device, access in have.items()}
    missing = {device: access - have.get(device, none) for device, access in wanted.exceptions.items()}
    return [
        *(("devices.deny", _line(device, access)) for device, access in superfluous.items() if access),
        *(("devices.allow", _line(device, access)) for device, access in missing.items() if access),
    ]


def _line(device: Device, access: Iterable[str]) -> str:
    kind, *numbers = device
    return f"{kind} {':'.join('*' if n == ANY else str(n) for n in numbers)} {''.join(sorted(access, key='rwm'.index))}"


def _parse(line: str) -> tuple[Device, frozenset[str]]:
    kind, numbers, access = line.split()
    major, minor = (ANY if n == "*" else int(n) for n in numbers.split(":"))
    return (kind, major, minor), frozenset(access)
