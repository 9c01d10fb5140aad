"""QEMU as a hypervisor. Its guests are kept by the containers that it runs in (`insula.machine.shim`)."""

from __future__ import annotations

from typing import Final, Literal

from insula.machine import installation


class QemuHypervisor:
    """The QEMU of this host."""

    name: Final = "qemu"
    type: Literal[1, 2] = 2

    def check(self) -> str:
        return installation.check().name

    def close(self) -> None:
        """Do nothing: there is no connection."""
