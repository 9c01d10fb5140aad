"""Change limits, labels and CDs of an instance while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from insula.control.allocation.quotas import check_resources, merge
from insula.control.context import Context
from insula.control.disk import with_disk_defaults
from insula.control.instances.admission import Admission, respecify
from insula.control.instances.cdroms import with_cd
from insula.control.instances.checks import Known, as_it_is
from insula.control.instances.specs import relabelled
from insula.control.keys import IMAGES, SHARED
from insula.control.networks.enforcement import Enforcement
from insula.control.tenants import Tenants
from insula.model.errors import Denied, InsulaError
from insula.model.objects import Instance, InstanceSpec
from insula.model.views import InstancePatch, InstanceView, ResourcesPatch
from insula.store.protocol import Compare
from insula.store.typed import Found


class Updating(Protocol):
    """What a change needs of `Instances`."""

    context: Context
    tenants: Tenants
    admission: Admission
    enforcement: Enforcement

    async def commit(
        self, tenant: str, name: str, attempt: Callable[[Known], Awaitable[Found[Instance] | None]]
    ) -> Found[Instance] | None: ...

    async def converged(self, found: Found[Instance]) -> InstanceView: ...


async def update(
    instances: Updating, tenant: str, name: str, patch: ResourcesPatch, keep: Mapping[str, str]
) -> InstanceView:
    """Commit the change, and return when it is in force; after an error it is taken back."""
    before, root = InstanceSpec(image=""), None
    context = instances.context
    limits = ResourcesPatch(**{each: getattr(patch, each) for each in ResourcesPatch.__struct_fields__})
    labels = patch.labels if isinstance(patch, InstancePatch) and patch.labels is not msgspec.UNSET else None
    cdrom = patch.cdrom if isinstance(patch, InstancePatch) else msgspec.UNSET
    changes_cd = cdrom is not msgspec.UNSET

    async def attempt(known: Known) -> Found[Instance]:
        nonlocal before, root
        instance, root = as_it_is(known), known.instance.root
        before, resources = known.instance.spec, known.instance.spec.resources
        if (labels is None and not changes_cd) or limits != ResourcesPatch():
            limited = (await instances.tenants.find(tenant)).value.limits
            checked = check_resources(merge(resources, limits))
            resources = with_disk_defaults(limited, checked, context.settings.storage)
            context.driver(known.instance).check_resize(known.instance, resources, known.status.state)
        new = before.labels if labels is None else relabelled(before.labels, labels)
        if not keep.items() <= new.items():
            raise Denied("the token is for instances with certain labels", "these labels must stay")
        spec = msgspec.structs.replace(before, resources=resources, labels=new)
        there: list[Compare] = []
        if cdrom is not msgspec.UNSET:
            image = await instances.admission.images.find(tenant, cdrom) if cdrom else None
            instance, spec = with_cd(known, instance, spec, cdrom, image and image.value)
            there = [IMAGES.unchanged(image, image.value.tenant or SHARED, image.value.name)] if image else []
        return await respecify(context, instance, known.revision, spec, there=there)

    async def undo(known: Known) -> Found[Instance] | None:
        instance, options = as_it_is(known), before.options if changes_cd else known.instance.spec.options
        spec = msgspec.structs.replace(
            known.instance.spec, resources=before.resources, labels=before.labels, options=options
        )
        if changes_cd and root:
            instance = msgspec.structs.replace(instance, root=root)
        return await respecify(context, instance, known.revision, spec, undo=True)

    found = await instances.commit(tenant, name, attempt)
    assert found
    try:
        return await _in_force(instances, found, relabels=labels is not None)
    except InsulaError:  # the kernel refuses them
        if taken_back := await instances.commit(tenant, name, undo):
            await _in_force(instances, taken_back, relabels=labels is not None)
        raise


async def _in_force(instances: Updating, found: Found[Instance], *, relabels: bool) -> InstanceView:
    """Return when limits are in force, and after other labels the policies that select by them."""
    view = await instances.converged(found)
    if relabels:
        await instances.enforcement.enforced(found.value.tenant)
    return view
