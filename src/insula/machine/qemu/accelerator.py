"""How the processors of machines are made: by the processor of the host (KVM), or by QEMU, which translates (TCG).

That there is a /dev/kvm says little: a host that is a virtual machine itself may have one with which nothing starts. So
a template is made with KVM, from the command line of all machines. If its agent answers within `PATIENCE` seconds, all
machines use KVM, else TCG, with the last error that QEMU has written as the reason. The choice is a record, which is
kept for one boot of the host, one QEMU, one kernel of guests, and one processor.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final, NamedTuple

from insula.kernel import records
from insula.machine.qemu import template
from insula.machine.qemu.command_line import AcceleratorName
from insula.machine.shim.qmp import QmpError
from insula.model.cpython import dumps, loads

DEVICE: Final = "/dev/kvm"
PATIENCE: Final = 2.0
_MEMORY: Final = 128


class Accelerator(NamedTuple):
    """An accelerator of QEMU, and why it is the one."""

    name: AcceleratorName
    reason: str


def choose(kernel: str, initramfs: str, record: Path) -> Accelerator:
    """Return the choice that is recorded; else try KVM, for `PATIENCE` seconds at most, and record it."""
    if found := known(record):
        return found
    failure = attempt(kernel, initramfs)
    found = Accelerator("tcg", failure) if failure else Accelerator("kvm", "a machine has started with it")
    with contextlib.suppress(OSError):  # it is tried again
        records.replace(record, dumps({**found._asdict(), "processor": _processor()}).encode())
    return found


def known(record: Path) -> Accelerator | None:
    """Return the choice that is recorded for this processor; None if there is none."""
    try:
        words = loads(records.read(record))
        if words["processor"] == _processor() and words["name"] in ("kvm", "tcg"):
            return Accelerator(words["name"], str(words["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def attempt(kernel: str, initramfs: str) -> str:
    """Why no machine can be started with KVM; empty if one can."""
    if not os.path.exists(DEVICE):
        return f"this host has no {DEVICE}"
    try:
        memory, state = template.make(kernel, initramfs, _MEMORY, accelerator="kvm", patience=PATIENCE)
    except (OSError, QmpError) as error:
        return f"with KVM {error}"
    os.close(memory)
    os.close(state)
    return ""


def _processor() -> str:
    """The host's processor, as /proc/cpuinfo names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""
