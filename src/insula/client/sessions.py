"""Logins by OpenID Connect, which are kept with the remotes: `login` in a remote's file.

It has the provider, the token, when that ends, and the refresh token. Providers make a refresh token invalid when it
was used, and some end the whole login if it is used twice: so only one process at a time refreshes, and the others take
what it got.
"""

from __future__ import annotations

from insula.client import remotes
from insula.model.errors import Unauthenticated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.client.oidc import Tokens

_EARLY = 30.0  # seconds before its end, a token is refreshed


def token_of(name: str, remote: dict[str, Any]) -> str:
    """Return the token of a remote's login, refreshed if it ends soon. Unauthenticated, Unavailable, Denied."""
    from time import time

    if remote["login"]["expires"] - time() > _EARLY:
        return str(remote["login"]["token"])
    with remotes.RemoteLock(name):
        remote = remotes.load(name)  # as another process may have left it
        login = remote.get("login") or {}
        if login.get("expires", 0.0) - time() > _EARLY:
            return str(login["token"])
        if not login.get("refresh"):
            raise Unauthenticated(f"your login at {name} has ended", f"`insula login {name}`")
        from insula.client.oidc import Issuer

        tokens = Issuer(login["provider"], loopback=login["loopback"]).refresh(login["refresh"])
        remotes.save(name, {**remote, "login": {**login, **fields(tokens)}})
    return tokens.token


def fields(tokens: Tokens) -> dict[str, Any]:
    return {"token": tokens.token, "expires": tokens.expires, "refresh": tokens.refresh}
