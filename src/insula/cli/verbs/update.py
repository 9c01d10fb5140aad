"""insula update: change limits, labels and published ports of an instance."""

from __future__ import annotations

from collections.abc import Callable

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, or_none, whole, zero_or
from insula.cli.output import print_json, warn
from insula.cli.verbs.run import published
from insula.cli.verbs.tenant import changes, given, new_labels
from insula.model.units import parse_cpus, parse_size


def run(arguments: Arguments) -> int:
    names = ("cpus", "memory", "pids", "disk", "inodes")
    publish, withdraw = arguments.publish, arguments.unpublish
    relabels = arguments.label or arguments.unlabel
    beside = relabels or publish or withdraw or arguments.cdrom
    limits = given(arguments, *names) if beside else changes(arguments, *names)
    if arguments.cdrom:
        limits["cdrom"] = None if arguments.cdrom == "none" else arguments.cdrom
    if relabels:
        limits["labels"] = new_labels(arguments.label, arguments.unlabel)
    client = connect(arguments)
    if publish or withdraw:
        view = client.instances.publish(arguments.tenant, arguments.name, publish, withdraw)
    if limits:
        view = client.instances.update(arguments.tenant, arguments.name, **limits)
    for each in view["status"].get("notes", ()):
        warn(f"note: {each}")
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def _or_none(parse: Callable[[str], object]) -> Callable[[str], object]:
    return zero_or(or_none(parse), "none")


COMMANDS = {
    "update": Command(
        run,
        "Change limits, labels and published ports of the instance NAME, at once. What is not given stays unchanged.",
        "NAME",
        [
            Option("--cpus", "at most so many CPUs, as in 0.5, or none for no limit", "N", parse=_or_none(parse_cpus)),
            Option("-m --memory", "at most so much memory, as in 64m, or none", "SIZE", parse=_or_none(parse_size)),
            Option("--pids", "at most so many processes, or none", "N", parse=or_none(whole(1))),
            Option("--disk", "at most so many bytes on disk, as in 1g, or none", "SIZE", parse=_or_none(parse_size)),
            Option("--inodes", "at most so many files and directories, or none", "N", parse=or_none(whole(16))),
            Option("--cdrom", "the image of a CD for the drive of a machine, or none", "IMAGE", complete="image"),
            Option("-l --label", "set a label; policies that select by it apply at once", "NAME[=VALUE]", many=True),
            Option("--unlabel", "remove a label", "NAME", many=True),
            Option(
                "-p --publish",
                "publish a further port or range of the host, as in 8080:80",
                "[ADDRESS:]PORT:PORT[/udp]",
                many=True,
                parse=published,
            ),
            Option(
                "--unpublish",
                "publish it no longer; open connections end",
                "[ADDRESS:]PORT:PORT[/udp]",
                many=True,
                parse=published,
            ),
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
