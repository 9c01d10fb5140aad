"""Device rules of version 1, where a group has a list of exceptions (the kernel's cgroup-v1/devices.rst).

A group denies every device except those in the list (devices.allow adds to it, devices.deny removes from it), or allows
every device except those. The list is unordered, so ordered rules are converted first (`normalise`). A rule that
excludes one device from an exception about many can't be converted, and is refused.

A new group starts with its parent's list. So the current list is read first, and only the difference is written: none
for a tenant's instances, whose parent has the right list already.
"""

from __future__ import annotations

from insula.kernel.cgroups.devices import ANY, DeviceRule
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
    """Apply the rules to the group's directory. OSError names linux.resources.devices, and the file."""
    in_force = read(f"{directory}/devices.list") or ""
    for file, line in changes(in_force, _wanted(rules)):
        try:
            write(f"{directory}/{file}", line)
        except OSError as error:
            what = "allow" if file == "devices.allow" else "deny"
            raise OSError(error.errno, f"linux.resources.devices: {what} {line}: {error.strerror}", directory) from None


class DeviceList:
    """A list of `exceptions`; every other device is allowed if `allowed`, else denied.

    `listed` is its text in devices.list, and `rewrite` are the writes that produce it from any other list.
    """

    __slots__ = ("allowed", "exceptions", "listed", "rewrite")

    def __init__(self, allowed: bool, exceptions: Exceptions) -> None:
        self.allowed = allowed
        self.exceptions = exceptions
        lines = [_line(device, access) for device, access in exceptions.items()]
        self.listed = _ALLOWS_ALL if allowed else "\n".join(lines)
        first, then = ("devices.allow", "devices.deny") if allowed else ("devices.deny", "devices.allow")
        self.rewrite = [(first, "a"), *((then, line) for line in lines)]


_last: tuple[list[dict[str, Any]], DeviceList] | None = None


def _wanted(rules: Sequence[dict[str, Any]]) -> DeviceList:
    """Return `normalise(rules)`; the last result is cached, because every launch has the same rules."""
    global _last
    if _last is None or _last[0] != rules:
        _last = [dict(rule) for rule in rules], normalise(rules)
    return _last[1]


def normalise(rules: Iterable[dict[str, Any]]) -> DeviceList:
    """Convert ordered rules to a list of exceptions. OSError if that is impossible."""
    allowed = False
    exceptions: dict[Device, set[str]] = {}
    for rule in map(DeviceRule, rules):
        if rule.matches_all:
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
    return DeviceList(allowed, {device: frozenset(access) for device, access in exceptions.items() if access})


def _remove(exceptions: dict[Device, set[str]], device: Device, access: frozenset[str]) -> None:
    for other, theirs in exceptions.items():
        if _covers(device, other):
            theirs -= access
        elif theirs & access and _intersection(device, other):
            excluded, rule = _line(device, access), _line(other, theirs)
            raise unsupported("devices", f"cgroup v1 cannot exclude {excluded} from {rule}")


def _complete(exceptions: dict[Device, set[str]]) -> None:
    """Add to each exception the accesses of those that cover it: the kernel uses one exception for one request."""
    # intersections become exceptions too; two different ones without a wildcard have none
    intersections = {_intersection(one, other) for one in exceptions if ANY in one for other in exceptions}
    for common in intersections - exceptions.keys():
        if common:
            exceptions[common] = set()
    general = [(other, theirs) for other, theirs in exceptions.items() if ANY in other]
    for device, access in exceptions.items():
        for other, theirs in general:
            if _covers(other, device):
                access |= theirs


def _covers(one: Device, other: Device) -> bool:
    return all(a in (b, ANY) for a, b in zip(one, other, strict=True))


def _intersection(one: Device, other: Device) -> Device | None:
    """Return the devices that match both; None if there are none."""
    if one[0] != other[0] or any(ANY not in (a, b) and a != b for a, b in zip(one[1:], other[1:], strict=True)):
        return None
    return (one[0], max(one[1], other[1]), max(one[2], other[2]))


def changes(in_force: str, wanted: DeviceList) -> list[tuple[str, str]]:
    """Return the writes, as (file, line), that change devices.list from `in_force` to `wanted`.

    If possible the list is changed entry by entry, because the list of a group with subgroups can't be reset.
    """
    if wanted.allowed or in_force == _ALLOWS_ALL:  # devices.list does not show the exceptions then
        return wanted.rewrite
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
