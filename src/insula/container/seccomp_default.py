"""The default seccomp profile: which system calls a container has unless told otherwise.

It is Docker's (docs.docker.com/engine/security/seccomp): everything is refused with EPERM but what is listed, and what
is listed depends on the capabilities that the container may have. In `profiles/seccomp.json` each rule says for whom
it is: `with` names a capability, `without` some, `machines` are of uname(1); "nesting" stands for containers that run
containers (nesting.py).

Two rules are ours. Both refuse AF_VSOCK and AF_ALG, as Docker means to:

- Socket families are listed one by one. The kernel takes only the lower half of the argument, but a filter compares
  all of it: "greater than 40" would hold for 2³² + 40, which opens AF_VSOCK.
- socketcall(2), by which 32-bit x86 programs of before 2016 open sockets, is answered with ENOSYS. A filter cannot see
  the family behind it; where Docker leaves that to AppArmor, we have nothing else.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parent / "profiles" / "seccomp.json"


def profile(capabilities: Iterable[str], machine: str | None = None, *, nesting: bool = False) -> dict[str, Any]:
    """The OCI `linux.seccomp` object for a container with this bounding set, as CAP_… names, on this machine."""
    grants = {*capabilities, "nesting"} if nesting else capabilities
    return _profile(frozenset(grants), machine or os.uname().machine)


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
