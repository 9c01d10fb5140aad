"""A budget for each tenant of kernel memory and terminals that Linux charges to no control group
(`insula.kernel.uncharged`).

It is a 32nd of the host's memory, from 128 MiB to 1 GiB, and `TERMINALS` terminals in all devpts together. If the
kernel can't count them, `insula doctor` says so.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Final

from insula.control.tenants import FIRST_ID, MAX_TENANTS
from insula.kernel.uncharged import IDS, Guard
from insula.model.objects import IDS_PER_TENANT
from insula.model.units import format_size
from insula.model.views import Check

log = logging.getLogger("insula.control")
_SHARE, _LEAST, _GREATEST = 32, 128 << 20, 1 << 30
_FEWEST, _MOST, _EACH = 1 << 16, 1 << 20, 16 << 10  # entries of the table; one for each 16 KiB of memory
_PATIENCE = 10.0
"""Seconds that `restore` waits for a kernel that is still checking the programs."""
_SUPPORT = "use a kernel with BTF and function tracing (CONFIG_DEBUG_INFO_BTF, CONFIG_DYNAMIC_FTRACE)"
_NOT_YET = "not counted yet: the programs are being loaded"
_OFF = "off by the setting ebpf_budgets"
TERMINALS: Final = 1024
assert IDS == IDS_PER_TENANT


def memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def budget() -> int:
    return min(_GREATEST, max(_LEAST, memory() // _SHARE))


class Uncharged:
    """The budgets. `directory` is where the kernel's programs and maps are pinned. If not `enabled`, `begin` removes
    them."""

    def __init__(self, directory: Path, *, enabled: bool = True) -> None:
        entries = min(_MOST, max(_FEWEST, memory() // _EACH))
        self._guard = Guard(str(directory), FIRST_ID, MAX_TENANTS, budget(), entries, TERMINALS)
        self._enabled = enabled
        self._turn = threading.Lock()
        self._trouble = _NOT_YET if enabled else _OFF
        self._over = False

    def begin(self) -> threading.Thread:
        """Begin to count, in a thread, and return at once. Objects that exist already are not counted.

        The first time it takes half a second, or as long as the kernel verifies the programs. The end of the process
        does not wait for it.
        """
        thread = threading.Thread(target=self._begin, name="insula-uncharged", daemon=True)
        thread.start()
        return thread

    def _begin(self) -> None:
        with self._turn:
            try:
                if self._enabled and not self._over:
                    self._guard.ensure()
                if self._over or not self._enabled:  # `restore` may have given up waiting meanwhile
                    self._guard.remove()
                self._trouble = "" if self._enabled else _OFF
            except Exception as error:
                self._trouble = str(error)
                log.warning("memory of sockets and file locks has no bound: %s", error)

    def check(self) -> Check:
        """The check of `insula doctor`."""
        if not self._trouble:
            return Check(
                name="sockets and locks",
                state="ok",
                detail=f"at most {format_size(budget())} and {TERMINALS} terminals a tenant",
            )
        hints = {
            _OFF: "set ebpf_budgets = true in insulad.toml, and restart insulad",
            _NOT_YET: "look again in a minute",
        }
        return Check(
            name="sockets and locks",
            state="degraded",
            detail=self._trouble,
            consequence="nothing bounds their memory, charged to no control group, or terminals with --nesting",
            hint=hints.get(self._trouble, _SUPPORT),
        )

    def restore(self, patience: float = _PATIENCE) -> None:
        """Remove the programs and maps from the kernel. Blocks for up to `patience` seconds. OSError if the kernel
        still verifies the programs then."""
        self._over = True
        if not self._turn.acquire(timeout=patience):
            raise OSError("the kernel is still checking the programs that count sockets and file locks")
        try:
            self._guard.remove()
        finally:
            self._turn.release()
