"""`respecify_published`: changes the published ports of an instance, while it runs or not."""

from __future__ import annotations

import msgspec

from insula.control.instances.admission import Admission, respecify
from insula.control.instances.checks import Known, as_it_is
from insula.control.instances.specs import check_published
from insula.control.networks.external import GUARD, claims_of, owner_of
from insula.model import publishing
from insula.model.errors import NotFound
from insula.model.objects import Instance, PublishedPort
from insula.model.views import PublishedPatch
from insula.store.protocol import TransactionConflict
from insula.store.typed import Found


async def respecify_published(admission: Admission, known: Known, patch: PublishedPatch) -> Found[Instance] | None:
    """Commit the changed ports with their claims; None if nothing changes. Invalid, NotFound, Conflict;
    TransactionConflict if the instance was changed meanwhile."""
    before = as_it_is(known)
    wanted = [each for each in before.spec.published if each not in patch.withdraw]
    for each in patch.withdraw:
        if each not in before.spec.published:
            hint = "`insula inspect` shows the ports that it publishes"
            raise NotFound(f"instance {before.name} does not publish {_show(each)}", hint)
    wanted += [each for each in patch.publish if each not in wanted]
    wanted = check_published(wanted, before.spec.networks)
    if wanted == before.spec.published:
        return None
    spec = msgspec.structs.replace(before.spec, published=wanted)
    while True:
        claims = await admission.external.plan(owner_of(before), claims_of(wanted), claims_of(before.spec.published))
        try:
            return await respecify(admission.context, before, known.revision, spec, claims=claims)
        except TransactionConflict as conflict:
            if conflict.key != GUARD:  # others may claim as many ports as they like meanwhile
                raise


def _show(published: PublishedPort) -> str:
    return publishing.show(*msgspec.structs.astuple(published))
