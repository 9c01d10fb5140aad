"""insula update: change limits and labels of an instance."""

from __future__ import annotations

from collections.abc import Callable

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, or_none, whole, zero_or
from insula.cli.output import print_json
from insula.cli.verbs.run import pair
from insula.cli.verbs.tenant import changes, given
from insula.model.units import parse_cpus, parse_size


def run(arguments: Arguments) -> int:
    names = ("cpus", "memory", "pids", "disk", "inodes")
    relabels = arguments.label or arguments.unlabel
    limits = given(arguments, *names) if relabels else changes(arguments, *names)
    if relabels:
        limits["labels"] = dict(pair(text, "label", default="") for text in arguments.label)
        limits["labels"] |= dict.fromkeys(arguments.unlabel)
    client = connect(arguments)
    view = client.instances.update(arguments.tenant, arguments.name, **limits)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def _or_none(parse: Callable[[str], object]) -> Callable[[str], object]:
    return zero_or(or_none(parse), "none")


COMMANDS = {
    "update": Command(
        run,
        "Change limits and labels of the instance NAME, at once. Those that are not given stay unchanged.",
        "NAME",
        [
            Option("--cpus", "at most so many CPUs, as in 0.5, or none for no limit", "N", parse=_or_none(parse_cpus)),
            Option("-m --memory", "at most so much memory, as in 64m, or none", "SIZE", parse=_or_none(parse_size)),
            Option("--pids", "at most so many processes, or none", "N", parse=or_none(whole(1))),
            Option("--disk", "at most so many bytes on disk, as in 1g, or none", "SIZE", parse=_or_none(parse_size)),
            Option("--inodes", "at most so many files and directories, or none", "N", parse=or_none(whole(16))),
            Option("-l --label", "set a label; policies that select by it apply at once", "NAME[=VALUE]", many=True),
            Option("--unlabel", "remove a label", "NAME", many=True),
        ],
        details="Refused if they exceed the tenant's limits, or are below the current usage.",
        complete={"NAME": "instance"},
        elsewhere={
            "--pids-limit": "did you mean --pids?",
            "--restart": "the restart policy is that of `insula run`",
            "--memory-swap": "--memory is memory and swap together",
        },
    )
}
