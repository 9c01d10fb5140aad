"""The steps of an apply: what is to be done about each object, found out without doing it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from insula.control.declared.documents import Declaration
from insula.control.declared.kinds.base import Current, DeclaredKind, ObjectReference, Verbs
from insula.control.declared.kinds.registry import KINDS, RANK
from insula.control.declared.merge import MISSING, Difference, Form, changes, merge
from insula.control.declared.sets import Sets
from insula.control.declared.unified import unified
from insula.control.declared.yaml12 import write
from insula.control.identities.authority import Authority
from insula.model.declared import ApplySet, ApplySpec, DeclaredItem, Operation, SetMember
from insula.model.errors import Conflict, InsulaError, Invalid
from insula.model.units import shorten
from insula.store.typed import Found

_MOST = 100
"""Fields in conflict that are told."""


@dataclass
class PlannedStep:
    """What is to be done about an object. `before` is what it is, `after` the form that it is to have.

    `refusal` says why it can't be done without another option, or at all.
    """

    ref: ObjectReference
    kind: DeclaredKind
    operation: Operation = "none"
    declared: Declaration | None = None
    before: Current | None = None
    after: Form | None = None
    member: Found[SetMember] | None = None
    refusal: InsulaError | None = None
    diff: list[str] = field(default_factory=list)

    def item(self, state: str, error: InsulaError | None = None) -> DeclaredItem:
        return DeclaredItem(
            kind=self.ref.kind,
            name=self.kind.label(self.ref),
            tenant=self.ref.tenant,
            operation=self.operation,
            state=state,  # type: ignore[arg-type]
            reason=error.message if error else None,
            advice=error.hint if error else None,
            diff=self.diff,
        )

    @property
    def refused(self) -> str:
        """The state of an item that is not done: "refused" if another option would do it, else "failed"."""
        return "refused" if isinstance(self.refusal, Conflict) else "failed"

    def planned(self) -> DeclaredItem:
        return self.item(self.refused if self.refusal else "planned", self.refusal)


class Planner:
    """Plans the steps of one request, by the rights of its sender."""

    def __init__(self, verbs: Verbs, sets: Sets, spec: ApplySpec, of: Found[ApplySet] | None) -> None:
        self.verbs = verbs
        self.sets = sets
        self.spec = spec
        self.of = of

    async def step(self, by: Authority, declared: Declaration) -> PlannedStep:
        """Plan what is to be done about a declared object. It has no diff yet."""
        ref, kind = declared.ref, declared.kind
        step = PlannedStep(ref, kind, declared=declared)
        await asyncio.sleep(0)  # a file may declare a thousand objects: let other tasks run
        try:
            kind.may(by, "read", ref.tenant)
            step.before = await kind.current(self.verbs, ref)
            step.member = await self.sets.member(ref)
            if step.before is None:
                step.operation, step.after = "create", declared.full
            else:
                await self._compare(by, step, declared, step.before)
        except InsulaError as error:
            step.refusal = error
        return step

    async def _compare(self, by: Authority, step: PlannedStep, declared: Declaration, before: Current) -> None:
        ref, kind = step.ref, step.kind
        member = step.member.value if step.member and step.member.value.uid == before.uid else None
        mine = member if member and self.of and member.set == self.of.value.id else None

        def readable(form: Form) -> Form:
            return kind.masked(form, by, ref.tenant)

        applied = readable(kind.upgraded(mine.applied)) if mine else None
        default = kind.default(self.verbs, ref, before.form)
        merged = merge(readable(declared.form), applied, readable(before.form), default)
        step.after = kind.full(ref, merged.form)
        changed = [*changes(readable(before.form), step.after)]
        step.operation = _operation(kind, changed, before)
        if not self.spec.force and member and not mine and await self.sets.is_alive(member):
            step.refusal = Conflict("it belongs to another set", "--force takes it over")
        elif not self.spec.force and merged.conflicts:
            step.refusal = _conflict(merged.conflicts, by_hand=mine is not None)
            step.diff = [*map(_told, merged.conflicts[:_MOST])]
        if step.refusal is None and step.operation == "replace" and not self.spec.replace:
            names = _names([path for path in changed if not _is_in_place(kind, path)])
            step.refusal = Conflict(f"{names} can't be changed", "--replace removes it, and creates it again")

    async def add_diff(self, by: Authority, step: PlannedStep) -> None:
        """Add a unified diff of the object as it is and as it is to be, without defaults, if it is to be changed."""
        if step.operation == "none":
            return

        def lines(form: Form | None) -> list[str]:
            if form is None:
                return []
            shown = step.kind.masked(step.kind.short(self.verbs, step.ref, form), by, step.ref.tenant)
            return write([step.kind.to_document(step.ref, shown, None)]).splitlines()

        def work() -> list[str]:
            before = lines(step.before.form if step.before else None)
            return unified(before, lines(step.after), f"{step.ref} now", f"{step.ref} declared")

        step.diff += await self.sets.context.surveys.do(step.ref.tenant or "", work)

    # -- removals --------------------------------------------------------------------------------------------------

    async def removals(
        self, by: Authority, members: Mapping[ObjectReference, Found[SetMember]], declared: Sequence[Declaration]
    ) -> tuple[Sequence[PlannedStep], Sequence[PlannedStep]]:
        """Return the steps that remove members that are not declared, and, without doing anything, those for members
        whose objects are gone: they are forgotten.

        An object that was removed and made again by hand is another one, and stays. Invalid if `yes` is missing.
        """
        kept = {each.ref for each in declared}
        removed, gone, alive = [], [], 0
        for ref, member in sorted(members.items(), key=lambda pair: -RANK.get(pair[0].kind, 0)):
            await asyncio.sleep(0)
            if ref.kind not in KINDS:  # of a newer Insula
                continue
            step = PlannedStep(ref, KINDS[ref.kind], "remove", member=member)
            try:
                step.kind.may(by, "read", ref.tenant)
            except InsulaError:  # it stays, and is not told of
                continue
            try:
                step.before = await step.kind.current(self.verbs, ref)
            except InsulaError as error:
                step.refusal = error
            is_there = step.refusal is not None or (step.before is not None and step.before.uid == member.value.uid)
            alive += is_there
            if ref in kept:
                continue
            if not is_there:
                gone.append(step)
            elif self.spec.prune:
                _check_removal(by, step)
                removed.append(step)
        steps = _dependants_first(removed)
        self._ask(steps, alive)
        return steps, gone

    def _ask(self, removed: Sequence[PlannedStep], alive: int) -> None:
        """Raise Invalid if so much is removed that it may be a mistake."""
        if self.spec.yes or not removed:
            return
        names = shorten(", ".join(str(step.ref) for step in removed), 200)[1:-1]
        if any(step.ref.kind == "Tenant" for step in removed):
            raise Invalid(f"this removes tenants: {names}", "--yes, if it is meant")
        if 2 * len(removed) > alive:
            what = f"this removes {len(removed)} of the {alive} objects of set {self.spec.set}: {names}"
            raise Invalid(what, "--yes, if it is meant")


def _check_removal(by: Authority, step: PlannedStep) -> None:
    try:
        step.kind.may(by, "remove", step.ref.tenant)
    except InsulaError as error:
        step.refusal = step.refusal or error


def _operation(kind: DeclaredKind, changed: Sequence[tuple[str, ...]], before: Current) -> Operation:
    if not changed:
        return "update" if before.broken else "none"
    return "update" if all(_is_in_place(kind, path) for path in changed) else "replace"


def _is_in_place(kind: DeclaredKind, path: tuple[str, ...]) -> bool:
    return any(path[: len(each)] == tuple(each) for each in kind.in_place)


def _conflict(conflicts: Sequence[Difference], *, by_hand: bool) -> Conflict:
    names = _names([each.path for each in conflicts])
    what = f"{names} was changed by hand" if by_hand else f"it was not made by this set, and differs in {names}"
    return Conflict(what, "--force takes it over")


def _names(paths: Sequence[tuple[str, ...]]) -> str:
    """Return the names of fields; of many the first ones."""
    names = ", ".join(".".join(path)[:200] for path in paths[:10])
    return f"{names} and {len(paths) - 10} others" if len(paths) > 10 else names


def _told(conflict: Difference) -> str:
    """Return a conflict as a line."""
    values = (("applied", conflict.applied), ("now", conflict.current), ("declared", conflict.declared))
    return f"# {'.'.join(conflict.path)}: " + ", ".join(f"{n} {_shown(v)}" for n, v in values if v is not MISSING)


def _shown(value: object) -> str:
    return ascii(value) if len(ascii(value)) <= 200 else ascii(value)[:200] + "…"


def _dependants_first(steps: Sequence[PlannedStep]) -> Sequence[PlannedStep]:
    """Move what shares something of another object before that: the order of kinds has done the rest."""
    needed = {
        ref for step in steps if step.before for ref in step.kind.depends(step.ref, step.before.form) if ref != step.ref
    }
    return sorted(steps, key=lambda step: (-RANK[step.ref.kind], step.ref in needed))
