"""Checks whether a caller may run an instance with a spec, on every path that stores or starts one.

The route has already checked that the caller may run instances in this tenant. Options that make an instance stronger
take permissions of their own. They are checked again when it is started, since another principal may have created it.
"""

from __future__ import annotations

from insula.control.identities.authority import Authority
from insula.model.errors import Denied
from insula.model.objects import ContainerOptions, InstanceSpec


def admit(by: Authority, tenant: str, spec: InstanceSpec) -> None:
    """Raise Denied unless the caller holds the permission for each option of the spec, NotFound as `by.check`."""
    for permission in needed(spec):
        by.check(permission, tenant)
    if by.labels and spec.options.pid_of:
        raise Denied("this token is for some instances only", "leave out the PID namespace of another")
    if missing := {name for name, value in by.labels.items() if spec.labels.get(name) != value}:
        pairs = " ".join(f"--label {name}={by.labels[name]}" for name in sorted(missing))
        raise Denied("this token is only for instances with its labels", f"add {pairs}")


def needed(spec: InstanceSpec) -> list[str]:
    """Return the permissions that the options of a spec take, beside that to run instances."""
    options = spec.options
    if not isinstance(options, ContainerOptions):
        return []
    asked = {
        "instance.capabilities": options.cap_add,
        "instance.nesting": options.nesting,
        "instance.sysctls": options.sysctls,
        "instance.sockets": options.socket_families or options.aio,
    }
    return [permission for permission, value in asked.items() if value]
