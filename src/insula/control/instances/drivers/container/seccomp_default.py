"""The default seccomp profile of containers.

It follows Docker's (docs.docker.com/engine/security/seccomp): system calls that are not listed are refused with EPERM,
and the list depends on the container's bounding set of capabilities. In `profiles/seccomp.json` each rule says where it
applies: `with` names a capability or another grant, `without` excludes some, `machines` are as uname(1) prints them.
Grants that are no capabilities are "nesting" for containers that run containers (nesting.py), "aio", and socket
families (`FAMILIES`).

It is stricter than Docker's where a call reaches a table that the whole host shares, or reveals other tenants:

- Socket families are UNIX, INET, INET6 and NETLINK; an option opens more. Packet rings of AF_PACKET and AF_XDP are not
  charged to a control group, and most families are modules that the kernel loads when a socket of theirs is opened.
  So are some protocols of netlink, which are refused too. socketpair(2) opens the same families as socket(2).
- Classic BPF filters cannot be attached to sockets, unless AF_PACKET is opened, which needs them; nor can keys of TCP
  and IPv6 flow labels, without CAP_NET_ADMIN.
- io_setup(2) and mincore(2) fail with ENOSYS; "aio" allows the first.
- socketcall(2), by which 32-bit x86 programs from before 2016 open sockets, fails with ENOSYS. A filter cannot see its
  socket family. Docker leaves that to AppArmor, which Insula does not use.

The kernel takes only the lower half of these arguments, but a filter compares all of it. Rules that allow compare for
equality, and rules that refuse mask the upper half out, so that 2³² + 40 is not another family than 40.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from insula.model.errors import Invalid
from insula.model.rules import SOCKET_FAMILIES
from insula.model.units import shorten

_FILE = Path(__file__).parent / "profiles" / "seccomp.json"

FAMILIES: Final = SOCKET_FAMILIES
"""Socket families that can be opened to a container, address_families(7) without AF_ and in lower case. Each belongs to
a network namespace. AF_VSOCK, which leads to the hypervisor, and AF_ALG are not among them."""


def profile(
    capabilities: Iterable[str],
    machine: str | None = None,
    *,
    nesting: bool = False,
    aio: bool = False,
    families: Iterable[str] = (),
) -> dict[str, Any]:
    """The OCI `linux.seccomp` object for a container with this bounding set, as CAP_… names, on this machine.

    `families` are of `FAMILIES`, or `Invalid`.
    """
    grants = {*capabilities, *(_grant(family) for family in families)}
    grants |= {name for name, given in (("nesting", nesting), ("aio", aio)) if given}
    return _profile(frozenset(grants), machine or os.uname().machine)


def _grant(family: str) -> str:
    if family not in FAMILIES:
        raise Invalid(f"socket family {shorten(family)} can't be opened", f"use {', '.join(FAMILIES)}")
    return f"AF_{family.upper()}"


@functools.cache
def _profile(grants: frozenset[str], machine: str) -> dict[str, Any]:
    source = json.loads(_FILE.read_text())
    return {
        "defaultAction": source["defaultAction"],
        "defaultErrnoRet": source["defaultErrnoRet"],
        "architectures": source["architectures"].get(machine, []),
        "syscalls": [
            {
                "action": "SCMP_ACT_ALLOW",
                **{k: v for k, v in rule.items() if k in ("names", "action", "errnoRet", "args")},
            }
            for rule in source["rules"]
            if rule.get("with") in (None, *grants)
            and grants.isdisjoint(rule.get("without", ()))
            and machine in rule.get("machines", (machine,))
        ],
    }
