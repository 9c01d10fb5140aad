"""The connection of a verb to the daemon: by the socket or by HTTPS, and by a token if the user names one.

A token is never an argument or an environment variable, which other users of the machine may see, and which end up in
the history of a shell. It is read from a file that only its owner can read, such as /dev/stdin or /dev/fd/3.
"""

from __future__ import annotations

import os
from time import time

from insula.client import Client, remotes
from insula.model.errors import Denied, InsulaError, Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.cli.options import Arguments

_LONGEST = 16384
_DAY = 86400.0
_SOON = 7 * _DAY
"""Seconds before the end of a token or certificate from which on its owner is warned."""


def connect(arguments: Arguments) -> Client:
    """Return a client for the global options `--socket`, `--remote` and `--token-file`. Invalid, Denied, NotFound.

    A socket that is named counts more than a remote that is used by default.
    """
    path = arguments.token_file or os.environ.get("INSULA_TOKEN_FILE")
    token = read_token(path) if path else None
    if arguments.remote is None and (arguments.socket or os.environ.get("INSULA_SOCKET")):
        return Client(arguments.socket, token=token)
    return connect_to(arguments.remote or remotes.current(), arguments.socket, token)


def connect_to(name: str, path: str | None = None, token: str | None = None) -> Client:
    """Return a client for a remote, or for the socket of this machine at `path`. NotFound, Denied."""
    if name == remotes.LOCAL:
        return Client(path, token=token)
    from insula.client.https import HttpsRemote

    found = remotes.load(name)
    token = token or (None if found.get("certificate") else found.get("token"))
    if token is None and "login" in found:
        from insula.client.sessions import token_of

        token = token_of(name, found)
    client = Client(remote=HttpsRemote(found["addresses"], found["authority"], token, found.get("certificate")))
    if time() - found.get("checked", 0.0) > _DAY:
        _check_authority(name, client)
        if "login" not in found:  # which is refreshed
            _warn_of_the_end(name, client)
    return client


def _check_authority(name: str, client: Client) -> None:
    """Ask the host by which certificates it wants to be known: it may be rotating its authority. They are used from the
    next command on. An attempt that fails counts as well."""
    authority = _authority_of(client)
    with remotes.RemoteLock(name):
        found = remotes.load(name)
        remotes.save(name, {**found, "authority": authority or found["authority"], "checked": time()})


def _warn_of_the_end(name: str, client: Client) -> None:
    """Print a warning if the proof that this remote is used with ends soon. It is called once a day."""
    try:
        expires = client.identities.whoami()["expires"]
    except InsulaError:
        return  # what the user has asked for tells why
    if expires and expires - time() < _SOON:
        from insula.cli.output import moment, warn

        warn(f"warning: your access to {name} ends on {moment(expires)}; hint: ask for another invitation")


def _authority_of(client: Client) -> str | None:
    """Return the certificates of the host's authorities, None if they can't be asked for."""
    try:
        return str(client.identities.authorities()["server"]) or None
    except InsulaError:
        return None  # what the user has asked for tells why


def read_token(path: str) -> str:
    """Read a token, with or without a newline, from a file that only its owner can read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            data = os.read(fd, _LONGEST)
        finally:
            os.close(fd)
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}", "name a file with a token") from None
    if status.st_mode & 0o170000 == 0o100000 and status.st_mode & 0o077:
        raise Denied(f"{path} can be read by other users", f"chmod 600 {path}")
    token = data.strip().decode("ascii", "replace")
    if not token.startswith(("insula_", "ey")) or not token.isprintable() or " " in token:  # a JWT begins with {"
        raise Invalid(f"{path} has no token", "write what `insula token create` printed into it")
    return token
