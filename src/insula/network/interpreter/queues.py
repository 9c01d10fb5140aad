"""What an interpreter says about queues: the class of traffic control that the packets of each tenant pass."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True)
class InstalledQueues:
    """The classes of what goes between tenants and the host, by (tenant, "out" or "in"), and of packets to other hosts
    and from them, by (VNI, "out" or "in"). A tenant whose packets are not led to a tree is left out."""

    tenants: Mapping[tuple[str, str], PassedClass] = field(default_factory=dict)
    networks: Mapping[tuple[int, str], PassedClass] = field(default_factory=dict)
    unread: set[tuple[str, str]] = field(default_factory=set)
    """Tenants and directions whose filter is not understood."""
