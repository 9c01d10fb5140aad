"""`Migrating`: instances that move to other hosts while they run.

A client asks the destination for a ticket, and gives it to the source, which connects to the destination and sends the
instance. The destination checks and reserves everything in its own store before anything moves, by the rights of who
asked for the ticket.

Two hosts have no store in common, so one of them decides: the destination. Its record of the instance says that it is
not its own yet, until the source has given it away. The source records that it gives it away before it says so. If it
hears nothing after that, it asks whether the instance has arrived. A destination that says no never takes it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from insula.control.identities.admission import admit
from insula.control.identities.authority import Authority
from insula.control.instances.checks import Known, check_running, check_there
from insula.control.instances.drivers.base import migrations_of
from insula.control.instances.drivers.migration import HostLink, Unsettled
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.migration_link import PATH, HttpsLink
from insula.control.instances.snapshots import Snapshots
from insula.control.instances.statuses import error_of
from insula.control.keys import INSTANCES, NETWORKS, SNAPSHOTS
from insula.model.errors import Conflict, Denied, Failed, InsulaError, NotFound, TooManyRequests
from insula.model.migration import (
    MigrationOffer,
    MigrationOutcome,
    MigrationQuery,
    MigrationTarget,
    MigrationTicket,
    NetworkFacts,
)
from insula.model.objects import Instance, InstanceStatus, Network, NetworkAttachment, disks_of
from insula.store.typed import Found

T = TypeVar("T")
VALID: Final = 120.0
"""Seconds that a ticket is good for."""
_MOST_TICKETS: Final = 64  # of one tenant
_START: Final = 60.0
_AGAIN, _MOST_AGAIN = 0.5, 60.0
_ATTEMPTS: Final = 6
OUTCOME: Final = f"{PATH}/outcome"


class _Ticket(NamedTuple):
    tenant: str
    by: Authority
    expires: float


class _Arrival:
    """An instance that is being received. Under the lock it becomes this host's, or never will."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.refused = self.owned = False


