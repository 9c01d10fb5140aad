"""``run ID``: create and start a container, wait for its end, and delete it. Ends as its process did.

With --detach it returns when the process runs; the container is then like one that was created and started.
"""

from __future__ import annotations

from insula.container.create.steps import StepError
from insula.kernel.rollback import Rollback
from insula.oci import creation, foreground
from insula.oci.failure import explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments


def run(arguments: VerbArguments) -> int:
    waits = not arguments.detach
    with Rollback() as undo:
        try:
            made = creation.make(arguments, undo, detached=not waits)
            if waits:
                foreground.hold_signals()
            creation.start(made)
        except StepError as error:
            raise explain(error) from None
        if not waits:
            undo.keep()
            creation.await_ready(made)
            return 0
        if made.notifications >= 0:
            from insula.oci import notifications

            notifications.forward_beside(made.notifications, made.child.pidfd, made.warn)
        made.container.unlock()  # others may look at it, pause it, join it
        status = foreground.wait(made.child.pid, made.master)
        if arguments.keep:
            undo.keep()
    return status
