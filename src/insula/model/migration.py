"""Objects of a move to another host: what two hosts tell each other, and what a client tells both."""

from __future__ import annotations

from typing import Annotated

import msgspec

from insula.model import fields
from insula.model.objects import InstanceSpec, Port, Struct


class MigrationTicket(Struct, kw_only=True):
    """What a host gives out to be sent one instance. `secret` is good once, until `expires` (seconds since the epoch);
    `authority` has the certificates (PEM) of which the host proves itself by one."""

    secret: str
    authority: str
    expires: float


class MigrationTarget(Struct, kw_only=True):
    """Where an instance is to move: `addresses` of a host (HOST:PORT), of which the first that answers is used, and the
    host's ticket."""

    addresses: Annotated[list[fields.HostAddress], fields.at_most(8, least=1)]
    authority: fields.AuthorityPem
    secret: fields.TicketSecret


class MachineFacts(Struct, kw_only=True, omit_defaults=True):
    """What another host has to have for a machine that moves there. `memory` is in MiB, and so are
    `modules`, those that were plugged in, as `plugged` processors beside `cpus` were. `disk` is in bytes,
    `slots` are the places of network devices, in the order of ports, and `further` those of further disks by their
    names; a host that knows of none is not told."""

    qemu: str
    machine: str
    accelerator: str
    processor: str
    memory: int
    cpus: int
    disk: int
    slots: list[int]
    modules: list[int]
    plugged: int
    further: dict[str, int] = msgspec.field(default_factory=dict)


class NetworkFacts(Struct, kw_only=True):
    """What a network of the same name has to have."""

    name: str
    subnet: str
    subnet6: str | None
    gateway: str
    gateway6: str | None
    mtu: int


class MigrationOffer(Struct, kw_only=True):
    """An instance that is about to be sent, with the secret of the ticket."""

    secret: str
    id: str
    spec: InstanceSpec
    image_digest: str
    ports: list[Port]
    networks: list[NetworkFacts]
    machine: MachineFacts


class MigrationQuery(Struct, kw_only=True):
    """The question whether an instance has arrived, with the secret of its ticket."""

    secret: fields.TicketSecret


class MigrationOutcome(Struct, kw_only=True):
    """Whether it has arrived. If not, it never will by that ticket."""

    arrived: bool
