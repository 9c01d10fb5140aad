"""Guarantees: what a tenant or one of its instances always gets, its floor, and what it never gets more than, its
ceiling.

Bandwidth is bits a second of Ethernet frames (wire bytes: headers count), in each direction as the instance sees it:
`out` is sent, `in` is received. CPU and memory are floors only; `Limits` and `Resources` are their ceilings.
"""

from __future__ import annotations

from collections.abc import Mapping

from insula.model import fields
from insula.model.objects import Struct


class Guarantee(Struct, kw_only=True):
    """The guarantee of a tenant as a whole (`instance` is None), or of one of its instances. None promises nothing, and
    limits nothing.

    `ceiling_…` are bits a second, `packets_…` packets a second; an instance's hold for its traffic with other instances
    too. A floor, and a tenant's ceiling, is about traffic that leaves the tenant. `cpus` are CPUs, `memory` bytes.
    `index` is a number unique on this cloud, which an instance's class and address on the host derive from.
    """

    tenant: str
    instance: str | None = None
    index: int | None = None
    out: fields.Bandwidth | None = None
    in_: fields.Bandwidth | None = None
    ceiling_out: fields.Bandwidth | None = None
    ceiling_in: fields.Bandwidth | None = None
    packets_out: fields.PacketRate | None = None
    packets_in: fields.PacketRate | None = None
    cpus: fields.Cpus | None = None
    memory: fields.Memory | None = None
    created: float


class Rate(Struct, kw_only=True):
    """Bandwidth in one direction: `floor` and `ceiling` in bits a second, `packets` in packets a second."""

    floor: int | None = None
    ceiling: int | None = None
    packets: int | None = None


class PortRates(Struct, kw_only=True):
    """The bandwidth of an instance. `number` is unique on this cloud: `Guarantee.index`."""

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
