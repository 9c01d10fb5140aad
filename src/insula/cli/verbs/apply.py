"""insula apply -f FILE…: make everything as files declare it. The server reads the files."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import clean, print_json, warn
from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]

DONE = {"none": "unchanged", "create": "created", "update": "changed", "replace": "replaced", "remove": "removed"}
MAX_SIZE = 1 << 20


def run(arguments: Arguments) -> int:
    client = connect(arguments)
    if arguments.schema:
        print_json(client.declared.schema())
        return 0
    given = request(arguments)
    counts: dict[str, int] = {}
    for item in client.declared.apply(scope(arguments), **given):
        result = DONE[item["operation"]] if item["state"] == "done" else item["state"]
        counts[result] = counts.get(result, 0) + 1
        if arguments.json:
            import json

            print(json.dumps(item), flush=True)
        else:
            report(item, result, arguments.tenant)
    if not arguments.json:
        warn(", ".join(f"{count} {result}" for result, count in counts.items()) or "nothing to do")
    return 1 if {"refused", "failed", "skipped"} & set(counts) else 0


def report(item: Object, result: str, tenant: str) -> None:
    """Print a line for the item; the differences too if it was refused."""
    print(clean(f"{name(item, tenant)}  {result}" + why(item)), flush=True)
    for line in item["diff"] if item["state"] == "refused" else ():
        print(f"    {clean(line)}")


def name(item: Object, tenant: str) -> str:
    """Return the name of the item for people, with its tenant if that is another one than `tenant`."""
    owner = f"{item['tenant']}/" if item["tenant"] not in (None, tenant) else ""
    return f"{item['kind']} {owner}{item['name']}"


def why(item: Object) -> str:
    if not item["reason"]:
        return ""
    return f": {item['reason']}" + (f"; hint: {item['advice']}" if item["advice"] else "")


def scope(arguments: Arguments) -> str | None:
    """Return the tenant; None for the host, with --host. UsageError."""
    if arguments.host and arguments.named_tenant:
        raise UsageError("--host and --tenant exclude each other", "with --host each document names its tenant")
    return None if arguments.host else str(arguments.tenant)


def request(arguments: Arguments) -> Object:
    """Return the request for the options. UsageError, Invalid."""
    if not arguments.file:
        raise UsageError(f"{arguments.verb} needs a file", "as in -f world.yaml, or -f - for the standard input")
    names = ("set", "prune", "force", "replace", "allow_empty", "yes")
    return {"files": [load(path) for path in arguments.file]} | {
        each: getattr(arguments, each) for each in names if hasattr(arguments, each)
    }


def load(path: str) -> Object:
    """Read a file; "-" is the standard input. The end of its name says whether it is YAML, TOML or JSON. Invalid."""
    ending = path.rpartition(".")[2]
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            data = file.read(MAX_SIZE + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise Invalid(f"{path} can't be read: {error.strerror}", "name a file, or - for the standard input") from None
    except UnicodeDecodeError as error:
        raise Invalid(f"{path} is not UTF-8, at byte {error.start}", "files are in UTF-8") from None
    if len(data) > MAX_SIZE:
        raise Invalid(f"{path} is larger than {MAX_SIZE >> 20} MiB", "apply it in parts")
    return {"name": path, "format": ending if ending in ("toml", "json") else "yaml", "text": text}


FILES = Option("-f --file", "YAML, TOML or JSON; - is the standard input", "FILE", many=True, complete="file")
HOST = Option("--host", "tenants, users, and all that tenants have: each document names its tenant")
SET = Option("--set", "the set that the objects belong to (default)", "NAME", default="default")
PRUNE = Option("--prune", "remove what the set has, and the files have not any more")
EMPTY = Option("--allow-empty", "accept files that declare nothing")
YES = Option("--yes", "accept that tenants, or more than half of the set, are removed")
FORCE = Option("--force", "take over what was changed by hand, or belongs to another set")
REPLACE = Option("--replace", "remove, and create again, what can't be changed")
COMMANDS = {
    "apply": Command(
        run,
        "Make everything as files declare it. What is so already stays; it can be repeated at any time.",
        options=[
            FILES,
            SET,
            PRUNE,
            FORCE,
            REPLACE,
            EMPTY,
            YES,
            HOST,
            Option("--schema", "print the JSON Schema of a document"),
        ],
        details="""\
Fields in a file count; others stay as they are, unless this set has set them before. What was changed by hand since is
a conflict. Objects are created in the order of their dependencies, whatever the order of the files. If one can't be
made, what depends on it is skipped and the others are made. Exit status: 1 if something was not done.""",
    )
}
