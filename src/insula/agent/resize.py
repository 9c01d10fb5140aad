"""The size of a machine as it is seen from inside: how many processors run, and how large its file system is.

Both follow what the host has given the machine. A processor that was plugged in runs when it is set online
(Documentation/core-api/cpu_hotplug.rst).
"""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_CPUS = "/sys/devices/system/cpu"
_ENODEV = 19


def processors() -> list[int]:
    """The processors that the machine has, running or not."""
    return sorted(int(name[3:]) for name in os.listdir(_CPUS) if name.startswith("cpu") and name[3:].isdigit())


def check(count: int) -> None:
    """Raise ENODEV if there are fewer processors."""
    if (there := len(processors())) < count:
        raise OSError(_ENODEV, f"there are {there} processors")


def carry_out(cpus: int, grow: Callable[[], object]) -> NoReturn:
    """Be a process that has so many processors run, and the file system grow."""
    try:
        with contextlib.suppress(OSError):
            set_processors(cpus)
        with contextlib.suppress(OSError):
            grow()
    finally:
        os._exit(0)


def set_processors(count: int) -> None:
    """Have so many processors run, the first ones. OSError."""
    for position, number in enumerate(processors()):
        path, wanted = f"{_CPUS}/cpu{number}/online", "1" if position < count else "0"
        with contextlib.suppress(FileNotFoundError), open(path, "r+") as file:  # the first has no such file
            if file.read().strip() != wanted:
                file.write(wanted)


def running() -> int:
    """How many processors run."""
    return os.sysconf("SC_NPROCESSORS_ONLN")
