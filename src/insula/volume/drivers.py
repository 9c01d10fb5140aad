"""The registry of quota drivers, and the choice of one for a directory.

A driver is chosen by trying it: it has to refuse a write past a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from insula.volume.project import ProjectQuota
from insula.volume.quota import DiskQuota, ReservationOnly

DRIVERS: Sequence[Callable[[Path], DiskQuota | str]] = (ProjectQuota.open,)
"""In the order in which they are tried. Each returns a driver, or why it can't enforce limits in the directory."""


def open_quota(directory: Path) -> DiskQuota:
    """The first driver that proves to enforce limits in the directory, else `ReservationOnly`. Blocks."""
    reasons = []
    for opened in DRIVERS:
        driver = opened(directory)
        if not isinstance(driver, str):
            return driver
        reasons.append(driver)
    return ReservationOnly(directory, "; ".join(reasons))