class Migrating:
    def __init__(self, snapshots: Snapshots) -> None:
        self.context = snapshots.context
        self.instances = snapshots.instances
        self.snapshots = snapshots
        self._tickets: dict[str, _Ticket] = {}
        self._arrivals: dict[str, _Arrival] = {}

    # -- the source ------------------------------------------------------------------------------------------------

    async def migrate(self, tenant: str, name: str, target: MigrationTarget) -> None:
        """Move an instance that runs to another host. It goes on here if that fails. Conflict, Denied, Unavailable,
        Failed; only if the connection was lost at the very end it is not known yet, and is asked again."""
        await self.snapshots.whole(self._migrate(tenant, name, target))

    async def _migrate(self, tenant: str, name: str, target: MigrationTarget) -> None:
        self.context.refuse_if_going_down()
        managed = await self.instances.find(tenant, name)
        files = migrations_of(self.context.driver(managed.instance))
        async with self.snapshots.locks[managed.instance.id]:
            check_there(managed)
            check_running(managed)
            await self._check_movable(managed.instance)
            offer = await self._offer(managed.instance, target.secret)
            link = await HttpsLink.open(target, self.context.settings.machines.migration, offer)
            try:
                await files.leave(managed.instance, target, link)
            except Unsettled:
                gone = await self._outcome(target, _ATTEMPTS)
            else:
                gone = True
            finally:
                await link.close()
            if gone is None:
                self.instances.controller.nudge(managed)
                self._go_on_asking(managed, target)
                what = f"the connection was lost when {name} was handed over; it stands still"
                raise Failed(what, "it is asked again and again whether it has arrived; `insula ps` shows it then")
            await self._settle(managed, gone=gone)
            if not gone:
                raise Failed(f"instance {name} did not arrive, and goes on here", "try again")

    async def _check_movable(self, instance: Instance) -> None:
        snapshots = await SNAPSHOTS.readable(self.context.store, instance.tenant, instance.id)
        if snapshots:
            raise Conflict(f"instance {instance.name} has snapshots, which can't move", "remove them first")

    async def _offer(self, instance: Instance, secret: str) -> MigrationOffer:
        files = migrations_of(self.context.driver(instance))
        networks = []
        for port in instance.plugged:
            found = await NETWORKS.get(self.context.store, instance.tenant, port.network)
            if found is None:
                raise NotFound(f"there is no network {port.network}", "`insula network ls` lists them")
            networks.append(_facts(found.value))
        return MigrationOffer(
            secret=secret,
            id=instance.id,
            spec=instance.spec,
            image_digest=instance.image_digest,
            ports=instance.plugged,
            networks=networks,
            machine=await files.facts(instance),
        )

    async def _outcome(self, target: MigrationTarget, attempts: int) -> bool | None:
        """Whether an instance that was given away has arrived; None if the other host does not answer."""
        pause = _AGAIN
        for _ in range(attempts):
            try:
                question = MigrationQuery(secret=target.secret)
                said = await HttpsLink.ask(target, self.context.settings.machines.migration, OUTCOME, question)
                return msgspec.json.decode(said, type=MigrationOutcome).arrived
            except (InsulaError, OSError, msgspec.MsgspecError):
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MOST_AGAIN)
        return None

    async def _settle(self, managed: ManagedInstance, *, gone: bool) -> None:
        """Remove an instance that runs at another host now; else it goes on here."""
        files = migrations_of(self.context.driver(managed.instance))
        if not gone:
            await files.settle(managed.instance.id, gone=False)
            return
        async with managed.lock:  # its restart policy must not start it again
            await files.settle(managed.instance.id, gone=True)
            found = await self.instances.commit(*managed.key, self._removed)
        if found:
            await self.instances.converged(found)

    async def _removed(self, known: Known) -> Found[Instance]:
        return await self._committed(known, wanted="removed")

    async def _committed(self, known: Known, **changes: Any) -> Found[Instance]:
        instance = known.instance
        changed = msgspec.structs.replace(instance, generation=instance.generation + 1, **changes)
        put = INSTANCES.put(changed, instance.tenant, instance.name)
        return Found(changed, await self.context.store.put(put.key, put.value, expect=known.revision))

    def _go_on_asking(self, managed: ManagedInstance, target: MigrationTarget) -> None:
        problem = f"move of {managed.label}"
        self.context.problems[problem] = f"it was given to {target.addresses[0]}, which does not tell whether it has it"

        async def ask() -> None:
            while not managed.gone:
                if (gone := await self._outcome(target, 1)) is not None:
                    await self._settle(managed, gone=gone)
                    break
                await asyncio.sleep(_AGAIN)
            self.context.problems.solved(problem)

        self.snapshots.spawn(ask())

    # -- the destination -------------------------------------------------------------------------------------------

    async def ticket(self, tenant: str, authority: str, *, by: Authority) -> MigrationTicket:
        """A ticket for one instance of the tenant, which is made by the rights of `by`. NotFound, TooManyRequests."""
        await self.instances.tenants.find(tenant)
        now = time.time()
        self._tickets = {key: each for key, each in self._tickets.items() if each.expires > now}
        if sum(each.tenant == tenant for each in self._tickets.values()) >= _MOST_TICKETS:
            raise TooManyRequests("there are too many tickets that were not used", f"wait {VALID:g} s")
        secret = secrets.token_urlsafe(32)
        self._tickets[_hash(secret)] = _Ticket(tenant, by, now + VALID)
        return MigrationTicket(secret=secret, authority=authority, expires=now + VALID)

    async def receive(self, offer: MigrationOffer, link: HostLink) -> None:
        """Receive the instance that a ticket was given out for. Denied; what `run` raises; Failed."""
        await self.snapshots.whole(self._receive(offer, link))

    async def _receive(self, offer: MigrationOffer, link: HostLink) -> None:
        self.context.refuse_if_going_down()
        key = _hash(offer.secret)
        ticket = self._tickets.pop(key, None)
        if ticket is None or ticket.expires < time.time():
            raise Denied("the ticket is not valid", "it is good once, for some minutes; get another one")
        arrival = self._arrivals[key] = _Arrival()
        try:
            managed = await self._admitted(ticket, offer, key)
            await self._received(managed, offer, link, arrival)
        finally:
            del self._arrivals[key]

    async def _admitted(self, ticket: _Ticket, offer: MigrationOffer, key: str) -> ManagedInstance:
        """Commit the instance, with all that it has, as one that is not this host's yet."""
        spec = _with_addresses(offer)
        admit(ticket.by, ticket.tenant, spec)
        files = migrations_of(self.context.driver_for(spec))
        await files.check(offer.machine)
        if offer.machine.further.keys() != {each.name for each in disks_of(spec)}:
            raise Conflict("the machine has other disks than its spec says", "try again")
        for wanted in offer.networks:
            found = await NETWORKS.get(self.context.store, ticket.tenant, wanted.name)
            if found is None or _facts(found.value) != wanted:
                what = f"the other host has no network {wanted.name} of {wanted.subnet} with the same settings"
                raise Conflict(what, "make one there: subnets, gateways and MTU have to be the same")
        admitted = await self.instances.admission.admit_arrival(
            ticket.by,
            ticket.tenant,
            spec,
            offer.id,
            offer.image_digest,
            key,
            admitting=self.instances.controller.admitting,
        )
        status = InstanceStatus(state="created", starts=admitted.instance.starts)
        return ManagedInstance(admitted.tenant, admitted.instance, status, admitted.revision)

    async def _received(
        self, managed: ManagedInstance, offer: MigrationOffer, link: HostLink, arrival: _Arrival
    ) -> None:
        instance = managed.instance
        files = migrations_of(self.context.driver(instance))
        files.expect(instance.id, offer.machine)
        try:
            self.instances.controller.create(managed)
            await _launched(managed)
            await files.arrive(instance, link, partial(self._own, managed, arrival))
        except BaseException:
            if not arrival.owned:
                arrival.refused = True
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(files.disown, instance.id)
                await asyncio.shield(self.snapshots.spawn(self._remove(managed)))
            raise
        finally:
            files.expect(instance.id, None)
        self.instances.controller.recorder.record(managed, "migrated")

    async def _own(self, managed: ManagedInstance, arrival: _Arrival) -> None:
        """Record that an instance which has arrived is this host's. Failed if the other host was told otherwise."""
        async with arrival.lock:
            if arrival.refused:
                raise Failed("the other host was told that it did not arrive", "try again")
            await self.instances.commit(*managed.key, partial(self._committed, arriving=False))
            arrival.owned = True

    async def _remove(self, managed: ManagedInstance) -> None:
        with contextlib.suppress(NotFound):
            await self.instances.remove(*managed.key, force=True)

    async def outcome(self, secret: str) -> MigrationOutcome:
        """Whether the instance of a ticket has arrived. If not, it never will by that ticket."""
        key = _hash(secret)
        self._tickets.pop(key, None)
        if arrival := self._arrivals.get(key):
            async with arrival.lock:
                arrival.refused = not arrival.owned
                return MigrationOutcome(arrived=arrival.owned)
        for managed in self.instances.managed.all():
            if managed.instance.ticket == key:
                return MigrationOutcome(arrived=not managed.instance.arriving)
        return MigrationOutcome(arrived=False)

    # -- after a crash ---------------------------------------------------------------------------------------------

    async def clean(self) -> None:
        """Have instances that did not arrive before the daemon ended removed; called before they are looked at."""
        for managed in self._all():
            if managed.instance.arriving:
                files = migrations_of(self.context.driver(managed.instance))
                await asyncio.to_thread(files.disown, managed.instance.id)
                found = await self._removed(Known(managed.instance, managed.revision, managed.status))
                managed.instance, managed.revision = found.value, found.revision

    async def resume(self) -> None:
        """Settle what becomes of instances that were leaving when the daemon ended."""
        for managed in self._all():
            files = migrations_of(self.context.driver(managed.instance))
            if await asyncio.to_thread(files.is_leaving, managed.instance.id):
                if target := await asyncio.to_thread(files.given, managed.instance.id):
                    self._go_on_asking(managed, target)
                else:
                    await files.settle(managed.instance.id, gone=False)

    def _all(self) -> Sequence[ManagedInstance]:
        found = self.instances.managed.all()
        return [each for each in found if "migrate" in self.context.driver(each.instance).features]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _facts(network: Network) -> NetworkFacts:
    return NetworkFacts(
        name=network.name,
        subnet=network.subnet,
        subnet6=network.subnet6,
        gateway=network.gateway,
        gateway6=network.gateway6,
        mtu=network.mtu,
    )


def _with_addresses(offer: MigrationOffer) -> Any:
    """The spec of an instance that keeps its addresses. Conflict if the offer is not whole."""
    if [port.network for port in offer.ports] != [each.name for each in offer.networks]:
        raise Conflict("the ports of the instance are not on its networks", "try again")
    networks = [
        NetworkAttachment(
            network=port.network,
            address=port.address,
            address6=port.address6,
            mac=port.mac,
            allowed_pairs=port.allowed_pairs,
        )
        for port in offer.ports
    ]
    return msgspec.structs.replace(offer.spec, networks=networks)


async def _launched(managed: ManagedInstance) -> None:
    """Wait until QEMU runs. Failed says why it does not."""
    end = time.monotonic() + _START
    while time.monotonic() < end:
        if managed.status.state in ("starting", "running"):
            if managed.status.pid:
                return
        elif managed.status.state in ("failed", "exited"):
            raise error_of(managed.status) if managed.status.error else Failed("QEMU has ended", "try again")
        await asyncio.sleep(0.01)
    raise Failed("the machine was not started in time", "look at the load of the host")
