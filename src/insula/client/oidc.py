"""`Issuer`: a provider of OpenID Connect as a client without a secret uses it.

The device grant (RFC 8628), the authorization code grant with PKCE (RFC 7636) and a redirect to the loopback interface
(RFC 8252), refresh tokens and their revocation (RFC 7009). Redirects of the provider's own addresses are refused, and
answers are bounded.
"""

from __future__ import annotations

import http.client
import ssl
import time
from urllib.parse import urlencode, urlsplit

from insula.model.cpython import dumps, loads
from insula.model.errors import Denied, Failed, Unauthenticated, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
INTERVAL = 5.0
"""Seconds between polls, and by how many more after `slow_down` (RFC 8628, 3.2 and 3.5)."""
_MAX_INTERVAL = 60.0
_MAX_WAIT = 1800.0  # seconds that a device code is waited for
_MAX_SIZE = 1 << 20
_TIMEOUT = 10.0


class Issuer:
    """The provider as GET /v1/login describes it. `loopback`: it may be at http://127.0.0.1."""

    def __init__(self, provider: dict[str, Any], *, loopback: bool = False) -> None:
        self.issuer = str(provider["issuer"])
        self.client_id = str(provider["client_id"])
        self.audience = str(provider.get("audience") or "")
        self.scope = " ".join(map(str, provider.get("scopes") or ["openid"]))
        self.loopback = loopback
        self._authority = str(provider.get("authority") or "")
        self._metadata: dict[str, Any] | None = None

    # -- grants --------------------------------------------------------------------------------------------------------

    def by_device(self, show: Callable[[dict[str, Any]], None], sleep: Callable[[float], None] = time.sleep) -> Tokens:
        """Log in at another device. `show` is called with `verification_uri` and `user_code`. Denied, Unavailable.

        It stops at the first success: providers revoke everything if a used code is sent again.
        """
        device = self._post("device_authorization_endpoint", scope=self.scope, **self._resource())
        if not all(isinstance(device.get(name), str) for name in ("device_code", "user_code", "verification_uri")):
            raise _refused("the device grant", device)
        show(device)
        interval = _seconds(device.get("interval"), INTERVAL, _MAX_INTERVAL)
        left = _seconds(device.get("expires_in"), 600.0, _MAX_WAIT)
        while left > 0:
            sleep(interval)
            left -= max(interval, 0.1)
            answer = self._poll(device["device_code"])
            match answer.get("error"):
                case None:
                    return self._tokens(answer)
                case "authorization_pending":
                    pass
                case "slow_down":
                    interval = min(interval + INTERVAL, _MAX_INTERVAL)
                case "expired_token":
                    break
                case _:
                    raise _refused("the login", answer)
        raise Denied("nobody logged in before the code expired", "try again: `insula login`")

    def _poll(self, code: str) -> dict[str, Any]:
        try:
            return self._post("token_endpoint", grant_type=DEVICE_CODE, device_code=code, **self._resource())
        except Unavailable:  # RFC 8628, 3.5: slower, after a timeout
            return {"error": "slow_down"}

    def authorization(self, redirect: str, state: str, nonce: str, challenge: str) -> str:
        """Return the address that a browser opens for the code grant."""
        fields = {
            "response_type": "code",
            "client_id": self.client_id,
            "redirect_uri": redirect,
            "scope": self.scope,
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            **self._resource(),
        }
        endpoint = self._endpoint("authorization_endpoint")
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(fields)}"

    def by_code(self, code: str, redirect: str, verifier: str, nonce: str) -> Tokens:
        """Exchange an authorization code. Denied if the ID token is not for this login."""
        answer = self._post(
            "token_endpoint",
            grant_type="authorization_code",
            code=code,
            redirect_uri=redirect,
            code_verifier=verifier,
            **self._resource(),
        )
        tokens = self._tokens(answer)
        if payload(str(answer.get("id_token"))).get("nonce") != nonce:
            raise Denied("the provider's answer is for another login", "try again")
        return tokens

    def refresh(self, refresh_token: str) -> Tokens:
        """Exchange a refresh token; the provider may have made it invalid then. Unauthenticated if it is not valid."""
        answer = self._post(
            "token_endpoint", grant_type="refresh_token", refresh_token=refresh_token, **self._resource()
        )
        if answer.get("error") == "invalid_grant":
            raise Unauthenticated("your login has ended at the provider", "`insula login` again")
        found = self._tokens(answer)
        return found if found.refresh else Tokens(found.token, found.expires, refresh_token)

    def revoke(self, refresh_token: str) -> None:
        """Revoke a refresh token. Unavailable."""
        if "revocation_endpoint" in self.metadata():
            self._post("revocation_endpoint", token=refresh_token, token_type_hint="refresh_token")

    def _resource(self) -> dict[str, str]:
        return {"resource": self.audience} if self.audience else {}  # RFC 8707

    def _tokens(self, answer: dict[str, Any]) -> Tokens:
        if "error" in answer:
            raise _refused("the login", answer)
        kind = "access_token" if self.audience else "id_token"
        token = answer.get(kind)
        if not isinstance(token, str) or token.count(".") != 2 or not token.isascii() or not token.isprintable():
            raise Failed(f"the provider gave no {kind} as JWT", "see [[oidc]] in insulad.toml(5), and its client")
        claims, refresh = payload(token), answer.get("refresh_token")
        life = _seconds(claims.get("exp"), 0.0, 1e11) - _seconds(claims.get("iat"), 0.0, 1e11)
        return Tokens(token, time.time() + max(0.0, life), refresh if isinstance(refresh, str) else "")

    # -- requests ------------------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """Return the provider's metadata (OpenID Connect Discovery). Unavailable, Denied."""
        if self._metadata is None:
            found = self._send("GET", f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
            if found.get("issuer") != self.issuer:
                raise Denied(f"{self.issuer} says that it is {found.get('issuer')!r}", "ask the operator of the host")
            self._metadata = found
        return self._metadata

    def _endpoint(self, name: str) -> str:
        found = self.metadata().get(name)
        if not isinstance(found, str):
            raise Failed(f"the provider has no {name}", "try with --browser, or without")
        self._check(found)
        return found

    def _post(self, name: str, **fields: str) -> dict[str, Any]:
        return self._send("POST", self._endpoint(name), urlencode({"client_id": self.client_id, **fields}))

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        own = self.loopback and parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1")
        if (parts.scheme != "https" and not own) or not parts.hostname or "@" in parts.netloc or not url.isprintable():
            raise Denied(f"{url[:200]!r} is no https address", "the provider must have one")

    def _send(self, method: str, url: str, form: str | None = None) -> dict[str, Any]:
        """Send a request; returns the JSON of its answer, also of an error by OAuth. Unavailable."""
        self._check(url)
        parts = urlsplit(url)
        connection: http.client.HTTPConnection
        try:
            if parts.scheme == "https":
                context = ssl.create_default_context(cadata=self._authority or None)
                connection = http.client.HTTPSConnection(parts.netloc, timeout=_TIMEOUT, context=context)
            else:
                connection = http.client.HTTPConnection(parts.netloc, timeout=_TIMEOUT)
            try:
                fields = {"accept": "application/json"}
                if form is not None:
                    fields["content-type"] = "application/x-www-form-urlencoded"
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request(method, target, body=form, headers=fields)
                response = connection.getresponse()
                data = response.read(_MAX_SIZE)
                found = loads(data) if data.strip() else {}
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unavailable(f"{parts.netloc}: {error}", "is the provider up, and reachable?") from None
        if not isinstance(found, dict) or (response.status >= 300 and "error" not in found):
            raise Unavailable(f"{parts.netloc} responded {response.status}", "is the provider up?")
        return found


class Tokens:
    """The token for Insula, when it ends by the clock of this machine, and the refresh token ("": none)."""

    def __init__(self, token: str, expires: float, refresh: str) -> None:
        self.token = token
        self.expires = expires
        self.refresh = refresh

    def __repr__(self) -> str:
        return f"Tokens(expires={self.expires})"  # never the tokens


def payload(token: str) -> dict[str, Any]:
    """Return the claims of a JWT, unverified: it came from the provider by TLS (OpenID Connect Core, 3.1.3.7)."""
    from base64 import urlsafe_b64decode

    try:
        part = token.split(".")[1]
        found = loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def _refused(what: str, answer: dict[str, Any]) -> Denied:
    error = str(answer.get("error") or dumps(sorted(answer)))[:100]
    reason = str(answer.get("error_description") or "")[:300]
    return Denied(f"the provider refused {what}: {error}{f' ({reason})' if reason else ''}", "ask its operator")


def _seconds(value: object, default: float, most: float) -> float:
    """Return a number of the provider's within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        return default
    return min(float(value), most)
