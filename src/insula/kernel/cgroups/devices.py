"""Device rules: which device nodes a group may make, read and write (`linux.resources.devices` of the runtime-spec).

The rules are read in order, and the last one that speaks of a device decides, for each of ``r``, ``w`` and ``m``
(mknod) on its own; what none speaks of is denied. A rule speaks of a type (``c``, ``b``, or ``a`` for both), a major
and a minor number; a number that is absent or negative is any.

Version 1 takes them as a list (device_list.py), version 2 as a program (device_program.py).
"""

from __future__ import annotations

from insula.kernel.cgroups.settings import unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANY = -1
EVERY_ACCESS = frozenset("rwm")
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
