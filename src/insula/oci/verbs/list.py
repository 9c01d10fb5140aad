"""``list``: print the containers below --root as a table or as JSON."""

from __future__ import annotations

import os

from insula.model.cpython import dumps
from insula.model.errors import NotFound
from insula.oci.log import one_line
from insula.oci.state import containers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments

_COLUMNS = ("id", "pid", "status", "bundle", "created", "owner")


def run(arguments: VerbArguments) -> int:
    if arguments.named_root and not os.path.isdir(arguments.root):  # the default one is made by the first container
        raise NotFound(f"--root {arguments.root}: there is no such directory", "the first `create` makes it")
    found = containers(arguments.root)
    if arguments.quiet:
        for container in found:
            print(container.id)
        return 0
    # one that is deleted meanwhile has no record any more
    states = [container.oci_state(record) for container in found if (record := container.record())]
    if arguments.format == "json":
        print(dumps(states))
        return 0
    rows = [[name.upper() for name in _COLUMNS]]
    rows += [[one_line(str(state[name])) for name in _COLUMNS] for state in states]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
