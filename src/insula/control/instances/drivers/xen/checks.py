"""What `insula doctor` says of a host whose virtual machines are guests of Xen."""

from __future__ import annotations

from typing import Final

from insula.machine.installation import check
from insula.machine.kept import PROGRAMS_OF_XEN
from insula.model.errors import Unavailable
from insula.model.views import Check

BOUNDARY: Final = "Xen gives them, a hypervisor of type 1: the guest is para-virtualized (PV), and Xen keeps it in"


def examine(name: str) -> Check:
    """Check that there is what guests need beside the hypervisor."""
    try:
        kernel = check(PROGRAMS_OF_XEN)
    except Unavailable as error:
        lost = "`insula run --vm` is refused"
        return Check(name=name, state="degraded", detail=error.message, consequence=lost, hint=error.hint)
    return Check(name=name, state="ok", detail=f"processors: {BOUNDARY}; each is booted; {kernel.name}")
