"""insula login and logout: be a user of a provider of OpenID Connect on a remote host."""

from __future__ import annotations

from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import clean, warn
from insula.client import Client, remotes
from insula.model.errors import Conflict, Invalid, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PORT = 7443


def login(arguments: Arguments) -> int:
    from insula.client.https import HttpsRemote
    from insula.client.oidc import Issuer
    from insula.client.sessions import fields

    name, remote = _host(arguments)
    info = Client(remote=HttpsRemote(remote["addresses"], remote["authority"])).identities.login()
    provider = _chosen(info["providers"], arguments.provider)
    issuer = Issuer(provider, loopback=arguments.allow_loopback)
    if arguments.browser:
        from insula.cli.loopback import log_in

        tokens = log_in(issuer, _open)
    else:
        tokens = issuer.by_device(_show)
    kept = {"provider": provider, "loopback": arguments.allow_loopback, **fields(tokens)}
    with remotes.RemoteLock(name):
        remotes.save(name, {"addresses": remote["addresses"], "authority": remote["authority"], "login": kept})
    remotes.use(name)
    client = Client(remote=HttpsRemote(remote["addresses"], remote["authority"], tokens.token))
    user = client.identities.whoami()["user"]
    print(f"{clean(name)}: {clean(user)} at {clean(remote['addresses'][0])}, used from now on")
    return 0


def _host(arguments: Arguments) -> tuple[str, dict[str, Any]]:
    """Return the name of the remote, and what is known of it. The host is never trusted without a proof."""
    server = arguments.server or remotes.current()
    if not server.startswith("https://"):
        if server == remotes.LOCAL or arguments.name or arguments.fingerprint:
            raise UsageError("it takes the address of a host", "as in https://cloud.example.com:7443")
        return server, remotes.load(server)
    address = _address(server)
    name = arguments.name or address.rpartition(":")[0].strip("[]").replace(".", "-").replace(":", "-").lower()[:63]
    if name in remotes.names():
        known = remotes.load(name)
        if address not in known["addresses"]:
            raise Conflict(f"the remote {name} is another host", "choose another name with --name")
        return name, known
    if not arguments.fingerprint:
        raise Invalid(
            f"{server} is not known, and nobody is trusted at first sight",
            "give --fingerprint (its operator has it from `insula remote fingerprint`), or add it by an invitation",
        )
    from insula.client.https import authority_at

    return name, {"addresses": [address], "authority": authority_at(address, arguments.fingerprint)}


def _address(server: str) -> str:
    """Return HOST:PORT of an address. Invalid."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(server)
        host, port = parts.hostname or "", parts.port or PORT
    except ValueError:
        host, port = "", 0
    if not host or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise Invalid(f"{server} is no address of a host", "as in https://cloud.example.com:7443")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _chosen(providers: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    found = [each for each in providers if name in (None, each["name"])]
    if len(found) == 1:
        return found[0]
    known = ", ".join(each["name"] for each in providers)
    if not known:
        raise NotFound("this host has no provider to log in at", "its operator sets [[oidc]] in insulad.toml(5)")
    raise NotFound(f"there is no provider {name}" if name else "it has several providers", f"--provider, of {known}")


def _show(device: dict[str, Any]) -> None:
    warn(f"Open {device['verification_uri']} on any device, and enter the code {device['user_code']}")
    if isinstance(device.get("verification_uri_complete"), str):
        warn(f"or open {device['verification_uri_complete']}")


def _open(url: str) -> None:
    import webbrowser

    warn(f"Opening {url}")
    webbrowser.open(url)


def logout(arguments: Arguments) -> int:
    from insula.client.oidc import Issuer
    from insula.model.errors import InsulaError

    name = arguments.remote_name or remotes.current()
    if name == remotes.LOCAL:
        raise UsageError("this machine has no login", "name a remote")
    with remotes.RemoteLock(name):
        remote = remotes.load(name)
        login = remote.pop("login", None)
        if login is None:
            raise NotFound(f"you are not logged in at {name} by a provider", "`insula remote rm` forgets a remote")
        remotes.save(name, remote)
    if login.get("refresh"):
        try:
            Issuer(login["provider"], loopback=login["loopback"]).revoke(login["refresh"])
        except InsulaError as error:
            warn(f"the login is forgotten here, but was not ended at the provider: {error.message}")
    print(clean(name))
    return 0


COMMANDS = {
    "login": Command(
        login,
        "Log in at a remote host by its provider of OpenID Connect, and use it from now on.",
        "[SERVER]",
        [
            Option("--name", "the name of the remote; default: from the address", "NAME"),
            Option("--fingerprint", "of the host's authority, as its operator says", "SHA256"),
            Option("--provider", "one of several providers", "NAME"),
            Option("--browser", "log in with a browser on this machine"),
            Option("--allow-loopback", "a provider may be at http://127.0.0.1: for tests"),
        ],
        details="SERVER is https://HOST[:7443], or the name of a remote; default: the one in use. You log in with any\n"
        "device, at the address that is shown. Tokens are kept in ~/.config/insula/remotes with mode 600.",
    ),
    "logout": Command(
        logout, "End the login at a remote host, here and at the provider.", "[REMOTE_NAME]", details="Default: in use."
    ),
}
