"""Device rules: which device nodes a group may make, read and write (`linux.resources.devices` of the runtime-spec).

The last rule that matches a device decides, separately for each of the accesses ``r``, ``w`` and ``m`` (mknod); an
access without a matching rule is denied. A rule matches a type (``c``, ``b``, or ``a`` for both), a major and a minor
number; an absent or negative number matches any.

Version 1 has a list of devices (device_list.py), version 2 a program (device_program.py).
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
"""The rules that runc and crun append to a config's: any node may be made, and the devices that config-linux.md
requires in every container (null, zero, full, random, urandom, tty, console, ptmx, pseudoterminals) may be used."""


class DeviceRule:
    """A rule with all defaults filled in: `types` is "b", "c" or both, a number may be ANY."""

    __slots__ = ("access", "allow", "major", "minor", "types")

    def __init__(self, rule: dict[str, Any]) -> None:
        kind = rule.get("type") or "a"
        if kind not in ("a", "b", "c"):
            raise unsupported("devices", f"{kind!r} is not a device type: use a, b or c")
        self.allow = bool(rule.get("allow"))
        self.types = "bc" if kind == "a" else kind
        self.major, self.minor = (_number(rule.get(key)) for key in ("major", "minor"))
        self.access = frozenset(rule.get("access") or "rwm")
        if not self.access <= EVERY_ACCESS:
            raise unsupported("devices", f"{rule['access']!r} is not a device access: use r, w and m")

    @property
    def matches_all(self) -> bool:
        """Whether it matches every access to every device, so that earlier rules have no effect."""
        return (self.types, self.major, self.minor, self.access) == ("bc", ANY, ANY, EVERY_ACCESS)


def _number(value: int | None) -> int:
    if value is not None and value > _LARGEST:
        raise unsupported("devices", f"{value} is not a device number")
    return ANY if value is None or value < 0 else value
