"""insula diff -f FILE…: show what `insula apply` would change."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command
from insula.cli.output import clean, error, print_json
from insula.cli.verbs.apply import EMPTY, FILES, FORCE, HOST, PRUNE, SET, YES, name, request, scope, why
from insula.model.errors import InsulaError


def run(arguments: Arguments) -> int:
    """Exit as diff(1): 0 for no difference, 1 for some, 2 for an error."""
    try:
        items = connect(arguments).declared.diff(scope(arguments), **request(arguments))
    except InsulaError as problem:
        error(problem.message, problem.hint)
        return 2
    if arguments.json:
        print_json(items)
    changed = [item for item in items if item["operation"] != "none" or item["state"] != "planned"]
    for item in changed if not arguments.json else ():
        print(clean(f"{name(item, arguments.tenant)}  {item['operation']}{why(item)}"))
        for line in item["diff"]:
            print(clean(line))
    if any(item["state"] == "failed" for item in items):
        return 2
    return 1 if changed else 0


COMMANDS = {
    "diff": Command(
        run,
        "Show what `insula apply` would change.",
        options=[FILES, SET, PRUNE, FORCE, EMPTY, YES, HOST],
        details="Exit status: 0 if nothing differs, 1 if something does, 2 for an error.",
    )
}
