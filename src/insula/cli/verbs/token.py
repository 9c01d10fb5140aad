"""insula token: make, list and revoke tokens."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import age, listing, moment, print_json
from insula.cli.verbs.lifecycle import each
from insula.cli.verbs.run import pair
from insula.client import Client
from insula.model.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def create(arguments: Arguments) -> int:
    options: dict[str, Any] = {
        "description": arguments.description or "",
        "labels": dict(pair(text, "label", default="") for text in arguments.only),
    }
    if arguments.ttl is not None:
        options["ttl"] = arguments.ttl
    made = connect(arguments).identities.create_token(arguments.user, **options)
    if arguments.json:
        print_json(made)
    else:
        print(made["token"])
    return 0


def ls(arguments: Arguments) -> int:
    views = connect(arguments).identities.tokens(everybody=arguments.all)
    header = ["ID", "USER", "FOR", "DESCRIPTION", "AGE", "EXPIRES"]
    return listing(arguments.json, views, header, map(row, views))


def row(view: dict[str, Any]) -> list[Any]:
    only = " ".join(f"{name}={value}" for name, value in view["labels"].items())
    return [
        view["id"],
        view["user"],
        only or None,
        view["description"] or None,
        age(view["created"]),
        moment(view["expires"]),
    ]


def revoke(client: Client, arguments: Arguments, token: str) -> None:
    client.identities.revoke_token(token)


COMMANDS = {
    "create": Command(
        create,
        "Make a token, and print it: it is shown once.",
        options=[
            Option("--user", "for this user, or TENANT/NAME for a service account; default: you", "USER"),
            Option("--ttl", "valid for so long (30d), at most 366d", "TIME", parse=parse_duration),
            Option("--only", "valid only for instances with this label", "NAME[=VALUE]", many=True),
            Option("--description", "what it is for", "TEXT"),
        ],
        details="Keep it in a file with mode 600, and name that by --token-file or INSULA_TOKEN_FILE. A token gives\n"
        "what its owner may do at that moment, but it makes no tokens, users or roles.",
    ),
    "ls": Command(ls, "List your tokens.", options=[Option("-a --all", "those of all users")]),
    "revoke": Command(each(revoke, "id"), "End tokens at once, and what runs by them.", "ID..."),
}
