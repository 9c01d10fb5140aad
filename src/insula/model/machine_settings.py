"""`[machines]` of insulad.toml: the hypervisor of virtual machines, and the checks of the values."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_network
from typing import Literal

import msgspec

from insula.model.errors import Invalid

_XEN = "xen:///system"
_ESX = re.compile(r"esx://([A-Za-z0-9._%-]+@)?([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?/(\?[A-Za-z0-9_=&*.-]*)?")


class MachineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[machines]`: the hypervisor, the file with the password of its user, the memory of the machines whose template
    is made in advance, and the addresses of hosts that machines may move to."""

    hypervisor: str = "qemu"
    password_file: str = ""
    template: Literal["128m", "256m", "512m", "1g", "2g", "4g", "8g", "0"] = "256m"
    migration: list[str] = []


def check_machines(machines: MachineSettings, wrong: Callable[..., Invalid]) -> None:
    """Check the values. Raises what `wrong` returns for a key, a value, what is wrong and a hint."""
    name = machines.hypervisor
    if name not in ("qemu", _XEN) and not _ESX.fullmatch(name):
        hint = f"use qemu, {_XEN} or esx://USER@HOST/; a password has a file of its own, machines.password_file"
        raise wrong("machines.hypervisor", name, "is no hypervisor", hint)
    if machines.password_file and not machines.password_file.startswith("/"):
        raise wrong("machines.password_file", machines.password_file, "is not absolute", "write the whole path")
    for each in machines.migration:
        try:
            ip_network(each)
        except ValueError:
            raise wrong(
                "machines.migration", each, "is no address or range", "write 192.0.2.7 or 192.0.2.0/24"
            ) from None
