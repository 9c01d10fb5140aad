"""A daemon with a provider of OpenID Connect on its loopback, for tests of logins."""

from __future__ import annotations

from typing import Any, NamedTuple

from insula.client import Client
from insula.model.errors import InsulaError, Unavailable
from tests.support.daemon import Daemon
from tests.support.provider import CLIENT, ISSUER, IdentityProvider
from tests.support.wait import patiently, until

SETTINGS = f"""
[[oidc]]
issuer = "{ISSUER}"
client_id = "{CLIENT}"
scopes = ["openid", "profile", "groups", "offline_access"]
allow_loopback = true

[[oidc]]
name = "other"
issuer = "{ISSUER}/other"
client_id = "{CLIENT}"
allow_loopback = true
"""
GATE_USER, PORT = 61008, 7443
API = f'[api]\nlisten = ["127.0.0.1:{PORT}"]\nuser = "{GATE_USER}"\n'


class Cloud(NamedTuple):
    """The daemon and its provider, and what the daemon answered while the provider was down."""

    daemon: Daemon
    provider: IdentityProvider
    operator: Client
    problems: str
    refusal: InsulaError

    def client(self, token: str) -> Client:
        return Client(str(self.daemon.run / "users.sock"), token=token, timeout=patiently(60))

    def whoami(self, token: str) -> dict[str, Any]:
        return dict(self.client(token).identities.whoami())

    def restart(self) -> None:
        """Start insulad again, which has used none of its fetches of keys then."""
        self.daemon.stop()
        self.daemon.start()
        until(self.knows_keys, "it knows the provider's keys")

    def knows_keys(self) -> bool:
        try:
            return bool(self.whoami(self.provider.token()))
        except Unavailable:
            return False


def problems(operator: Client) -> str:
    return "\n".join(operator.host.status()["problems"])
