"""``state ID``: the state of a container as runtime.md has it."""

from __future__ import annotations

from insula.model.cpython import dumps
from insula.oci.state import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments


def run(arguments: VerbArguments) -> int:
    container = Container(arguments.root, arguments.id)
    print(dumps(container.oci_state(container.load())))
    return 0
