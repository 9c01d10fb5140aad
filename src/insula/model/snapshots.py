"""Snapshots of instances: their disk, or disk and memory, as they were at one moment; and forks of instances."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from insula.model import fields, rules
from insula.model.objects import Struct


class InstanceSnapshot(Struct, kw_only=True):
    """A snapshot of the instance with the ID `instance`. `id` has 32 hex digits and names its files.

    `size` is what it counts in the tenant's quota of disk: while it is "creating" what it may take, then what its files
    take. `stopped` is for how many seconds the instance stood still.
    """

    tenant: str
    instance: str
    name: str
    id: str
    memory: bool
    state: Literal["creating", "ready"] = "creating"
    size: int
    stopped: float = 0.0
    created: float


class SnapshotSpec(Struct, kw_only=True):
    """The request of `insula snapshot create`. Without a name it gets one."""

    name: fields.OptionalLabel = ""
    memory: bool = False


class SnapshotView(Struct, kw_only=True):
    """A snapshot of an instance, as its tenant sees it."""

    tenant: str
    instance: str
    name: str
    memory: bool
    state: Literal["creating", "ready"]
    size: int
    stopped: float
    created: float


class ForkSpec(Struct, kw_only=True):
    """The request of `insula fork`: how many copies are made of an instance that runs."""

    count: Annotated[int, msgspec.Meta(ge=1, le=rules.MAX_FORKS)] = 1
