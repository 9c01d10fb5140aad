"""The claims of tokens of OpenID Connect: what they must say, and what Insula takes from them.

Of each provider one kind of token is accepted: with `audience` in the settings access tokens by RFC 9068, which say so
by their type, else ID tokens of the client (OpenID Connect Core, 2). So neither is taken for the other. The signature
is checked before (providers.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from insula.model.errors import Denied, Unauthenticated
from insula.model.oidc import OidcSettings

LEEWAY = 60.0
"""Seconds by which the clocks of the provider and of this host may differ."""
MAX_LIFE = 86400.0
"""Seconds that a token may be valid: roles that come by a group last as long."""
MAX_GROUPS = 1000
_MAX_SUBJECT = 255  # OpenID Connect Core, 2
_MAX_GROUP = 256
_MAX_NAME = 256
_LATEST = 1e11
_HINT = "log in again: `insula login`"


@dataclass(frozen=True)
class OidcClaims:
    """What a valid token says. The identity is `issuer` with `subject`; `name` is for people to read. `provider` is the
    issuer's name in the settings, `expires` the end of the token, in seconds since the epoch."""

    issuer: str
    subject: str
    provider: str
    name: str = ""
    groups: frozenset[str] = frozenset()
    expires: float = 0.0

    @property
    def ends(self) -> float:
        """When its rights end."""
        return self.expires + LEEWAY


def check(settings: OidcSettings, header: Mapping[str, Any], claims: Mapping[str, Any], now: float) -> OidcClaims:
    """Return what a token says whose signature is right. Unauthenticated unless it is for this API, and valid now;
    Denied if its groups are left out."""
    if claims.get("iss") != settings.issuer:
        raise Unauthenticated("the token is of another issuer", _HINT)
    _check_kind(settings, header, claims)
    expires = _check_times(claims, now)
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT or not _plain(subject):
        raise Unauthenticated("the token has no subject", "see the provider's settings of the client")
    name = claims.get(settings.name_claim)
    return OidcClaims(
        issuer=settings.issuer,
        subject=subject,
        provider=settings.name,
        name=name[:_MAX_NAME] if isinstance(name, str) else "",
        groups=_groups(settings.groups_claim, claims),
        expires=expires,
    )


def _check_kind(settings: OidcSettings, header: Mapping[str, Any], claims: Mapping[str, Any]) -> None:
    """Check that it is the accepted kind of token, and meant for this API."""
    kind = str(header.get("typ") or "").lower().removeprefix("application/")
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    if settings.audience:
        if kind != "at+jwt":
            raise Unauthenticated("the token is no access token by RFC 9068", "its type must be at+jwt")
        if settings.audience not in audiences:
            raise Unauthenticated("the token is for another audience", _HINT)
        return
    if kind not in ("", "jwt"):
        raise Unauthenticated(f"the token is no ID token: its type is {kind[:40]!r}", _HINT)
    if settings.client_id not in audiences:
        raise Unauthenticated("the token is for another client", _HINT)
    party = claims.get("azp")
    if party != settings.client_id and (party is not None or len(audiences) > 1):
        raise Unauthenticated("the token was issued to another client", _HINT)


def _check_times(claims: Mapping[str, Any], now: float) -> float:
    """Check when the token is valid; returns its end."""
    expires, issued = _moment(claims, "exp"), _moment(claims, "iat")
    start = _moment(claims, "nbf") if "nbf" in claims else issued
    clocks = f"the clock of this host says {_utc(now)}"
    if now > expires + LEEWAY:
        raise Unauthenticated(f"the token expired at {_utc(expires)}, and {clocks}", _HINT)
    for what, moment in (("issued", issued), ("valid from", start)):
        if moment > now + LEEWAY:
            message = f"the token is {what} {_utc(moment)} by the provider's clock, and {clocks}"
            raise Unauthenticated(message, "set the clocks by NTP")
    if expires - issued > MAX_LIFE:
        raise Unauthenticated(
            f"the token is valid for {expires - issued:g} s", f"let the provider issue those of {MAX_LIFE:g} s at most"
        )
    return expires


def _moment(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unauthenticated(f"the token has no time {name}", _HINT)
    if not 0 <= value < _LATEST:
        raise Unauthenticated(f"the token's time {name} is out of bounds", _HINT)
    return float(value)


def _groups(claim: str, claims: Mapping[str, Any]) -> frozenset[str]:
    """Return the groups. Providers leave them out of a token if there are too many (OpenID Connect Core, 5.6.2): rights
    must not depend on a part, nor look as if there were none."""
    elsewhere = claims.get("_claim_names")
    if (isinstance(elsewhere, dict) and claim in elsewhere) or (
        claims.get("hasgroups") is True and claim not in claims
    ):
        raise Denied(
            "the token has too many groups: the provider has left them out (groups overage)",
            "let the provider put only the groups of this application into tokens",
        )
    found = claims.get(claim, [])
    groups = [found] if isinstance(found, str) else found
    if not isinstance(groups, list) or not all(isinstance(each, str) for each in groups):
        raise Unauthenticated(f"the claim {claim} is no list of texts", "see the provider's settings of the client")
    if len(groups) > MAX_GROUPS:
        raise Denied(
            f"the token has {len(groups)} groups", f"let the provider put at most {MAX_GROUPS} of this application"
        )
    return frozenset(each for each in groups if 0 < len(each) <= _MAX_GROUP and each.isprintable())


def _plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
