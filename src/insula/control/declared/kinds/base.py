"""`DeclaredKind`: what declared state needs of one kind of object. It calls the verbs, so that these check everything.

Every write takes the permission that the route of its verb takes, in the tenant of the object (`permission`), and the
verbs check the rest by the caller's `Authority`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec

from insula.control.declared.merge import FieldPath, Form, without_defaults
from insula.control.identities.authority import Authority
from insula.control.identities.verbs import Identities
from insula.control.instances.specs import check_labels
from insula.control.instances.verbs import Instances
from insula.control.networks.address_groups import AddressGroups
from insula.control.networks.floating_ips import FloatingIps
from insula.control.networks.guarantees import Guarantees
from insula.control.networks.load_balancers import LoadBalancers
from insula.control.networks.operator_policies import OperatorPolicies
from insula.control.networks.policies import Policies
from insula.control.networks.routers import Routers
from insula.control.networks.verbs import Networks
from insula.control.tenants import Tenants
from insula.model.declared import API_VERSION, Metadata
from insula.model.errors import Invalid
from insula.model.objects import Struct
from insula.model.units import check_label

AccessMode = Literal["read", "create", "update", "remove"]


class DeclaredDocument(Struct, kw_only=True, tag_field="kind"):
    """The base of documents. A subclass has the kind as its tag, and a field `spec`."""

    api_version: Literal["insula/v1"] = msgspec.field(name="apiVersion")
    metadata: Metadata


class ObjectReference(NamedTuple):
    """An object: its kind, its tenant (None: of the host), and its name among those of its kind there."""

    kind: str
    tenant: str | None
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


class Current(NamedTuple):
    """An object as it is: its form, and a unique ID, which another one of the same name doesn't have. `broken` says
    that it is not in the state that it is wanted to be in, and that an update repairs it."""

    form: Form
    uid: str
    broken: str | None = None


@dataclass(frozen=True)
class Verbs:
    """The verbs of the control plane that kinds call."""

    tenants: Tenants
    identities: Identities
    networks: Networks
    routers: Routers
    floating_ips: FloatingIps
    load_balancers: LoadBalancers
    guarantees: Guarantees
    policies: Policies
    address_groups: AddressGroups
    operator_policies: OperatorPolicies
    instances: Instances


class DeclaredKind(ABC):
    """The base of kinds. A form has `labels` and `spec`; `in_place` are the fields that can be changed.

    `spec` is the type of the documents' specs. `of_host`: objects without a tenant, and `of_tenant`: with one.
    """

    name: ClassVar[str]
    document: ClassVar[type[DeclaredDocument]]
    spec: ClassVar[type[msgspec.Struct]]
    of_host: ClassVar[bool] = False
    of_tenant: ClassVar[bool] = True
    has_labels: ClassVar[bool] = True
    in_place: ClassVar[Sequence[FieldPath]] = ()

    # -- forms -----------------------------------------------------------------------------------------------------

    def reference(self, document: DeclaredDocument, tenant: str | None) -> ObjectReference:
        """Return the object that a document of this kind declares. Invalid."""
        check_label(self.name.lower(), document.metadata.name)
        return ObjectReference(self.name, tenant, document.metadata.name)

    def full(self, ref: ObjectReference, form: Form) -> Form:
        """Return the form with all fields, in canonical form. Invalid."""
        labels = check_labels(form.get("labels") or {})
        if labels and not self.has_labels:
            raise Invalid(f"a {self.name} has no labels", "leave them out")
        return {"labels": labels, "spec": self.check(ref, form.get("spec") or {}, labels)}

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        """Return the spec with all fields, in canonical form. Invalid."""
        return form_of(self.decode(spec))

    def decode(self, spec: Form) -> Any:
        try:
            return msgspec.convert(spec, self.spec)
        except msgspec.ValidationError as error:
            raise Invalid(str(error), "see the schema") from None

    def default(self, verbs: Verbs, ref: ObjectReference, full: Form) -> Form:
        """Return the form that has only the required fields of this one, and the defaults."""
        return self.full(ref, {"spec": self._required(full)})

    def short(self, verbs: Verbs, ref: ObjectReference, full: Form) -> Form:
        """Return the form with its required fields, and those that have not their defaults."""
        try:
            default = self.default(verbs, ref, full)
        except Invalid:  # an object that an earlier Insula has admitted
            return full
        form = without_defaults(full, default)
        return {**form, "spec": {**self._required(full), **form.get("spec", {})}}

    def _required(self, full: Form) -> Form:
        required = {field.name for field in msgspec.structs.fields(self.spec) if field.required}
        return {name: value for name, value in full["spec"].items() if name in required}

    def upgraded(self, form: Form) -> Form:
        """Return a form that an earlier version took, or has stored, in the present form: by default as it is."""
        return form

    def completed(self, form: Form) -> Form:
        """Return the form with what may be left out and has no default of its own: by default as it is."""
        return form

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        """Return the objects that must be there before this one."""
        return [ObjectReference("Tenant", None, ref.tenant)] if ref.tenant is not None else []

    def masked(self, form: Form, by: Authority, tenant: str | None, *, omit: bool = False) -> Form:
        """Return the form with what the caller may not read replaced, or left out (`omit`). It is compared and shown in
        place of the other."""
        return form

    def to_document(self, ref: ObjectReference, form: Form, tenant: str | None) -> dict[str, Any]:
        """Return the document of a form. `tenant` is put into it unless it is None."""
        metadata: dict[str, Any] = {"name": self.plain_name(ref)}
        if tenant is not None:
            metadata["tenant"] = tenant
        if labels := form.get("labels"):
            metadata["labels"] = labels
        document = {"apiVersion": API_VERSION, "kind": self.name, "metadata": metadata}
        return {**document, "spec": form["spec"]} if form.get("spec") else document

    def plain_name(self, ref: ObjectReference) -> str:
        """Return the name in a document."""
        return ref.name

    def label(self, ref: ObjectReference) -> str:
        """Return the name for people."""
        return self.plain_name(ref)

    # -- permissions -------------------------------------------------------------------------------------------------

    @abstractmethod
    def permission(self, access: AccessMode, tenant: str | None) -> str:
        """Return the permission that the access takes: that of the verb's route."""

    def may(self, by: Authority, access: AccessMode, tenant: str | None) -> None:
        """Raise Denied or NotFound, as the verb's route does."""
        by.check(self.permission(access, tenant), tenant)

    # -- verbs -------------------------------------------------------------------------------------------------------

    @abstractmethod
    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        """Return the names of all objects of this kind, for a dump."""

    @abstractmethod
    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        """Return the object as it is; None if there is none."""

    async def admit(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:  # noqa: B027
        """Check what can be checked before the object is removed to be made anew: by default nothing."""

    @abstractmethod
    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        """Create the object."""

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        """Change the fields that differ, all of which are among `in_place`. A kind that has none has no such method."""
        raise NotImplementedError

    def replacing(self, verbs: Verbs, ref: ObjectReference) -> AbstractAsyncContextManager[None]:
        """Return a context in which the object is removed and created again, which keeps what removal would end."""
        return nullcontext()

    async def finish(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        """Do what is left of a replacement that was cut short when the object was there again."""
        return  # most kinds have nothing that removal would end

    @abstractmethod
    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        """Remove the object."""


def form_of(struct: Struct, *without: str) -> Form:
    """Return a struct as nested dicts, without some fields."""
    found: Form = msgspec.to_builtins(struct)
    return {name: value for name, value in found.items() if name not in without}


Fields = list[tuple[str, Any] | tuple[str, Any, Any]]
"""Fields of a struct, as `msgspec.defstruct` takes them."""


def spec_like(struct: type[Struct], name: str, text: str, *without: str, more: Fields | None = None) -> Any:
    """Make the type of a kind's specs: the fields of a request of the API without some, and more of its own."""
    return msgspec.defstruct(
        name,
        [*_fields_of(struct, *without), *(more or [])],
        bases=(Struct,),
        namespace={"__doc__": text},
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


def _fields_of(struct: type[Struct], *without: str) -> Fields:
    found: Fields = []
    for field in msgspec.structs.fields(struct):
        if field.name in without:
            continue
        if field.required:
            found.append((field.name, field.type))
        elif field.default is not msgspec.NODEFAULT:
            found.append((field.name, field.type, field.default))
        else:
            found.append((field.name, field.type, msgspec.field(default_factory=field.default_factory)))
    return found
