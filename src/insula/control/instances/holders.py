"""`holder_named`: names the instance whose machine has a file that another one needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from insula.control.instances.drivers.in_use import FileInUse
from insula.control.instances.managed import ManagedInstances
from insula.control.instances.specs import cli_command
from insula.model.errors import Conflict


@contextmanager
def holder_named(managed: ManagedInstances, tenant: str) -> Iterator[None]:
    """Name the holder of a file that the body finds in use, if it is of the same tenant. Of others a tenant learns
    neither names nor IDs."""
    try:
        yield
    except FileInUse as error:
        holder = managed.with_id(error.holder)
        if holder is None or holder.instance.tenant != tenant:
            raise
        name = holder.instance.name
        hint = f"first {cli_command(tenant, f'stop {name}')}: two machines would damage the disk"
        raise Conflict(f"{error.file} is in use by instance {name}", hint) from None
