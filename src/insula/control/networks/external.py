"""Ports of external addresses belong to one user each: an instance that publishes them, or the host itself.

A *claim* is an entry of the store for a range of ports of one protocol and one address, or of all the host's addresses.
Claims may not overlap, and a store can't compare ranges. So whoever adds claims also rewrites one common entry, the
guard, and compares its revision: of two that add claims at the same time, one reads the claims again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence
from ipaddress import ip_address
from itertools import combinations
from typing import NamedTuple

from insula.control.context import Context
from insula.control.keys import EXTERNAL, INSTANCES
from insula.model.errors import Conflict, Invalid
from insula.model.external import ExternalClaim
from insula.model.objects import Instance, PublishedPort
from insula.store.protocol import Compare, Put, Write

GUARD = "/external-guard"
_EVERY = "*"  # every address of the host, in keys
_HINT = "choose another port, or another address"


class ClaimPlan(NamedTuple):
    """The part of a transaction that changes claims."""

    compares: Sequence[Compare] = ()
    writes: Sequence[Write] = ()


class ClaimedRange(NamedTuple):
    """A range of ports, as in the key of a claim. `address` None is every address of the host."""

    protocol: str
    first: int
    last: int
    address: str | None

    @property
    def parts(self) -> tuple[str, str, str]:
        """The parts of its key."""
        return self.protocol, f"{self.first}-{self.last}", self.address or _EVERY

    def __str__(self) -> str:
        ports = f"port {self.first}" if self.first == self.last else f"ports {self.first}-{self.last}"
        return f"{ports}/{self.protocol} of {self.address or 'the host'}"

    def overlaps(self, other: ClaimedRange) -> bool:
        """Whether a packet could be for both. The host's address None is each of its IPv4 and IPv6 addresses."""
        if self.protocol != other.protocol or self.first > other.last or other.first > self.last:
            return False
        return None in (self.address, other.address) or self.address == other.address


def claimed(published: PublishedPort) -> ClaimedRange:
    """The range of ports that a published port claims."""
    return ClaimedRange(published.protocol, published.port, published.last, published.address)


class External:
    """The claims of all tenants."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def plan(
        self, owner: ExternalClaim, wanted: Sequence[PublishedPort], before: Sequence[PublishedPort] = ()
    ) -> ClaimPlan:
        """Return the part of a transaction that claims what is wanted instead of what the owner had. Nothing changes
        yet. Invalid, Conflict."""
        new = [claimed(each) for each in wanted if each not in before]
        old = {claimed(each).parts for each in before if each not in wanted}
        released = [EXTERNAL.delete(*parts) for parts in old]
        if not new:
            return ClaimPlan((), released)
        for one, other in combinations([claimed(each) for each in wanted], 2):
            if one.overlaps(other):
                raise Invalid(f"{one} is given twice", "publish each port once")
        guard = await self.context.store.get(GUARD)
        await self._check_free(owner, new, old)
        await self._check_host(new)
        return ClaimPlan(
            [Compare(GUARD, guard.revision if guard else 0)],
            [*released, *(EXTERNAL.put(owner, *each.parts) for each in new), Put(GUARD, b"")],
        )

    async def _check_free(
        self, owner: ExternalClaim, new: Sequence[ClaimedRange], released: Container[tuple[str, ...]]
    ) -> None:
        for entry in (await self.context.store.list(EXTERNAL.prefix_all())).entries:
            parts = EXTERNAL.parts(entry.key)
            if parts in released:
                continue
            taken = _range(parts)
            for each in new:
                if each.overlaps(taken):
                    raise await self._conflict(each, owner, EXTERNAL.decode(entry))

    async def _conflict(self, wanted: ClaimedRange, owner: ExternalClaim, user: ExternalClaim) -> Conflict:
        """Name the user of a port, unless it is of another tenant."""
        if user.tenant != owner.tenant:
            return Conflict(f"{wanted} is in use", _HINT)
        instances = await INSTANCES.readable(self.context.store, user.tenant)
        name = next((each.name for each in instances if each.id == user.id), user.name)
        return Conflict(f"{wanted} is in use by {user.kind} {name}", _HINT)

    async def _check_host(self, new: Sequence[ClaimedRange]) -> None:
        """Check that the addresses are the host's, and that no program of the host listens there."""
        view = await asyncio.to_thread(self.context.fabric.outside_view)
        for each in new:
            if each.address and each.address not in view.addresses and not ip_address(each.address).is_loopback:
                some = ", ".join(view.addresses[:3])
                raise Invalid(f"{each.address} is no address of this host", f"use one of its own: {some}, 127.0.0.1")
            for service in view.services:
                if each.overlaps(ClaimedRange(service.protocol, service.port, service.port, service.address)):
                    raise Conflict(f"{each} is in use by the host itself", _HINT)


def _range(parts: tuple[str, ...]) -> ClaimedRange:
    first, _, last = parts[1].partition("-")
    return ClaimedRange(parts[0], int(first), int(last), None if parts[2] == _EVERY else parts[2])


def owner_of(instance: Instance) -> ExternalClaim:
    """The claim of an instance."""
    return ExternalClaim(tenant=instance.tenant, kind="instance", name=instance.name, id=instance.id)


def released(instance: Instance) -> Sequence[Write]:
    """The writes that release all that an instance claims."""
    return [EXTERNAL.delete(*claimed(each).parts) for each in instance.spec.published]
