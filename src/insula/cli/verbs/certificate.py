"""insula certificate: make, list and revoke certificates of clients, and replace the authorities that sign."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import age, clean, listing, moment, print_json
from insula.cli.verbs.lifecycle import each
from insula.client import Client
from insula.model.units import parse_duration


def create(arguments: Arguments) -> int:
    options = {} if arguments.ttl is None else {"ttl": arguments.ttl}
    made = connect(arguments).identities.create_certificate(arguments.user, **options)
    if arguments.json:
        print_json(made)
    else:
        print(made["pem"], end="")
    return 0


def ls(arguments: Arguments) -> int:
    views = connect(arguments).identities.certificates(everybody=arguments.all)
    rows = ([each["serial"], each["user"], age(each["created"]), moment(each["expires"])] for each in views)
    return listing(arguments.json, views, ["SERIAL", "USER", "AGE", "EXPIRES"], rows)


def revoke(client: Client, arguments: Arguments, serial: str) -> None:
    client.identities.revoke_certificate(serial)


def rotate(arguments: Arguments) -> int:
    connect(arguments).identities.rotate_authority(arguments.authority, now=arguments.now)
    print(clean(arguments.authority))
    return 0


COMMANDS = {
    "create": Command(
        create,
        "Make a key with a certificate for it, which proves who you are by HTTPS, and print both as PEM.",
        options=[
            Option("--user", "for this user, or TENANT/NAME for a service account; default: you", "USER"),
            Option("--ttl", "valid for so long (90d, which is the most)", "TIME", parse=parse_duration),
        ],
    ),
    "ls": Command(ls, "List your certificates.", options=[Option("-a --all", "those of all users")]),
    "revoke": Command(each(revoke, "serial"), "End certificates at once, and what runs by them.", "SERIAL..."),
    "rotate": Command(
        rotate,
        "Replace the authority that signs the certificate of the `server`, or those of a `client`.",
        "AUTHORITY",
        [Option("--now", "the one before is not trusted any more, as when its key was stolen")],
        details="The authority before is trusted for a time. Remotes learn of a new one when they are used, at most a\n"
        "day later; those that are not used for 30 days need a new invitation. Certificates of clients are valid\n"
        "until they end. With --now, remotes that don't know the new authority need a new invitation, and clients\n"
        "a new certificate.",
    ),
}
