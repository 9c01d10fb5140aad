"""Device rules: which device nodes a group may make, read and write (`linux.resources.devices` of the runtime-spec).

The rules are read in order, and the last one that speaks of a device decides, for each of ``r``, ``w`` and ``m``
(mknod) on its own; what none speaks of is denied. A rule speaks of a type (``c``, ``b``, or ``a`` for both), a major
and a minor number; a number that is absent or negative is any.

Version 2 takes them as a program, see device_program.py. Version 1 has no order: a group either denies everything but
a list of exceptions (devices.allow adds to it, devices.deny removes from it), or allows everything but such a list. So
the rules are brought to that form first (`normalise`). A rule that would cut one device out of an exception about many
can't be said, and is refused.

A new group of version 1 begins with the exceptions of its parent. So the list in force is read first and only the
difference is written: for a tenant's instances, whose parent has the right list already, that is nothing.
"""

from __future__ import annotations

from insula.kernel.cgroups.files import read, write
from insula.kernel.cgroups.settings import unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from insula.kernel.cgroups.group import Cgroup

    Device = tuple[str, int, int]  # type, major, minor; ANY for a number
    Exceptions = dict[Device, frozenset[str]]

ANY = -1
EVERY_ACCESS = frozenset("rwm")
_ALLOWS_ALL = "a *:* rwm"
_LARGEST = (1 << 20) - 1  # a minor number has 20 bits, a major one 12 (linux/kdev_t.h)

DEFAULT: tuple[dict[str, Any], ...] = (
    {"allow": True, "type": "c", "access": "m"},
    {"allow": True, "type": "b", "access": "m"},
    *(
        {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"}
        for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, ANY))
    ),
)
"""What runc and crun append to a config's rules: any node may be made, and of the devices that config-linux.md wants in
every container (null, zero, full, random, urandom, tty, console, ptmx, pseudoterminals) all is allowed."""


class Rule:
    """A rule with nothing left out: types is "b", "c" or both, a number may be ANY."""

    __slots__ = ("access", "allow", "major", "minor", "types")

    def __init__(self, rule: dict[str, Any]) -> None:
        kind = rule.get("type") or "a"
        if kind not in ("a", "b", "c"):
            raise unsupported("devices", f"{kind!r} is no type of a device: a, b and c are")
        self.allow = bool(rule.get("allow"))
        self.types = "bc" if kind == "a" else kind
        self.major, self.minor = (_number(rule.get(key)) for key in ("major", "minor"))
        self.access = frozenset(rule.get("access") or "rwm")
        if not self.access <= EVERY_ACCESS:
            raise unsupported("devices", f"{rule['access']!r} is no access to a device: r, w and m are")

    @property
    def about_all(self) -> bool:
        """Whether nothing that was said before matters any more."""
        return (self.types, self.major, self.minor, self.access) == ("bc", ANY, ANY, EVERY_ACCESS)


def _number(value: int | None) -> int:
    if value is not None and value > _LARGEST:
        raise unsupported("devices", f"{value} is no number of a device")
    return ANY if value is None or value < 0 else value


def apply(group: Cgroup, rules: Sequence[dict[str, Any]]) -> None:
    """Put the rules in force. OSError names linux.resources.devices, and the file or call that refused."""
    if group.tree.unified:
        from insula.kernel.cgroups import device_program

        device_program.install(group.directory("") or "", rules)
        return
    directory = group.directory("devices")
    if directory is None:
        raise unsupported("devices", "this host has no controller devices")
    in_force = read(f"{directory}/devices.list") or ""
    for file, line in changes(in_force, _wanted(rules)):
        try:
            write(f"{directory}/{file}", line)
        except OSError as error:
            what = "allow" if file == "devices.allow" else "deny"
            raise OSError(error.errno, f"linux.resources.devices: {what} {line}: {error.strerror}", directory) from None


# -- version 1 ------------------------------------------------------------------------------------------------------


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
