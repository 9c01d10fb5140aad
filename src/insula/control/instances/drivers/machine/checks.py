"""What `insula doctor` says of virtual machines."""

from __future__ import annotations

from insula.machine import installation
from insula.model.errors import Unavailable
from insula.model.views import Check

_NAME = "virtual machines"


def examine() -> Check:
    """Check that there is what virtual machines need, and say how their processors are made."""
    try:
        kernel = installation.check()
    except Unavailable as error:
        lost = "`insula run --vm` is refused"
        return Check(name=_NAME, state="degraded", detail=error.message, consequence=lost, hint=error.hint)
    how = "QEMU emulates their processors (TCG), since KVM is not used yet"
    return Check(name=_NAME, state="ok", detail=f"{how}; {kernel.name}")
