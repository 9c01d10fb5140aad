"""Guarantees: what a tenant or one of its instances always gets, its floor, and what it never gets more than, its
ceiling.

Bandwidth is bits a second of Ethernet frames (wire bytes: headers count), in each direction as the instance sees it:
`out` is sent, `in` is received. CPU and memory are floors only; `Limits` and `Resources` are their ceilings.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import UNSET, UnsetType

from insula.model import fields
from insula.model.objects import Struct

FLOORS = ("floor_out", "floor_in", "cpus", "memory")
"""The fields that are admitted, so that their sum is never more than what there is."""
VALUES = (*FLOORS, "ceiling_out", "ceiling_in", "packets_out", "packets_in")
"""All fields that can be set."""


class Guarantee(Struct, kw_only=True):
    """The guarantee of a tenant as a whole (`instance` is None), or of one of its instances, by its ID. None promises
    nothing, and limits nothing.

    `ceiling_…` are bits a second, `packets_…` packets a second; an instance's hold for its traffic with other instances
    too. A floor, and a tenant's ceiling, is about traffic that leaves the tenant. `cpus` are CPUs, `memory` bytes.
    `number` is that of an instance's guarantee, unique on this cloud: its class and its addresses on the host derive
    from it.
    """

    tenant: str
    instance: str | None = None
    number: int | None = None
    floor_out: int | None = None
    floor_in: int | None = None
    ceiling_out: int | None = None
    ceiling_in: int | None = None
    packets_out: int | None = None
    packets_in: int | None = None
    cpus: float | None = None
    memory: int | None = None
    created: float


class FloorGuard(Struct, kw_only=True):
    """The guard of all floors: every transaction that changes a guarantee changes it, so that two of them can't
    both take the last part of what there is."""

    changes: int = 0


class GuaranteePatch(Struct, kw_only=True):
    """Changes of a guarantee, as a JSON merge patch (RFC 7396): absent fields stay, null is no floor or ceiling."""

    floor_out: fields.Bandwidth | UnsetType | None = UNSET
    floor_in: fields.Bandwidth | UnsetType | None = UNSET
    ceiling_out: fields.Bandwidth | UnsetType | None = UNSET
    ceiling_in: fields.Bandwidth | UnsetType | None = UNSET
    packets_out: fields.PacketRate | UnsetType | None = UNSET
    packets_in: fields.PacketRate | UnsetType | None = UNSET
    cpus: fields.Cpus | UnsetType | None = UNSET
    memory: fields.Memory | UnsetType | None = UNSET


class GuaranteeSpec(Struct, kw_only=True):
    """Floors and ceilings as they are declared; null is none."""

    floor_out: fields.Bandwidth | None = None
    floor_in: fields.Bandwidth | None = None
    ceiling_out: fields.Bandwidth | None = None
    ceiling_in: fields.Bandwidth | None = None
    packets_out: fields.PacketRate | None = None
    packets_in: fields.PacketRate | None = None
    cpus: fields.Cpus | None = None
    memory: fields.Memory | None = None


class GuaranteeView(Struct, kw_only=True):
    """A guarantee, with the name of the instance; None for that of the tenant as a whole."""

    tenant: str
    instance: str | None = None
    floor_out: int | None = None
    floor_in: int | None = None
    ceiling_out: int | None = None
    ceiling_in: int | None = None
    packets_out: int | None = None
    packets_in: int | None = None
    cpus: float | None = None
    memory: int | None = None
    created: float


class InstanceFloors(Struct, kw_only=True):
    """The CPUs and the memory (bytes) that an instance is promised."""

    cpus: float | None = None
    memory: int | None = None


class Floors(Struct, kw_only=True):
    """The CPUs and the memory that a tenant is promised on one host, and its instances by their IDs: all of this host.
    `shared`: some tenant is promised CPUs. `all_memory` is what all tenants together are promised."""

    cpus: float | None = None
    memory: int | None = None
    shared: bool = False
    all_memory: int = 0
    instances: Mapping[str, InstanceFloors] = {}


class Rate(Struct, kw_only=True):
    """Bandwidth in one direction: `floor` and `ceiling` in bits a second, `packets` in packets a second."""

    floor: int | None = None
    ceiling: int | None = None
    packets: int | None = None


class PortRates(Struct, kw_only=True):
    """The bandwidth of an instance. `number` is unique on this cloud: `Guarantee.number`."""

    number: int
    out: Rate = Rate()
    in_: Rate = Rate()


class Shaping(Struct, kw_only=True):
    """The bandwidth of a tenant on one host, for a fabric.

    `link` is the bandwidth in bits a second that tenants of this host share in each direction; None if there is no
    floor on this host, so that only ceilings count. `ports` are the rates of instances, by the index of their port.
    """

    link: int | None = None
    out: Rate = Rate()
    in_: Rate = Rate()
    ports: Mapping[int, PortRates] = {}
