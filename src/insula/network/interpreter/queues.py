"""What an interpreter says about queues: the class of traffic control that the packets of each tenant pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class PassedClass(NamedTuple):
    """The class below the root of a device's tree that packets pass, with its rates in bits a second. `number` 0: they
    pass no class, and have neither floor nor ceiling."""

    device: str
    number: int
    floor: int = 0
    ceiling: int = 0

    @property
    def name(self) -> str:
        return f"class {self.number >> 16:x}:{self.number & 0xFFFF:x} of {self.device}" if self.number else "no class"


class InstanceClass(NamedTuple):
    """The class below the root that packets of an instance pass, and the last one, in which they wait."""

    top: PassedClass
    leaf: PassedClass


@dataclass(frozen=True)
class InstalledQueues:
    """The classes of what goes between tenants and the host, by (tenant, "out" or "in"), and all of packets to other
    hosts and from them, by (VNI, "out" or "in"). A tenant whose packets are not led to a tree is left out.

    `instances` are the classes of packets of instances with floors, by (tenant, number of the guarantee, "out" or
    "in"): the class below the root, and the one that they wait in, one for each version of IP. `rests` are the classes
    that packets of other instances wait in."""

    tenants: Mapping[tuple[str, str], PassedClass] = field(default_factory=dict)
    networks: Mapping[tuple[int, str], Sequence[PassedClass]] = field(default_factory=dict)
    instances: Mapping[tuple[str, int, str], Sequence[InstanceClass]] = field(default_factory=dict)
    rests: Mapping[tuple[str, str], PassedClass] = field(default_factory=dict)
    unread: set[tuple[str, str]] = field(default_factory=set)
    """Tenants and directions whose filter is not understood."""
