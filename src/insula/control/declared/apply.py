"""`Declared`: the verbs apply, diff and dump.

An apply runs in a task of its own. When its client disconnects, or loses the right to it, it ends after the object that
it is at. It can be repeated at any time: what is done is found done. Two of the same set run one after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from insula.control.context import Context
from insula.control.declared.documents import Declaration, read
from insula.control.declared.kinds.base import Current, ObjectReference, Verbs
from insula.control.declared.kinds.registry import KINDS, schema
from insula.control.declared.merge import Form
from insula.control.declared.plan import PlannedStep, Planner
from insula.control.declared.sets import Sets
from insula.control.declared.yaml12 import write
from insula.control.identities.authority import Authority
from insula.control.identities.cache import IdentityCache
from insula.control.tasks import Tasks
from insula.control.workers import Locks
from insula.model.declared import ApplySet, ApplySpec, DeclaredItem
from insula.model.errors import Conflict, InsulaError, Invalid, Unauthenticated, defect
from insula.store.typed import Found

log = logging.getLogger("insula.control")
Report = Callable[[DeclaredItem, int], None]
"""Called with what was done about an object, and its HTTP status."""


class Declared:
    def __init__(self, context: Context, verbs: Verbs, cache: IdentityCache, tasks: Tasks) -> None:
        self.context = context
        self.verbs = verbs
        self.cache = cache
        self.sets = Sets(context)
        self._tasks = tasks
        self._turns = Locks()

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of a document."""
        return schema()

    # -- apply -----------------------------------------------------------------------------------------------------

    async def apply(
        self, by: Authority, tenant: str | None, spec: ApplySpec, record: Report = lambda *_: None
    ) -> AsyncIterator[DeclaredItem]:
        """Make everything as the files declare it, in a tenant, or (None) on the host and in all tenants. Yield what
        was done about each object. `record` is called with it at once, even if nobody reads any more.

        Invalid, NotFound, Conflict before anything was changed. The failure of one object is in its item.
        """
        found: asyncio.Queue[DeclaredItem | None] = asyncio.Queue()
        stop = asyncio.Event()

        def report(item: DeclaredItem, status: int) -> None:
            record(item, status)
            found.put_nowait(item)

        task = self._tasks.spawn(self._apply(by, tenant, spec, report, stop))
        task.add_done_callback(lambda _: found.put_nowait(None))
        try:
            while (item := await found.get()) is not None:
                yield item
            await task
        finally:
            stop.set()

    async def _apply(
        self, by: Authority, tenant: str | None, spec: ApplySpec, report: Report, stop: asyncio.Event
    ) -> None:
        declared = await self._read(tenant, spec)
        async with self._turns[f"{tenant or ''}/{spec.set}"]:
            if stop.is_set():
                return
            of = await self.sets.open(tenant, spec.set)
            try:
                await _Run(self, by, of, spec, report, stop).everything(declared)
            finally:
                await self.sets.close(of)

    async def _read(self, tenant: str | None, spec: ApplySpec) -> Sequence[Declaration]:
        if tenant is not None:
            await self.verbs.tenants.find(tenant)
        declared = await self.context.surveys.do(tenant or "", lambda: read(spec.files, tenant))
        if not declared and not spec.allow_empty:
            raise Invalid("the files declare nothing", "--allow-empty, if it is meant")
        return declared

    # -- diff and dump -----------------------------------------------------------------------------------------------

    async def diff(self, by: Authority, tenant: str | None, spec: ApplySpec) -> list[DeclaredItem]:
        """Return what `apply` would do. Invalid, NotFound."""
        declared = await self._read(tenant, spec)
        of = await self.sets.find(tenant, spec.set)
        planner = Planner(self.verbs, self.sets, spec, of)
        steps = [await planner.step(by, each) for each in declared]
        removals, _ = await planner.removals(by, await self.sets.members(of), declared)
        steps += removals
        for step in steps:
            await planner.add_diff(by, step)
        return [step.planned() for step in steps]

    async def dump(self, by: Authority, tenant: str | None) -> AsyncIterator[bytes]:
        """Yield what the caller may see in a tenant, or (None) on the host and in all tenants, as documents of YAML
        without defaults. NotFound."""
        if tenant is not None:
            await self.verbs.tenants.find(tenant)
        for ref in await self._all(by, tenant):
            try:
                if current := await KINDS[ref.kind].current(self.verbs, ref):  # else it was removed meanwhile
                    yield await self.context.surveys.do(tenant or "", partial(self._document, by, tenant, ref, current))
            except InsulaError as error:  # a damaged record
                yield f"# {ref} can't be read\n".encode()
                log.warning("%s can't be dumped: %s", ref, error)

    def _document(self, by: Authority, tenant: str | None, ref: ObjectReference, current: Current) -> bytes:
        kind = KINDS[ref.kind]
        form = kind.short(self.verbs, ref, current.form)
        shown = kind.masked(form, by, ref.tenant, omit=True)
        text = write([kind.to_document(ref, shown, ref.tenant if tenant is None else None)])
        note = "# values of environment variables are left out\n" if shown != form else ""
        return f"---\n{note}{text}".encode()

    async def _all(self, by: Authority, tenant: str | None) -> Sequence[ObjectReference]:
        """Return all objects that the caller may see, in the order of their kinds."""
        tenants = [tenant] if tenant else [view.tenant.name for view in await self.verbs.tenants.list()]
        places = [*tenants] if tenant else [None, *tenants]
        found = []
        for kind in KINDS.values():
            for place in places:
                if not (kind.of_host if place is None else kind.of_tenant):
                    continue
                try:
                    kind.may(by, "read", place)
                except InsulaError:
                    continue
                found += [ObjectReference(kind.name, place, name) for name in await kind.names(self.verbs, place)]
        return found


