"""`BalancerChecks`: health checks of load balancers' backends, from the routers of their tenants.

Each address of each backend is checked by a task of its own, at most `AT_ONCE` of one tenant at a time: so a tenant
whose backends hang delays no other. A check has one descriptor, and reads at most `MOST` bytes of an answer.

Which backends pass is stored when it changes. So they keep their connections while insulad starts again, until checks
say otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from insula.control.context import Context
from insula.control.keys import HEALTHY, LOAD_BALANCERS
from insula.control.networks.backends import Backend
from insula.control.networks.check_probe import probe
from insula.control.tasks import Tasks
from insula.model.errors import Failed, InsulaError
from insula.model.load_balancers import BackendCheck, BackendState, BackendView, HealthyBackends, LoadBalancer
from insula.model.objects import Tenant
from insula.store.protocol import TransactionConflict

AT_ONCE: Final = 16
"""Checks of one tenant at a time."""
_PAUSE: Final = 0.05  # seconds in which changes of one tenant are gathered
_SOON: Final = 1.0  # seconds until a new backend that has failed is checked again


class CheckedAddress(NamedTuple):
    """What is checked: an address of an instance, for a balancer of a tenant."""

    tenant: str
    balancer: str
    number: int
    instance: str
    address: str


class CheckedBackend:
    """The results of one address of a backend. It `passes` if most of its last results are successes; the first success
    of a `new` one makes it pass at once."""

    def __init__(self, key: CheckedAddress, port: int, check: BackendCheck, *, passed: bool) -> None:
        self.key = key
        self.port = port
        self.check = check
        self.passes, self.new = passed, not passed
        self.checked = False
        self.reason = "it passed before" if passed else "its first check is not over"
        self.results = deque([True] * (2 * check.threshold - 1), maxlen=2 * check.threshold - 1)
        self.task: asyncio.Task[None] | None = None

    def judge(self, failure: str | None) -> bool:
        """Take a result; None is a success. Return whether it passes now and did not, or the other way round."""
        before, good = self.passes, failure is None
        if not self.new:
            self.results.append(good)
        self.new = self.new and not good
        self.passes = not self.new and sum(self.results) >= self.check.threshold
        self.checked = True
        self.reason = failure or ("it passes its checks" if self.passes else "it failed most of its last checks")
        return self.passes != before


class BalancerChecks:
    """The checks of all tenants. `changed` is called with the name of a tenant of which a backend passes now, or no
    longer does."""

    def __init__(self, context: Context, tasks: Tasks, changed: Callable[[str], None]) -> None:
        self.context = context
        self._tasks = tasks
        self._changed = changed
        self._backends: defaultdict[str, dict[CheckedAddress, CheckedBackend]] = defaultdict(dict)  # by tenant
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))
        self._stored: dict[tuple[str, str], set[tuple[str, str]]] = {}  # by tenant and balancer
        self._telling: set[str] = set()

    async def load(self) -> None:
        """Read which backends passed before insulad started."""
        for entry in (await self.context.store.list(HEALTHY.prefix_all())).entries:
            with contextlib.suppress(Failed):
                tenant, name = HEALTHY.parts(entry.key)
                self._stored[tenant, name] = {*HEALTHY.decode(entry).backends}

    def watch(self, tenant: Tenant, balancers: Iterable[tuple[LoadBalancer, Sequence[Backend]]]) -> None:
        """Check these backends of a tenant, and no others of it."""
        own, wanted = self._backends[tenant.name], set[CheckedAddress]()
        for balancer, backends in balancers:
            passed = self._stored.get((tenant.name, balancer.name), set())
            for backend in backends:
                if backend.end is None or balancer.health.kind == "none":
                    continue
                wanted.add(key := _key(balancer, backend))
                known = own.get(key)
                if known and (known.port, known.check) == (backend.port, balancer.health):
                    continue
                keeps = known.passes if known else (backend.id, backend.address) in passed
                if known and known.task:
                    known.task.cancel()
                own[key] = fresh = CheckedBackend(key, backend.port, balancer.health, passed=keeps)
                fresh.task = self._tasks.spawn(self._check(tenant, fresh, late=keeps))
        gone = own.keys() - wanted
        for key in gone:
            if task := own.pop(key).task:
                task.cancel()
        if gone:
            self._tasks.spawn(self._store(tenant.name))
        if not own:
            self.forget(tenant.name)

    def forget(self, tenant: str) -> None:
        """End all checks of a tenant."""
        for each in self._backends.pop(tenant, {}).values():
            if each.task:
                each.task.cancel()
        self._slots.pop(tenant, None)

    def passes(self, balancer: LoadBalancer, backend: Backend) -> bool:
        """Whether a backend that runs gets connections."""
        if balancer.health.kind == "none":
            return True
        known = self._backends.get(balancer.tenant, {}).get(_key(balancer, backend))
        return known is not None and known.passes

    def view(self, balancer: LoadBalancer, backend: Backend) -> BackendView:
        """A backend with its state, and why it has it."""
        state, reason = self._state(balancer, backend)
        return BackendView(
            instance=backend.name, address=backend.address, port=backend.port, state=state, reason=reason
        )

    def _state(self, balancer: LoadBalancer, backend: Backend) -> tuple[BackendState, str]:
        if not backend.id:
            return "absent", "there is no instance of this name"
        if backend.address is None:
            return "absent", "the instance has no network"
        if not backend.runs:
            return "stopped", "the instance does not run"
        if balancer.health.kind == "none":
            return "healthy", "it runs, and is not checked"
        known = self._backends.get(balancer.tenant, {}).get(_key(balancer, backend))
        if known is None or not (known.passes or known.checked):
            return "starting", known.reason if known else "it is not checked yet"
        return ("healthy" if known.passes else "unhealthy"), known.reason

    # -- checks ----------------------------------------------------------------------------------------------------

    async def _check(self, tenant: Tenant, backend: CheckedBackend, *, late: bool) -> None:
        """Check a backend again and again. `late`: the first checks after a start are spread over their interval."""
        if late:
            await asyncio.sleep(random.random() * backend.check.interval)
        slots = self._slots[tenant.name]
        while True:
            async with slots:
                failure = await self._probe(tenant, backend)
            if backend.judge(failure):
                self._tell(tenant.name)
            # a new backend that is just starting is looked at soon
            await asyncio.sleep(min(backend.check.interval, _SOON) if backend.new else backend.check.interval)

    async def _probe(self, tenant: Tenant, backend: CheckedBackend) -> str | None:
        try:
            return await probe(self.context.fabric, tenant, backend.key.address, backend.port, backend.check)
        except InsulaError as error:  # the tenant's router is just being made
            return error.message

    def _tell(self, tenant: str) -> None:
        """Have the tenant looked at, and store which backends pass; several changes at once as one."""
        if tenant not in self._telling:
            self._telling.add(tenant)
            self._tasks.spawn(self._told(tenant))

    async def _told(self, tenant: str) -> None:
        await asyncio.sleep(_PAUSE)
        self._telling.discard(tenant)
        self._changed(tenant)
        await self._store(tenant)

    async def _store(self, tenant: str) -> None:
        passing = defaultdict[str, set[tuple[str, str]]](set)
        for key, each in self._backends.get(tenant, {}).items():
            if each.passes:
                passing[key.balancer].add((key.instance, key.address))
        store = self.context.store
        for owner in LOAD_BALANCERS.sort_out((await store.list(LOAD_BALANCERS.prefix(tenant))).entries)[0]:
            name, now = owner.value.name, passing[owner.value.name]
            if self._stored.get((tenant, name), set()) == now:
                continue
            put = HEALTHY.put(HealthyBackends(backends=sorted(now)), tenant, name)
            with contextlib.suppress(TransactionConflict):  # it is just changed: the next result stores it
                await store.transact([LOAD_BALANCERS.unchanged(owner, tenant, name)], [put], durable=False)
                self._stored[tenant, name] = now


def _key(balancer: LoadBalancer, backend: Backend) -> CheckedAddress:
    assert backend.address is not None
    return CheckedAddress(balancer.tenant, balancer.name, balancer.index, backend.id, backend.address)
