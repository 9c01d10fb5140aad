"""A budget for each tenant of memory that Linux charges to no control group (`insula.kernel.uncharged`).

It is a 32nd of the host's memory, from 128 MiB to 1 GiB. Where a kernel can't count it, `insula doctor` says so.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from insula.control.tenants import FIRST_ID, MAX_TENANTS
from insula.kernel.uncharged import IDS, Guard
from insula.model.objects import IDS_PER_TENANT
from insula.model.units import format_size
from insula.model.views import Check

log = logging.getLogger("insula.control")
_SHARE, _LEAST, _GREATEST = 32, 128 << 20, 1 << 30
_FEWEST, _MOST, _EACH = 1 << 16, 1 << 20, 16 << 10  # entries of the table; one for each 16 KiB of memory
assert IDS == IDS_PER_TENANT


def memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def budget() -> int:
    return min(_GREATEST, max(_LEAST, memory() // _SHARE))


class Uncharged:
    """`directory` is where the kernel's part of it is pinned. The methods block."""

    def __init__(self, directory: Path) -> None:
        entries = min(_MOST, max(_FEWEST, memory() // _EACH))
        self._guard = Guard(str(directory), FIRST_ID, MAX_TENANTS, budget(), entries)
        self._turn = threading.Lock()
        self._trouble = "not counted yet"
        self._over = False

    def begin(self) -> None:
        """Have it counted from now on; what is there already is not. It takes half a second the first time."""
        with self._turn:
            if self._over:
                return
            try:
                self._guard.ensure()
                self._trouble = ""
            except OSError as error:
                self._trouble = str(error)
                log.warning("memory of sockets and file locks has no bound: %s", error)

    def check(self) -> Check:
        """For `insula doctor`."""
        if not self._trouble:
            return Check(name="sockets and locks", state="ok", detail=f"at most {format_size(budget())} a tenant")
        return Check(
            name="sockets and locks",
            state="degraded",
            detail=self._trouble,
            consequence="their memory, which Linux charges to no control group, has no bound",
            hint="use a kernel with BTF and function tracing (CONFIG_DEBUG_INFO_BTF, CONFIG_DYNAMIC_FTRACE)",
        )

    def restore(self) -> None:
        """Take it off the kernel for good. OSError."""
        with self._turn:
            self._over = True
            self._guard.remove()