class _Run:
    """One apply, which has its turn."""

    def __init__(
        self,
        declared: Declared,
        by: Authority,
        of: Found[ApplySet],
        spec: ApplySpec,
        report: Report,
        stop: asyncio.Event,
    ) -> None:
        self.verbs, self.sets, self.cache = declared.verbs, declared.sets, declared.cache
        self.by, self.of, self.spec = by, of, spec
        self.report, self.stop = report, stop
        self.planner = Planner(self.verbs, self.sets, spec, of)
        self.missed: dict[ObjectReference, str] = {}

    async def everything(self, declared: Sequence[Declaration]) -> None:
        removals, gone = await self.planner.removals(self.by, await self.sets.members(self.of), declared)
        for each in declared:
            if self.stop.is_set():
                return
            await self._declared(each)
        missed = len(self.missed)
        for step in removals:
            if self.stop.is_set():
                return
            await self._removal(step, missed)
        for step in gone:
            if step.member:
                await self.sets.drop(step.ref, step.member)

    def _rights(self) -> Authority:
        """Return the rights that the sender has now. Raises as the route does if it has lost them."""
        by = self.cache.again(self.by)
        if by is None:
            raise Unauthenticated("the proof of who you are is not valid any more", "make a new token")
        tenant = self.of.value.tenant
        by.check("host.apply" if tenant is None else "set.write", tenant)
        return by

    async def _declared(self, declared: Declaration) -> None:
        if because := next((ref for ref in declared.depends() if ref in self.missed), None):
            step = PlannedStep(declared.ref, declared.kind, declared=declared)
            why = Conflict(f"{because} {self.missed[because]}", "apply it again when that is done")
            self._tell(step, "skipped", why)
            return
        by = self._rights()
        try:
            await declared.kind.finish(self.verbs, by, declared.ref)
        except InsulaError as error:
            self._tell(PlannedStep(declared.ref, declared.kind, declared=declared), "failed", error)
            return
        step = await self.planner.step(by, declared)
        if step.refusal:
            if step.refused == "refused":  # where the sender has to decide
                await self.planner.add_diff(by, step)
            self._tell(step, step.refused, step.refusal)
            return
        await self._carry_out(step, self._do)

    async def _removal(self, step: PlannedStep, missed: int) -> None:
        """Remove a member, if all declared objects are as they are to be."""
        if missed:
            why = Conflict(f"{missed} objects were not applied", "nothing is removed before that is done")
            self._tell(step, "skipped", why)
        elif step.refusal:
            self._tell(step, "failed", step.refusal)
        else:
            await self._carry_out(step, self._remove)

    async def _carry_out(self, step: PlannedStep, work: Callable[[Authority, PlannedStep], Any]) -> None:
        by = self._rights()
        try:
            await work(by, step)
        except InsulaError as error:
            self._tell(step, "failed", error)
        except Exception as error:
            log.error("applying %s", step.ref, exc_info=error)
            self._tell(step, "failed", defect(error))
        else:
            self._tell(step, "done")

    def _tell(self, step: PlannedStep, state: str, error: InsulaError | None = None) -> None:
        if state != "done":
            self.missed[step.ref] = "was skipped" if state == "skipped" else "was not applied"
        self.report(step.item(state, error), error.status if error else 200)

    async def _do(self, by: Authority, step: PlannedStep) -> None:
        """Make a declared object as it is to be, and record it as a member of the set."""
        ref, kind, before = step.ref, step.kind, step.before
        assert step.after is not None
        try:
            if step.operation == "create":
                kind.may(by, "create", ref.tenant)
                await kind.create(self.verbs, by, ref, step.after)
            elif step.operation == "update":
                assert before is not None
                kind.may(by, "update", ref.tenant)
                await kind.update(self.verbs, by, ref, before.form, step.after)
            elif step.operation == "replace":
                await self._replace(by, step, step.after)
        except Conflict:
            raise  # somebody else has made it at the same time
        except InsulaError:
            if step.operation in ("create", "replace"):  # an instance that did not start is there
                await self._record(step, anew=True)
            raise
        await self._record(step)

    async def _replace(self, by: Authority, step: PlannedStep, after: Form) -> None:
        """Remove an object, and create it again. If that fails, it is created as it was."""
        ref, kind, before = step.ref, step.kind, step.before
        assert before is not None
        kind.may(by, "remove", ref.tenant)
        kind.may(by, "create", ref.tenant)
        await kind.admit(self.verbs, by, ref, after)
        async with kind.replacing(self.verbs, ref):
            await kind.remove(self.verbs, by, ref)
            try:
                await kind.create(self.verbs, by, ref, after)
            except InsulaError:
                if await kind.current(self.verbs, ref) is None:
                    await kind.create(self.verbs, by, ref, before.form)
                    await self._restored(step, before)
                raise

    async def _restored(self, step: PlannedStep, before: Current) -> None:
        """Record an object that was created as it was: a member stays one, with what was applied to it last."""
        step.before, member = await step.kind.current(self.verbs, step.ref), step.member
        if step.before and member and (member.value.set, member.value.uid) == (self.of.value.id, before.uid):
            await self.sets.record(self.of, step.ref, step.before.uid, member.value.applied, member)

    async def _record(self, step: PlannedStep, *, anew: bool = False) -> None:
        """Record an object as a member, if it is there; with `anew` only if it is not the one that was there before."""
        assert step.declared is not None
        now = await step.kind.current(self.verbs, step.ref)
        if now is None or (anew and step.before and now.uid == step.before.uid):
            return
        await self.sets.record(self.of, step.ref, now.uid, step.declared.form, step.member)

    async def _remove(self, by: Authority, step: PlannedStep) -> None:
        """Remove a member, unless it is another object or that of another set by now."""
        assert step.member is not None
        now, member = await step.kind.current(self.verbs, step.ref), await self.sets.member(step.ref)
        if member != step.member or (now is not None and now.uid != member.value.uid):
            raise Conflict("it was changed at the same time", "apply it again")
        if now is not None:
            step.kind.may(by, "remove", step.ref.tenant)
            await step.kind.remove(self.verbs, by, step.ref)
        if (member := await self.sets.member(step.ref)) is not None:  # gone with its tenant
            await self.sets.drop(step.ref, member)
