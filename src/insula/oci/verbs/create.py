"""``create ID``: make a container from a bundle. Its process waits for ``start``.

The container is that process, its control group, and its directory below --root, which later commands read.
"""

from __future__ import annotations

from insula.container import wire
from insula.container.create.steps import StepError
from insula.kernel.rollback import Rollback
from insula.oci import creation
from insula.oci.failure import explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments


def run(arguments: VerbArguments) -> int:
    with Rollback() as undo:
        try:
            made = creation.make(arguments, undo, detached=True, later=True)
            wire.send(made.child.sync, {"event": "created"})
        except StepError as error:
            raise explain(error) from None
        undo.keep()
    return 0
