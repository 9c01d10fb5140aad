"""insula screenshot: a picture of the screen of a virtual machine."""

from __future__ import annotations

import os

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.terminal import STDOUT, write_all
from insula.cli.verbs.image import Replacing
from insula.model.errors import Invalid


def run(arguments: Arguments) -> int:
    if arguments.output is None and os.isatty(STDOUT):
        raise Invalid("a picture can't be written to a terminal", "name a file with -o, or redirect the output")
    picture = connect(arguments).instances.screenshot(arguments.tenant, arguments.name)
    if arguments.output is None:
        write_all(STDOUT, picture)
    else:
        with Replacing(arguments.output) as file:
            file.write(picture)
    return 0


COMMANDS = {
    "screenshot": Command(
        run,
        "Write a picture of the screen of a virtual machine, a PNG.",
        "NAME",
        [Option("-o --output", "the file (standard output)", "FILE", complete="file")],
        complete={"NAME": "instance"},
        details="Machines of disk images have a screen (`insula image import --vm`); others don't.",
    ),
}
