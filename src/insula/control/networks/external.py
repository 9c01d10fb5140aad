"""Ports of external addresses belong to one user each: an instance that publishes them, or the host itself.

A *claim* is an entry of the store for a range of ports of one protocol and one address, or of all the host's addresses.
A floating address is none of the host's. Claims may not overlap, and a store can't compare ranges. So whoever adds
claims also rewrites one common entry, the guard, and compares its revision: of two that add claims at the same time,
one reads the claims again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable, Mapping, Sequence
from ipaddress import ip_address
from itertools import combinations
from typing import NamedTuple

from insula.control.context import Context
from insula.control.keys import EXTERNAL, FLOATING_IPS, INSTANCES
from insula.model.errors import Conflict, Invalid
from insula.model.external import ExternalClaim
from insula.model.floating_ips import FloatingIp
from insula.model.objects import Instance, PublishedPort
from insula.model.rules import MAX_PORT
from insula.store.protocol import Compare, Put, Write
from insula.store.typed import Found

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

    def overlaps(self, other: ClaimedRange, floating: Container[str | None] = ()) -> bool:
        """Whether a packet could be for both. The host's address None is each of its IPv4 and IPv6 addresses, but none
        of the `floating` ones."""
        if self.protocol != other.protocol or self.first > other.last or other.first > self.last:
            return False
        if self.address == other.address:
            return True
        named = self.address if other.address is None else other.address
        return None in (self.address, other.address) and named not in floating


def claimed(published: PublishedPort) -> ClaimedRange:
    """The range of ports that a published port claims."""
    return ClaimedRange(published.protocol, published.port, published.last, published.address)


def all_ports(address: str) -> Sequence[ClaimedRange]:
    """All ports of an address."""
    return [ClaimedRange(protocol, 1, MAX_PORT, address) for protocol in ("tcp", "udp")]


class External:
    """The claims of all tenants."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def plan(
        self, owner: ExternalClaim, wanted: Sequence[ClaimedRange], before: Sequence[ClaimedRange] = ()
    ) -> ClaimPlan:
        """Return the part of a transaction that claims what is wanted instead of what the owner had. Nothing changes
        yet. Invalid, Conflict."""
        new = [each for each in wanted if each not in before]
        old = {each.parts for each in before if each not in wanted}
        released = [EXTERNAL.delete(*parts) for parts in old]
        if not new:
            return ClaimPlan((), released)
        guard = await self.context.store.get(GUARD)
        floating = await self._floating()
        for one, other in combinations(wanted, 2):
            if one.overlaps(other, floating):
                raise Invalid(f"{one} is given twice", "publish each port once")
        await self._check_host(owner, new, floating)
        await self._check_free(owner, new, old, floating)
        used = {each.address: floating[each.address] for each in new if each.address in floating}
        return ClaimPlan(
            [
                Compare(GUARD, guard.revision if guard else 0),
                *(FLOATING_IPS.unchanged(each, each.value.tenant, each.value.name) for each in used.values()),
            ],
            [*released, *(EXTERNAL.put(owner, *each.parts) for each in new), Put(GUARD, b"")],
        )

    async def users(self, address: str) -> Sequence[ExternalClaim]:
        """The claims of ports of an address."""
        entries = (await self.context.store.list(EXTERNAL.prefix_all())).entries
        return [EXTERNAL.decode(entry) for entry in entries if EXTERNAL.parts(entry.key)[2] == address]

    async def guard(self) -> Compare:
        """The comparison for a transaction that is to fail if something is claimed meanwhile."""
        guard = await self.context.store.get(GUARD)
        return Compare(GUARD, guard.revision if guard else 0)

    async def _floating(self) -> Mapping[str | None, Found[FloatingIp]]:
        entries = (await self.context.store.list(FLOATING_IPS.prefix_all())).entries
        return {each.value.address: each for each in FLOATING_IPS.sort_out(entries)[0]}

    async def _check_free(
        self,
        owner: ExternalClaim,
        new: Sequence[ClaimedRange],
        released: Container[tuple[str, ...]],
        floating: Container[str | None],
    ) -> None:
        for entry in (await self.context.store.list(EXTERNAL.prefix_all())).entries:
            parts = EXTERNAL.parts(entry.key)
            if parts in released:
                continue
            taken = _range(parts)
            for each in new:
                if each.overlaps(taken, floating):
                    raise await self._conflict(each, owner, EXTERNAL.decode(entry))

    async def _conflict(self, wanted: ClaimedRange, owner: ExternalClaim, user: ExternalClaim) -> Conflict:
        """Name the user of a port, unless it is of another tenant."""
        if user.tenant != owner.tenant:
            return Conflict(f"{wanted} is in use", _HINT)
        instances = await INSTANCES.readable(self.context.store, user.tenant) if user.kind == "instance" else ()
        name = next((each.name for each in instances if each.id == user.id), user.name)
        return Conflict(f"{wanted} is in use by {user.kind} {name}", _HINT)

    async def _check_host(
        self, owner: ExternalClaim, new: Sequence[ClaimedRange], floating: Mapping[str | None, Found[FloatingIp]]
    ) -> None:
        """Check that the addresses are the host's, where no program of the host listens, or floating ones of the
        tenant."""
        view = await asyncio.to_thread(self.context.fabric.outside_view)
        for each in new:
            found = floating.get(each.address)
            if found and found.value.tenant == owner.tenant:
                continue
            if each.address and each.address not in view.addresses and not ip_address(each.address).is_loopback:
                some = ", ".join(view.addresses[:3])
                what = f"{each.address} is no address of this host, and no floating one of tenant {owner.tenant}"
                raise Invalid(what, f"use one of {some}, 127.0.0.1, or `insula floating-ip allocate`")
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
    return [EXTERNAL.delete(*each.parts) for each in claims_of(instance.spec.published)]


def claims_of(published: Iterable[PublishedPort]) -> list[ClaimedRange]:
    """The ranges that published ports claim."""
    return [claimed(each) for each in published]
