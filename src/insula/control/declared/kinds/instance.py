"""Instance: limits, labels, networks, published ports, restart policy, stop timeout and `wanted` are changed.

All else is replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Literal

import msgspec

from insula.control.declared.kinds.base import (
    AccessMode,
    Current,
    DeclaredDocument,
    DeclaredKind,
    ObjectReference,
    Verbs,
    form_of,
    spec_like,
)
from insula.control.declared.merge import FieldPath, Form
from insula.control.identities.authority import Authority
from insula.control.instances.specs import check
from insula.image.reference import parse
from insula.model import upgrades
from insula.model.errors import InsulaError, NotFound
from insula.model.objects import Healthcheck, Instance, InstanceSpec, NetworkAttachment, PublishedPort, RestartPolicy
from insula.model.own_views import HIDDEN
from insula.model.views import InstancePatch, PublishedPatch, ResourcesPatch

_ELSEWHERE = ("name", "labels")  # fields of InstanceSpec that are metadata of the document
_CHANGED = ("restart", "stop_timeout")
_USUAL = InstanceSpec(image="").kind
Wanted = Literal["running", "stopped"]

DeclaredInstance = spec_like(
    InstanceSpec,
    "DeclaredInstance",
    "The spec of an instance, and the state that it is wanted to be in.",
    *_ELSEWHERE,
    more=[("wanted", Wanted, "running")],
)


class InstanceDocument(DeclaredDocument, kw_only=True, tag="Instance"):
    spec: DeclaredInstance  # type: ignore[valid-type]


class InstanceKind(DeclaredKind):
    name = "Instance"
    document = InstanceDocument
    spec = DeclaredInstance
    in_place: ClassVar[Sequence[FieldPath]] = [
        ("labels",),
        ("spec", "wanted"),
        *(("spec", "resources", name) for name in ResourcesPatch.__struct_fields__),
        ("spec", "networks"),
        ("spec", "published"),
        *(("spec", name) for name in _CHANGED),
    ]

    # -- forms -----------------------------------------------------------------------------------------------------

    def check(self, ref: ObjectReference, spec: Form, labels: dict[str, str]) -> Form:
        spec = _with_kind(spec)
        self.decode(spec)
        return {**_form(check(_spec(ref, spec, labels))), "wanted": spec.get("wanted", "running")}

    def upgraded(self, form: Form) -> Form:
        """0.1.0 had one network: `network`, `address`, `address6` and `mac_address`."""
        spec = form.get("spec")
        return {**form, "spec": upgrades.networks(spec)} if isinstance(spec, dict) else form

    def completed(self, form: Form) -> Form:
        """Options are those of containers, unless they name another kind."""
        spec = form.get("spec")
        return {**form, "spec": _with_kind(spec)} if isinstance(spec, dict) else form

    def depends(self, ref: ObjectReference, form: Form) -> Iterable[ObjectReference]:
        yield from super().depends(ref, form)
        for attachment in form["spec"].get("networks") or ():
            yield ObjectReference("Network", ref.tenant, attachment["network"])
        if owner := (form["spec"].get("options") or {}).get("pid_of"):
            yield ObjectReference("Instance", ref.tenant, owner)

    def masked(self, form: Form, by: Authority, tenant: str | None, *, omit: bool = False) -> Form:
        """Hide the values of environment variables from those who can't run a process in the instance, who could
        otherwise guess them until nothing differs."""
        if "env" not in form.get("spec", {}) or by.sees_environment(tenant):
            return form
        spec = {name: value for name, value in form["spec"].items() if name != "env"}
        return {**form, "spec": spec if omit else {**spec, "env": dict.fromkeys(form["spec"]["env"], HIDDEN)}}

    def permission(self, access: AccessMode, tenant: str | None) -> str:
        return "instance.read" if access == "read" else "instance.write"

    # -- verbs -------------------------------------------------------------------------------------------------------

    async def names(self, verbs: Verbs, tenant: str | None) -> Sequence[str]:
        views = await verbs.instances.list(tenant)
        return sorted(view.instance.name for view in views if view.instance.wanted != "removed")

    async def current(self, verbs: Verbs, ref: ObjectReference) -> Current | None:
        assert ref.tenant is not None
        try:
            view = await verbs.instances.get(ref.tenant, ref.name)
        except NotFound:
            return None
        instance = view.instance
        if instance.wanted == "removed":
            return None
        wanted = "stopped" if instance.wanted == "stopped" else "running"
        form = {"labels": instance.spec.labels, "spec": {**_form(instance.spec), "wanted": wanted}}
        failed = view.status.state == "failed" and wanted == "running"
        return Current(form, instance.id, "it has failed to start" if failed else None)

    async def admit(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        by.check("instance.exec", ref.tenant)  # else the values of environment variables are hidden, and would be lost
        spec = _spec(ref, form["spec"], form["labels"])
        await verbs.instances.admission.check_replacement(by, ref.tenant, ref.name, spec)

    async def create(self, verbs: Verbs, by: Authority, ref: ObjectReference, form: Form) -> None:
        assert ref.tenant is not None
        spec = _spec(ref, form["spec"], form["labels"])
        try:
            await verbs.instances.run(ref.tenant, spec, by=by, start=form["spec"]["wanted"] == "running")
        finally:  # also if it is there and did not start
            if await self.current(verbs, ref):
                await verbs.floating_ips.give_back(ref.tenant, ref.name)

    @asynccontextmanager
    async def replacing(self, verbs: Verbs, ref: ObjectReference) -> AsyncIterator[None]:
        """Its floating addresses are attached to the new instance, also by a later apply if this one is cut short."""
        assert ref.tenant is not None
        await verbs.floating_ips.keep(ref.tenant, ref.name)
        try:
            yield
        finally:  # the old one may still be there
            if await self.current(verbs, ref):
                await verbs.floating_ips.give_back(ref.tenant, ref.name)

    async def finish(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        """Its floating addresses were not attached to it yet."""
        assert ref.tenant is not None
        if ref.name in await verbs.floating_ips.kept(ref.tenant) and await self.current(verbs, ref):
            self.may(by, "update", ref.tenant)
            await verbs.floating_ips.give_back(ref.tenant, ref.name)

    async def update(self, verbs: Verbs, by: Authority, ref: ObjectReference, before: Form, after: Form) -> None:
        assert ref.tenant is not None
        old, new = before["spec"], after["spec"]
        if before["labels"] != after["labels"] or any(old[name] != new[name] for name in _CHANGED):
            await verbs.instances.reconfigure(
                ref.tenant,
                ref.name,
                by=by,
                labels=after["labels"],
                restart=msgspec.convert(new["restart"], RestartPolicy),
                stop_timeout=new["stop_timeout"],
            )
        if old["networks"] != new["networks"]:
            await self._connect(verbs, ref, msgspec.convert(new["networks"], list[NetworkAttachment]))
        if old["published"] != new["published"]:
            await self._publish(verbs, ref, msgspec.convert(new["published"], list[PublishedPort]))
        resources = {name: value for name, value in new["resources"].items() if old["resources"][name] != value}
        if resources:
            await verbs.instances.update(ref.tenant, ref.name, msgspec.convert(resources, InstancePatch))
        if new["wanted"] == "stopped":
            await verbs.instances.stop(ref.tenant, ref.name)
        elif old["wanted"] == "stopped" or await self._has_failed(verbs, ref):
            await verbs.instances.start(ref.tenant, ref.name, by=by)

    async def _connect(self, verbs: Verbs, ref: ObjectReference, wanted: Sequence[NetworkAttachment]) -> None:
        """Plug and unplug ports. A port that differs in anything is unplugged first, so that its addresses are free."""
        assert ref.tenant is not None

        def kept(instance: Instance) -> Sequence[NetworkAttachment]:
            names = {each.network for each in wanted if each not in instance.spec.networks}
            return [each for each in instance.spec.networks if each.network not in names]

        before = (await verbs.instances.get(ref.tenant, ref.name)).instance
        await verbs.instances.admission.check_networks(before, wanted)
        await verbs.instances.connect(ref.tenant, ref.name, kept)
        try:
            await verbs.instances.connect(ref.tenant, ref.name, lambda _: wanted)
        except InsulaError:  # somebody was faster, or the quota is used up
            with suppress(InsulaError):
                await verbs.instances.connect(ref.tenant, ref.name, lambda _: before.spec.networks)
            raise

    async def _publish(self, verbs: Verbs, ref: ObjectReference, wanted: Sequence[PublishedPort]) -> None:
        assert ref.tenant is not None
        has = (await verbs.instances.get(ref.tenant, ref.name)).instance.spec.published
        patch = PublishedPatch(
            publish=[each for each in wanted if each not in has], withdraw=[each for each in has if each not in wanted]
        )
        await verbs.instances.publish(ref.tenant, ref.name, patch)

    async def _has_failed(self, verbs: Verbs, ref: ObjectReference) -> bool:
        current = await self.current(verbs, ref)
        return current is not None and current.broken is not None

    async def remove(self, verbs: Verbs, by: Authority, ref: ObjectReference) -> None:
        assert ref.tenant is not None
        await verbs.instances.remove(ref.tenant, ref.name, force=True)


def _form(spec: InstanceSpec) -> Form:
    form = form_of(spec, *_ELSEWHERE)
    image = parse(spec.image)
    form["image"] = f"{image.familiar}@{image.digest}" if image.tag and image.digest else image.familiar
    if spec.healthcheck == Healthcheck():
        form["healthcheck"] = None
    return form


def _spec(ref: ObjectReference, spec: Form, labels: dict[str, str]) -> InstanceSpec:
    fields: dict[str, Any] = {name: value for name, value in spec.items() if name != "wanted"}
    return msgspec.convert({**fields, "name": ref.name, "labels": labels}, InstanceSpec)


def _with_kind(spec: Form) -> Form:
    options = spec.get("options")
    return {**spec, "options": {"kind": _USUAL, **options}} if isinstance(options, dict) else spec
