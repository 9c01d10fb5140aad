"""``resume ID``: thaw the control group of a paused container."""

from __future__ import annotations

from insula.model.errors import Conflict
from insula.oci.state import Container
from insula.oci.verbs.pause import group_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments


def run(arguments: VerbArguments) -> int:
    container = Container(arguments.root, arguments.id)
    with container:
        record = container.load()
        group = group_of(record)
        if not group.frozen():
            raise Conflict(
                f"container {container.id} is {container.status(record)}", "only a paused container can be resumed"
            )
        group.thaw()
    return 0
