"""The memory of a machine that stands still, with the state of its devices and processors: QEMU's migration stream,
which is split as it comes (stream.py). A machine that goes on from it is a copy, as those of a template are.
"""

from __future__ import annotations

from insula.machine.qemu.state import CAPABILITIES
from insula.machine.shim.qmp import Qmp, QmpError

_RATE = 10**11
"""Bytes a second: QEMU's own limit is for networks."""


def begin_to_save(qmp: Qmp, target: int) -> None:
    """Begin to write the memory to a descriptor, of which QEMU gets a copy that it closes at the end; `saved` tells
    when that is. QmpError."""
    qmp.execute("migrate-set-capabilities", capabilities=CAPABILITIES)  # a copy has to have the same
    qmp.execute("migrate-set-parameters", **{"max-bandwidth": _RATE})
    qmp.give("snapshot", target)
    qmp.execute("migrate", uri="fd:snapshot")


def saved(qmp: Qmp) -> bool:
    """Whether the memory is written. QmpError if it can't be."""
    found = qmp.execute("query-migrate")
    if found.get("status") in ("failed", "cancelled"):
        raise QmpError(f"the memory can't be written: {found.get('error-desc') or found['status']}")
    return bool(found.get("status") == "completed")


def describe(qmp: Qmp) -> dict[str, str]:
    """The version of QEMU, and the type of machine with its own version: the same is needed to load the memory, also
    after an upgrade (as pc-q35-7.2, of which q35 is another name today)."""
    version = qmp.execute("query-version")["qemu"]
    kind = str(qmp.execute("qom-get", path="/machine", property="type"))
    return {
        "qemu": ".".join(str(version[part]) for part in ("major", "minor", "micro")),
        "machine": kind.removesuffix("-machine"),
    }
