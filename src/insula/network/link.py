"""The speed of the link between this host and the outside."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from insula.kernel.netlink import Rtnl

HINT: Final = 'set link = "1gbit", or what it has, below [network] in /etc/insula/insulad.toml, and restart insulad'
"""What to do where the speed isn't known."""
_DEVICES = Path("/sys/class/net")


def measured_link() -> int | None:
    """Return the bits a second of the device of the default route, as its driver reports them (ethtool(8)); None if
    there is none, or if it doesn't know: many virtual devices don't, and others report what they aren't limited to."""
    with Rtnl() as rtnl:
        indices = {index for index, _ in rtnl.default_routes()}
        names = [link.name for link in rtnl.links() if link.index in indices]
    speeds = [speed for name in names if (speed := _speed(_DEVICES / name))]
    return min(speeds, default=None)


def _speed(device: Path) -> int | None:
    """Return the speed of a device that has hardware, or a driver of a hypervisor."""
    try:
        megabits = int((device / "speed").read_text()) if (device / "device").exists() else -1
    except (OSError, ValueError):  # EINVAL: the device is down, or has no speed
        return None
    return megabits * 1_000_000 if megabits > 0 else None
