"""insula remote: reach Insula on other machines, by HTTPS."""

from __future__ import annotations

import os
import sys

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import clean, listing, print_json, warn
from insula.client import Client, remotes
from insula.model.cpython import dumps, loads
from insula.model.errors import Conflict, Denied, Invalid, NotFound
from insula.model.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PREFIX = "insula-join:"
_LONGEST = 16384


def invite(arguments: Arguments) -> int:
    options = {} if arguments.ttl is None else {"ttl": arguments.ttl}
    invitation = connect(arguments).identities.invite(arguments.user, **options)
    if arguments.json:
        print_json(invitation)
    else:
        print(encode(invitation))
    return 0


def fingerprint(arguments: Arguments) -> int:
    from insula.client.https import certificates

    found = list(certificates(str(connect(arguments).identities.login()["authority"])))
    if not found:
        raise NotFound("this host is not reached by HTTPS", "set [api] listen in insulad.toml(5)")
    if arguments.json:
        print_json(found)
    else:
        print("\n".join(found))
    return 0


def encode(invitation: dict[str, Any]) -> str:
    """Return an invitation as one word."""
    from base64 import urlsafe_b64encode

    fields = {name: invitation[name] for name in ("addresses", "authority", "token")}
    return PREFIX + urlsafe_b64encode(dumps(fields).encode()).decode()


def decode(text: str) -> dict[str, Any]:
    """Return the invitation of `encode`. Invalid."""
    from base64 import urlsafe_b64decode

    try:
        found = loads(urlsafe_b64decode(text.removeprefix(PREFIX)).decode()) if text.startswith(PREFIX) else None
        if isinstance(found, dict) and {"addresses", "authority", "token"} <= found.keys() and found["addresses"]:
            return found
    except ValueError:
        pass
    raise Invalid("this is no invitation", f"give the whole word that begins with {PREFIX}")


def add(arguments: Arguments) -> int:
    from insula.client.https import HttpsRemote

    if arguments.name in (*remotes.names(), remotes.LOCAL):
        raise Conflict(f"there is a remote {arguments.name} already", "choose another name, or remove that one")
    if sys.stdin.isatty():
        warn("Paste the invitation (`insula remote invite USER` printed it), and press Enter:")
    invitation = decode(sys.stdin.readline(_LONGEST).strip())
    addresses, authority = [str(each) for each in invitation["addresses"]], str(invitation["authority"])
    proof: dict[str, str] = {}
    if arguments.certificate:
        proof["certificate"] = private(arguments.certificate)
        Client(remote=HttpsRemote(addresses, authority, **proof)).identities.whoami()  # before it is kept
    else:
        invited = HttpsRemote(addresses, authority, str(invitation["token"]))
        proof["token"] = str(Client(remote=invited).identities.join()["token"])
    remotes.save(arguments.name, {"addresses": addresses, "authority": authority, **proof})
    remotes.use(arguments.name)
    user = Client(remote=HttpsRemote(addresses, authority, **proof)).identities.whoami()["user"]
    print(f"{clean(arguments.name)}: {clean(user)} at {clean(addresses[0])}, used from now on")
    return 0


def private(path: str) -> str:
    """Return the absolute path of a file with a key. Invalid, Denied if others can read it."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}", "name a file from `insula certificate create`") from None
    if mode & 0o077:
        raise Denied(f"{path} can be read by other users", f"chmod 600 {path}")
    return os.path.abspath(path)


def ls(arguments: Arguments) -> int:
    now = remotes.current()
    found: list[dict[str, Any]] = [{"name": remotes.LOCAL, "addresses": [], "current": now == remotes.LOCAL}]
    for name in remotes.names():
        found.append({"name": name, "addresses": remotes.load(name)["addresses"], "current": now == name})
    rows = ([each["name"], ", ".join(each["addresses"]) or None, "*" if each["current"] else ""] for each in found)
    return listing(arguments.json, found, ["NAME", "ADDRESSES", "USED"], rows)


def use(arguments: Arguments) -> int:
    remotes.use(arguments.name)
    print(clean(arguments.name))
    return 0


def rm(arguments: Arguments) -> int:
    remotes.remove(arguments.name)
    print(clean(arguments.name))
    return 0


COMMANDS = {
    "invite": Command(
        invite,
        "Print an invitation for a user, who adds this host with it on another machine.",
        "USER",
        [
            Option(
                "--ttl", "the token that it is exchanged for is valid for so long (30d)", "TIME", parse=parse_duration
            )
        ],
        details="It is good once, for 15 minutes: pass it on by a way that others can't read. It has the certificate\n"
        "of this host's authority, so that nobody else can answer in its place.",
    ),
    "add": Command(
        add,
        "Add a host with an invitation, which is read from the standard input, and use it from now on.",
        "NAME",
        [Option("--certificate", "prove who you are by this key and certificate, instead of a token", "FILE")],
        details="FILE is what `insula certificate create` printed, with mode 600.",
    ),
    "fingerprint": Command(
        fingerprint,
        "Print the fingerprint of this host's authority, which `insula login` takes.",
        details="It is no secret, but pass it on by a way on which nobody can change it.",
    ),
    "ls": Command(ls, "List the remotes."),
    "use": Command(use, "Use this remote from now on; `local` is this machine.", "NAME"),
    "rm": Command(rm, "Forget a remote, and its token.", "NAME"),
}
