"""``pause ID``: stop every process of a container by the freezer of its control group."""

from __future__ import annotations

from insula.kernel.cgroups import Cgroup
from insula.model.errors import Conflict, Unavailable
from insula.oci.state import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments
    from insula.oci.state import StateRecord


def run(arguments: VerbArguments) -> int:
    container = Container(arguments.root, arguments.id)
    with container:
        record = container.load()
        status = container.status(record)
        if status not in ("running", "created"):
            raise Conflict(f"container {container.id} is {status}", "only a running container can be paused")
        group_of(record).freeze()
    return 0


def group_of(record: StateRecord) -> Cgroup:
    """The control group of a container; Unavailable if it was made without one."""
    if not record["cgroup"]:
        raise Unavailable(f"container {record['id']} has no control group", "it was made without a cgroup manager")
    return Cgroup(record["cgroup"])
