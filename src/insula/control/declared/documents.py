"""Documents as declared objects: checked, in canonical form, and in order of their dependencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import msgspec

from insula.control.declared.kinds.base import DeclaredDocument, DeclaredKind, ObjectReference
from insula.control.declared.kinds.registry import KINDS, RANK
from insula.control.declared.merge import Form, restrict
from insula.control.declared.parse import RawDocument, parse
from insula.model.declared import DeclaredFile
from insula.model.errors import Invalid
from insula.model.units import check_label, shorten


@dataclass(frozen=True)
class Declaration:
    """A declared object. `form` has what the document has, in canonical form; `full` the other fields' defaults too."""

    ref: ObjectReference
    kind: DeclaredKind
    form: Form
    full: Form
    where: str

    def depends(self) -> Iterable[ObjectReference]:
        return self.kind.depends(self.ref, self.full)


def read(files: Sequence[DeclaredFile], tenant: str | None) -> Sequence[Declaration]:
    """Return the objects that files declare, each after those that it depends on. Invalid.

    `tenant` is that of the request; None is the host, and then each document names its own. It blocks.
    """
    found: dict[ObjectReference, Declaration] = {}
    for raw in parse(files):
        declared = _declaration(raw, tenant)
        if declared.ref in found:
            raw.refuse(f"{declared.ref} is declared twice", f"it is at {found[declared.ref].where} too")
        found[declared.ref] = declared
    return _ordered(found)


def _declaration(raw: RawDocument, tenant: str | None) -> Declaration:
    name = raw.value.get("kind")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        what = "a document has no kind" if name is None else f"there is no kind {shorten(name)}"
        raw.refuse(what, f"one of {', '.join(KINDS)}", ("kind",))
    value = kind.upgraded(raw.value)
    try:
        document: DeclaredDocument = msgspec.convert(kind.completed(value), kind.document)
    except msgspec.ValidationError as error:
        raw.refuse_type(str(error))
    owner = _owner(raw, kind, document, tenant)
    given = {"spec": value.get("spec") or {}}
    if "labels" in raw.value["metadata"]:
        given["labels"] = raw.value["metadata"]["labels"]
    try:
        ref = kind.reference(document, owner)
        spec: Any = msgspec.to_builtins(getattr(document, "spec"))  # noqa: B009
        full = kind.full(ref, {"labels": document.metadata.labels, "spec": restrict(spec, given["spec"])})
    except Invalid as error:
        raw.refuse(error.message, error.hint)
    return Declaration(ref, kind, restrict(full, given), full, raw.at())


def _owner(raw: RawDocument, kind: DeclaredKind, document: DeclaredDocument, tenant: str | None) -> str | None:
    """Return the tenant of the object, None for one of the host. Nothing is looked up."""
    named, where = document.metadata.tenant, ("metadata", "tenant")
    if named is not None:
        try:
            check_label("tenant", named)
        except Invalid as error:
            raw.refuse(error.message, error.hint, where)
    if not kind.of_tenant:
        if named is not None:
            raw.refuse(f"a {kind.name} is of no tenant", "leave it out", where)
        if tenant is not None:
            raw.refuse(f"a {kind.name} is not in a tenant", "the operator applies it: `insula apply --host`")
        return None
    if tenant is not None:
        if named not in (None, tenant):
            raw.refuse(f"it is for tenant {named}, not {tenant}", f"`insula -T {named} apply`", where)
        return tenant
    if named is None and not kind.of_host:
        raw.refuse("its tenant is not named", "with --host each document names it: metadata.tenant", ("metadata",))
    return named


def _ordered(found: Mapping[ObjectReference, Declaration]) -> Sequence[Declaration]:
    """Sort by kind, and within a kind by dependencies. Invalid if these go in a circle."""
    graph: TopologicalSorter[ObjectReference] = TopologicalSorter()
    for each in sorted(found.values(), key=lambda each: RANK[each.ref.kind]):
        graph.add(each.ref, *(ref for ref in each.depends() if ref in found))
    try:
        return [found[ref] for ref in graph.static_order()]
    except CycleError as error:
        names = " and ".join(dict.fromkeys(str(ref) for ref in error.args[1]))
        raise Invalid(f"{names} depend on each other", "one of them must be there first") from None
