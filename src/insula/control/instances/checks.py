"""Checks of verbs: which desired and observed state of an instance allows them. Pure functions."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from insula.control.instances.managed import ManagedInstance
from insula.control.instances.specs import cli_command
from insula.model.errors import Conflict, Failed, Invalid, NotFound
from insula.model.objects import Instance, InstanceStatus, MachineOptions


class Known(NamedTuple):
    """An instance (its desired state), its revision in the store, and its last status."""

    instance: Instance
    revision: int
    status: InstanceStatus

    @property
    def active(self) -> bool:
        """Whether it runs, starts or stops."""
        return self.status.state in ("starting", "running", "paused", "stopping")


def no_instance(tenant: str, name: str) -> NotFound:
    """Return the error for an instance that does not exist, and for one that the caller may not know of."""
    return NotFound(f"tenant {tenant} has no instance {name}", f"{cli_command(tenant, 'ps -a')} lists them")


Either = Known | ManagedInstance


def check_there(known: Either) -> None:
    """Raise NotFound if the instance is being removed."""
    instance = known.instance
    if instance.wanted == "removed":
        there = cli_command(instance.tenant, "ps -a")
        raise NotFound(f"instance {instance.name} was removed", f"{there} lists what is there")


def check_running(known: Either) -> None:
    """Raise Conflict unless the instance runs and is not paused."""
    if known.status.state == "paused":
        tenant, name = known.instance.tenant, known.instance.name
        raise Conflict(f"instance {name} is paused", f"{cli_command(tenant, f'unpause {name}')} resumes it")
    if known.status.state != "running":
        raise not_running(known)


def check_boots(instance: Instance) -> None:
    """Raise Invalid unless the instance is a virtual machine, which has a kernel to boot."""
    if not isinstance(instance.spec.options, MachineOptions):
        raise Invalid(f"instance {instance.name} is a container, which is not booted", "leave out --cold")


def not_running(known: Either) -> Conflict:
    tenant, name = known.instance.tenant, known.instance.name
    hint = f"{cli_command(tenant, f'start {name}')} starts it"
    return Conflict(f"instance {name} is not running ({known.status.state})", hint)


def still_active(known: Either) -> Conflict:
    return Conflict(f"instance {known.instance.name} is {known.status.state}", "stop it first, or use --force")


def as_it_is(known: Known) -> Instance:
    """The instance with its observed state, running or paused, as desired state. A verb that changes something else
    commits this, so that it neither pauses nor unpauses the instance."""
    instance, state = known.instance, known.status.state
    if instance.wanted in ("running", "paused") and state in ("running", "paused"):
        return msgspec.structs.replace(instance, wanted=state)
    return instance


def undying(managed: ManagedInstance, group: str | None) -> Failed:
    """The error of a first process that is still there after SIGKILL. With cgroup version 1 another program may have
    moved it into a frozen group (cgroups(7), freezer); else it waits in the kernel."""
    pid = managed.status.pid
    what = f"process {pid} of instance {managed.instance.name} does not die of SIGKILL"
    if group is not None:
        return Failed(f"{what}: another process moved it into the frozen group {group}", "thaw that group")
    return Failed(what, f"`cat /proc/{pid}/stack` shows what the kernel waits for")
