"""What the system in a virtual machine says of itself, by the agent of QEMU (qemu-ga)."""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from insula.model.objects import Struct


class ReportedInterface(Struct, kw_only=True):
    """A network device as the system names it, with its addresses and their prefixes."""

    name: str
    mac: str | None = None
    addresses: list[str] = []


class GuestReport(Struct, kw_only=True):
    """The guest's word, which may be anything, and is shortened; `answered` if it has an agent that answers in time. It
    decides nothing: the addresses of an instance are those of its ports."""

    answered: bool
    hostname: str | None = None
    system: str | None = None
    kernel: str | None = None
    interfaces: list[ReportedInterface] = []
