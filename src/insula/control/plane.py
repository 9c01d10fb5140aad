"""`ControlPlane`: one object with everything that the API offers. The daemon opens it once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from itertools import count

from insula.control.accounting.accounts import Accounts
from insula.control.accounting.usage import Accounting
from insula.control.allocation.recount import migrate, repair_all
from insula.control.allocation.reservations import Allocators
from insula.control.carried import CarryingStore
from insula.control.context import Context
from insula.control.declared.apply import Declared
from insula.control.declared.kinds.base import Verbs
from insula.control.disk import DiskWatch, open_disk
from insula.control.events import Events
from insula.control.host import Host
from insula.control.idempotency import IdempotencyKeys
from insula.control.identities.cache import IdentityCache
from insula.control.identities.providers import Providers
from insula.control.identities.verbs import Identities
from insula.control.identity import host_name
from insula.control.images import Images
from insula.control.instances.admission import Admission
from insula.control.instances.controller import InstanceController
from insula.control.instances.disks import Disks
from insula.control.instances.drivers.groups import TenantGroups
from insula.control.instances.drivers.registry import open_drivers
from insula.control.instances.forking import Forking
from insula.control.instances.loading import Loaded, load, sweep
from insula.control.instances.managed import ManagedInstances
from insula.control.instances.migrating import Migrating
from insula.control.instances.snapshots import Snapshots
from insula.control.instances.stats import Stats
from insula.control.instances.verbs import Instances
from insula.control.isolation_watch import IsolationWatch
from insula.control.keys import NETWORKS, TENANTS
from insula.control.networks.address_groups import AddressGroups
from insula.control.networks.balancer_checks import BalancerChecks
from insula.control.networks.controller import NetworkController
from insula.control.networks.endpoints import ServiceEndpoints
from insula.control.networks.enforcement import Enforcement
from insula.control.networks.fabrics import open_fabric
from insula.control.networks.floating_ips import FloatingIps
from insula.control.networks.guarantees import Guarantees
from insula.control.networks.intents import Intents
from insula.control.networks.load_balancers import LoadBalancers
from insula.control.networks.operator_policies import OperatorPolicies
from insula.control.networks.overload import OverloadControl
from insula.control.networks.peerings import Peerings
from insula.control.networks.policies import Policies
from insula.control.networks.ports import Ports
from insula.control.networks.routers import Routers
from insula.control.networks.verbs import DEFAULT_SUBNET, DEFAULT_SUBNET6, Networks
from insula.control.tasks import Tasks
from insula.control.tenants import DEFAULT, Tenants
from insula.control.tracing import Tracer
from insula.image.store import ImageStore
from insula.model.errors import NotFound
from insula.settings import Settings
from insula.store.protocol import Store
from insula.store.sqlite import SqliteStore

REPAIR_EVERY = 60.0
RECOUNT_EVERY = 60
"""Repairs between two recounts of what tenants use."""
_THREADS = 64
_REMOVALS = 8  # instances that are removed at a time


class ControlPlane:
    """The verbs are `tenants`, `identities`, `networks`, `routers`, `peerings`, `endpoints`, `floating_ips`,
    `load_balancers`, `guarantees`, `images`, `instances`, `snapshots`, `forking`, `migrating`, `declared`, `stats`,
    `accounting`, `host`, `tracer` and `events`; see their classes."""

    def __init__(self, context: Context, *, shared: bool) -> None:
        """`shared`: other daemons commit to the store, too."""
        self.settings = context.settings
        self.context = context
        self.tasks, self.managed = Tasks(), ManagedInstances(complete=not shared)
        self.balancer_checks = BalancerChecks(context, self.tasks, lambda name: self.network_controller.nudge(name))
        intents = Intents(
            context,
            lambda tenant: ((m.instance, m.active) for m in self.managed.of(tenant)),
            self.balancer_checks,
        )
        self.network_controller = NetworkController(context, intents, self.tasks)
        ports = Ports(context, self.network_controller)
        self.identity_cache = IdentityCache(context)
        self.providers = Providers(context.settings.oidc, context.problems, self.tasks)
        accounts = Accounts(context, self.managed)
        self.tenants = Tenants(context, self.network_controller, self.identity_cache, accounts)
        self.accounting = Accounting(context, self.managed, accounts, self.tenants)
        self.identities = Identities(context, self.tenants, self.identity_cache)
        self.networks = Networks(context, self.tenants, self.network_controller, ports)
        self.routers = Routers(context, self.tenants, self.network_controller)
        self.peerings = Peerings(context, self.tenants, self.network_controller)
        self.endpoints = ServiceEndpoints(context, self.tenants, self.network_controller)
        self.floating_ips = FloatingIps(context, self.tenants, self.network_controller)
        self.load_balancers = LoadBalancers(context, self.tenants, self.network_controller)
        self.guarantees = Guarantees(context, self.tenants, self.network_controller)
        enforcement = Enforcement(context, self.network_controller, intents)
        self.policies = Policies(context, self.tenants, enforcement)
        self.address_groups = AddressGroups(context, self.tenants, enforcement)
        self.operator_policies = OperatorPolicies(context, enforcement)
        self.images = Images(context, self.tenants, accounts)
        self.instance_controller = InstanceController(context, self.managed, ports, self.tasks, accounts)
        admission = Admission(context, self.tenants, self.networks, self.images, ports, accounts)
        self.instances = Instances(self.tenants, admission, self.instance_controller, self.tasks, enforcement)
        self.snapshots = Snapshots(self.instances, self.tasks)
        self.disks = Disks(self.instances, self.tasks)
        self.forking = Forking(self.snapshots)
        self.migrating = Migrating(self.snapshots)
        verbs = Verbs(
            self.tenants,
            self.identities,
            self.networks,
            self.routers,
            self.floating_ips,
            self.load_balancers,
            self.guarantees,
            self.policies,
            self.address_groups,
            self.operator_policies,
            self.instances,
        )
        self.declared = Declared(context, verbs, self.identity_cache, self.tasks)
        self.stats = Stats(context, self.managed, self.tenants, self.instances.find)
        self.events = Events(context)
        self.disk_watch = DiskWatch(context, self.managed, self.instance_controller.recorder, self.instances.stop)
        self.host = Host(self.instance_controller, self.network_controller, self.tasks, self.accounting.close)
        self.overload = OverloadControl(context.fabric, self.tasks)
        self.isolation = IsolationWatch(context, self.host.verifier, self.network_controller, self.tasks)
        self.tracer = Tracer(context, intents, self.managed)
        self.idempotency_keys = IdempotencyKeys(context)
        self._loaded: Loaded | None = None
        self._closing = AsyncExitStack()

    @classmethod
    async def open(cls, settings: Settings, store: Store | None = None) -> ControlPlane:
        """Open every part. Instances are not looked at yet. Raises InsulaError; running instances go on running.

        `store` is a store that several control planes share; it is not closed with this one. None is the host's own.
        """
        settings.make()
        # the default executor has few threads: slow downloads of one tenant would delay launches of another
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "insula"))
        async with AsyncExitStack() as undo:
            shared = store is not None
            if store is None:
                store = SqliteStore(settings.state)
                undo.push_async_callback(store.close)
            images = await asyncio.to_thread(ImageStore, settings.images)
            disk = await asyncio.to_thread(open_disk, settings)
            undo.callback(disk.close)
            drivers = await open_drivers(settings, images, disk, undo)
            fabric = await open_fabric(settings, undo)
            store = CarryingStore(store)
            host = await asyncio.to_thread(host_name, settings.root)
            groups = TenantGroups(settings.prefix)
            context = Context(settings, host, store, Allocators(store), drivers, groups, fabric, images, disk)
            plane = cls(context, shared=shared)
            undo.push_async_callback(plane.tasks.close)
            undo.push_async_callback(plane.instance_controller.close)
            undo.push_async_callback(plane.accounting.close)
            await context.problems.guard("damaged records of tenants", plane.tenants.rebuild_damaged())
            await context.problems.guard("content of images", plane.images.complete())
            await context.problems.guard("usage of tenants", migrate(store))
            await context.limits.load(plane.tasks)
            await plane.identity_cache.load(plane.tasks)
            await plane._load()
            await plane.ensure()
            plane._closing = undo.pop_all()
        return plane

    async def _load(self) -> None:
        self._loaded = await load(self.context, self.instance_controller)
        await self.context.problems.guard("instances that did not arrive", self.migrating.clean())
        self.context.preparing.update({tenant.name: asyncio.Event() for tenant in self._loaded.tenants})
        await self.accounting.accounts.load()
        await self.balancer_checks.load()
        self.network_controller.know(self._loaded.tenants)
        if not self.context.unreadable:
            await self.network_controller.sweep(self._loaded.tenants)

    def begin(self) -> None:
        """Begin to reconcile, beside requests. It never ends; the first pass may take long."""
        self.host.uncharged.begin()
        self.tasks.spawn(self.disk_watch.run())
        self.tasks.spawn(self.overload.run())
        self.isolation.begin()
        self.providers.begin()
        self.tasks.spawn(self._reconcile())
        self.tasks.spawn(self.accounting.run())

    async def ensure(self) -> None:
        """Make sure that the default tenant, its default network and the built-in image exist. A failure is recorded as
        a problem of this host."""
        await self.context.problems.guard(f"tenant {DEFAULT}", self._ensure_default())
        await self.context.problems.guard("image busybox", self.images.ensure_busybox())

    async def _ensure_default(self) -> None:
        if await TENANTS.get(self.context.store, DEFAULT) is None:
            await self.tenants.create(DEFAULT)
        if await NETWORKS.get(self.context.store, DEFAULT, DEFAULT) is None:
            await self.networks.create(DEFAULT, DEFAULT, DEFAULT_SUBNET, DEFAULT_SUBNET6)

    async def _reconcile(self) -> None:
        assert self._loaded
        self.tasks.spawn(sweep(self.context, self.instance_controller, self._loaded.leftovers))
        self.tasks.spawn(self.context.problems.guard("snapshots of instances", self.snapshots.sweep()))
        self.tasks.spawn(self.context.problems.guard("instances that were leaving", self.migrating.resume()))
        revision = self._loaded.revision
        everything = asyncio.gather(self.network_controller.begin(revision), self.instance_controller.begin(revision))
        await self.context.problems.guard("reconciliation", everything)
        await self.context.problems.guard("sweep of images", self._sweep_images())
        for number in count():
            if number % RECOUNT_EVERY == 0:
                await self.context.problems.guard("usage of tenants", repair_all(self.context.store))
            await asyncio.sleep(REPAIR_EVERY)
            if self.context.going_down.is_set():
                return
            await self.context.problems.guard("periodic repair", self._resync())

    async def _resync(self) -> None:
        await asyncio.gather(self.network_controller.resync(), self.instance_controller.resync())

    async def _sweep_images(self) -> None:
        await asyncio.to_thread(self.context.images.sweep)
        await self.images.collect()

    async def clear_tenant(self, name: str) -> None:
        """Remove what a tenant has, but not the tenant. It goes on if the client disconnects."""
        await self.tenants.check_removable(name)
        await asyncio.shield(self.tasks.spawn(self._clear_tenant(name)))

    async def _clear_tenant(self, name: str) -> None:
        few = asyncio.Semaphore(_REMOVALS)

        async def gone(removal: Awaitable[None]) -> None:
            async with few:
                with contextlib.suppress(NotFound):  # it was about to remove itself
                    await removal

        await asyncio.gather(
            *(gone(self.instances.remove(name, v.instance.name, force=True)) for v in await self.instances.list(name))
        )
        for peering in await self.peerings.list(name):
            await gone(self.peerings.end(name, peering.peer, peering.name))
        for balancer in await self.load_balancers.list(name):
            await gone(self.load_balancers.remove(name, balancer.name))
        for floating in await self.floating_ips.list(name):
            await gone(self.floating_ips.remove(name, floating.floating_ip.name))
        for router in await self.routers.list(name):
            await gone(self.routers.remove(name, router.router.name))
        for network in await self.networks.list(name):
            await gone(self.networks.remove(name, network.network.name))
        for image in await self.images.list(name):
            if image.tenant == name:
                await gone(self.images.remove(name, image.name))

    async def close(self) -> None:
        """Close every part. Instances, their networks and their logs go on without the daemon."""
        await self._closing.aclose()
