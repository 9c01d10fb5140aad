"""insula export: write an instance's root file system as a tar, as `docker export`."""

from __future__ import annotations

import os

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.terminal import STDOUT, write_all
from insula.cli.verbs.image import Replacing
from insula.model.errors import Invalid


def run(arguments: Arguments) -> int:
    if arguments.output is None and os.isatty(STDOUT):
        raise Invalid("an archive can't be written to a terminal", "name a file with -o, or redirect the output")
    with connect(arguments).instances.export(arguments.tenant, arguments.name) as response:
        if arguments.output is None:
            for data in response:
                write_all(STDOUT, data)
        else:
            with Replacing(arguments.output) as file:
                file.writelines(response)
    return 0


COMMANDS = {
    "export": Command(
        run,
        "Write an instance's root file system into a tar.",
        "NAME",
        [Option("-o --output", "the file (standard output)", "FILE", complete="file")],
        complete={"NAME": "instance"},
        details="""\
Its mounts are left out (/proc, /sys, /dev, a tmpfs, /etc/hosts and the like), and so are devices and sockets.
`insula image import FILE NAME` makes an image of it; the command, variables and user of the image are not in it.""",
    ),
}
