"""Providers of OpenID Connect: their keys, and the tokens that they have signed (JWT, RFC 7519).

The keys are fetched when insulad starts, and again when a token names a key that is not known, or a known key doesn't
fit. That is at most one fetch a minute, whatever is sent. While a provider is down, known keys go on to be used. A key
that the provider no longer publishes is good for `OVERLAP` more.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from insula.control.identities.claims import OidcClaims, check
from insula.control.identities.fetching import fetch
from insula.control.problems import Problems
from insula.control.tasks import Tasks
from insula.model.errors import InsulaError, Unauthenticated, Unavailable
from insula.model.oidc import OidcSettings

if TYPE_CHECKING:
    from joserfc.jwk import Key

ALGORITHMS = {"RS256": ("RSA", ""), "PS256": ("RSA", ""), "ES256": ("EC", "P-256"), "EdDSA": ("OKP", "Ed25519")}
"""The accepted algorithms (RFC 7518, RFC 8037), each with the type and the curve of its keys. None is symmetric: a key
that is public must not be one that signs."""
PAUSE = 60.0
"""Seconds between fetches of keys."""
_PAUSE_WITHOUT = 5.0  # the same while there is no key at all
STALE = 3600.0
"""Seconds after which known keys are fetched again, while they are used."""
OVERLAP = 600.0
LONGEST = 16 << 10
"""Bytes of a token."""
_MAX_KEYS = 64
_MAX_VERIFIED = 256  # tokens whose signature is known to be right; it takes longer to check than a short request
_RSA_BITS = range(2048, 4097)


@dataclass
class _Known:
    """A key: its fields as the provider publishes them, and when that was last seen to have ended (monotonic)."""

    fields: dict[str, Any]
    key: Key
    gone: float | None = None

    def fits(self, algorithm: str, kid: object) -> bool:
        wanted = ALGORITHMS[algorithm]
        found = (self.fields.get("kty"), self.fields.get("crv", ""))
        return (
            found == wanted
            and self.fields.get("alg") in (None, algorithm)
            and (kid is None or self.fields.get("kid") == kid)
            and (self.gone is None or time.monotonic() - self.gone < OVERLAP)
        )


class Provider:
    """One provider, and its keys."""

    def __init__(self, settings: OidcSettings, problems: Problems, tasks: Tasks) -> None:
        self.settings = settings
        self._problems = problems
        self._tasks = tasks
        self._keys: list[_Known] = []
        self._tried: float | None = None
        self._fetched: float | None = None
        self._why: InsulaError | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._verified: dict[bytes, tuple[_Known, dict[str, Any]]] = {}  # by the digests of tokens

    async def verify(self, text: str, header: dict[str, Any]) -> OidcClaims:
        """Return what a token of this provider says. Unauthenticated, Denied; Unavailable without any key."""
        if (claims := self._signed(text, header)) is None and await self.refresh():
            claims = self._signed(text, header)
        if claims is None:
            if not self._keys:
                why = f": {self._why.message}" if self._why else ""
                raise Unavailable(
                    f"the keys of the provider {self.settings.name} are not known{why}", "try again later"
                )
            raise Unauthenticated(
                "the token is not signed by a key of the provider",
                f"log in again; keys are fetched once in {PAUSE:g} s",
            )
        if self._fetched is not None and time.monotonic() - self._fetched > STALE:
            self._start()
        return check(self.settings, header, claims, time.time())

    def _signed(self, text: str, header: dict[str, Any]) -> dict[str, Any] | None:
        """Return the claims if the signature is of a key of the provider."""
        algorithm, kid = header["alg"], header.get("kid")
        fitting = [each for each in self._keys if each.fits(algorithm, kid)]
        if kid is None and len({str(each.fields.get("kid")) for each in fitting}) > 1:
            return None  # it must say which one
        if not fitting:
            return None
        digest = hashlib.sha256(text.encode()).digest()
        by, claims = self._verified.get(digest, (None, {}))
        if any(each is by for each in fitting):
            return claims
        from joserfc import jwt
        from joserfc.errors import JoseError

        for known in fitting:
            try:
                claims = dict(jwt.decode(text, known.key, algorithms=[algorithm]).claims)
            except (JoseError, ValueError, TypeError, RecursionError):
                continue
            self._verified[digest] = known, claims
            if len(self._verified) > _MAX_VERIFIED:
                del self._verified[next(iter(self._verified))]
            return claims
        return None

    # -- keys ----------------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Fetch the keys for the first time, which counts as none of the fetches that tokens cause."""
        if await self.refresh():
            self._tried = None

    async def refresh(self) -> bool:
        """Fetch the keys, unless that was tried a short time ago; whether it was done now, with success."""
        if (task := self._start()) is None:
            return False
        await asyncio.shield(task)
        return self._why is None

    def _start(self) -> asyncio.Task[None] | None:
        """Begin to fetch; returns the fetch that runs, None if it is too early for another."""
        if self._fetching is not None:
            return self._fetching
        pause = PAUSE if self._keys else _PAUSE_WITHOUT
        if self._tried is not None and time.monotonic() - self._tried < pause:
            return None
        self._tried = time.monotonic()
        self._fetching = self._tasks.spawn(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        what = f"provider {self.settings.name}"
        try:
            found = await asyncio.to_thread(_published, self.settings)
        except InsulaError as error:
            self._why = error
            self._problems.report(what, error)
        else:
            self._why, self._fetched = None, time.monotonic()
            self._problems.solved(what)
            self._take(found)
        finally:
            self._fetching = None

    def _take(self, found: Sequence[_Known]) -> None:
        published, now = [each.fields for each in found], time.monotonic()
        old = [each for each in self._keys if each.fields not in published]
        for each in old:
            each.gone = now if each.gone is None else each.gone
        kept = [each for each in old if each.gone is not None and now - each.gone < OVERLAP]
        self._keys = [*found, *kept[:_MAX_KEYS]]


class Providers:
    """The providers of the settings, by their issuers."""

    def __init__(self, settings: Sequence[OidcSettings], problems: Problems, tasks: Tasks) -> None:
        self.by_issuer = {each.issuer: Provider(each, problems, tasks) for each in settings}
        self._tasks = tasks

    def begin(self) -> None:
        """Fetch the keys of all, in the background."""
        for each in self.by_issuer.values():
            self._tasks.spawn(each.begin())

    def named(self, name: str) -> OidcSettings | None:
        return next((each.settings for each in self.by_issuer.values() if each.settings.name == name), None)

    async def verify(self, text: str) -> OidcClaims:
        """Return what a token says. Unauthenticated, Denied, Unavailable."""
        header, claims = _unverified(text)
        issuer = claims.get("iss")
        provider = self.by_issuer.get(issuer) if isinstance(issuer, str) else None
        if provider is None:
            raise Unauthenticated("the token is of no provider that this host knows", "`insula login` says which")
        if header.get("alg") not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise Unauthenticated("the token is not signed by an accepted algorithm", f"these are {known}")
        if {"crit", "b64"} & header.keys():
            raise Unauthenticated("the token has extensions that are not known", "log in again")
        return await provider.verify(text, header)


def looks_like_jwt(text: str) -> bool:
    """Whether a bearer token is no token of Insula, but one of a provider."""
    return text.count(".") == 2 and text.startswith("ey")


def _unverified(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the claims of a token as they stand there. Unauthenticated."""
    try:
        header, claims = (json.loads(_decode(part)) for part in text.split(".")[:2])
        if isinstance(header, dict) and isinstance(claims, dict) and isinstance(header.get("alg"), str):
            return header, claims
    except (ValueError, RecursionError):
        pass
    raise Unauthenticated("the token is malformed", "send it as it is")


def _decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def _published(settings: OidcSettings) -> Sequence[_Known]:
    """Fetch the keys that can be used. It blocks. Unavailable."""
    import warnings

    warnings.filterwarnings("ignore", message="EdDSA is deprecated")  # for Ed25519 (RFC 9864), which few send yet
    base = settings.issuer.rstrip("/")
    where = settings.ca, settings.allow_loopback
    metadata = fetch(f"{base}/.well-known/openid-configuration", where[0], loopback=where[1])
    if metadata.get("issuer") != settings.issuer:
        what = f"{base} says that its issuer is {str(metadata.get('issuer'))[:200]!r}"
        raise Unavailable(what, "write exactly that into insulad.toml(5)")
    keys = fetch(str(metadata.get("jwks_uri")), where[0], loopback=where[1]).get("keys")
    if not isinstance(keys, list):
        raise Unavailable(f"{settings.name} publishes no keys", "see its jwks_uri")
    found = [known for fields in keys[:_MAX_KEYS] if (known := _usable(fields))]
    if not found:
        raise Unavailable(f"{settings.name} publishes no key of {', '.join(ALGORITHMS)}", "see its jwks_uri")
    return found


def _usable(fields: object) -> _Known | None:
    """Import a public key for signatures; None for another, or one that is damaged."""
    from joserfc.errors import JoseError
    from joserfc.jwk import JWKRegistry

    if not isinstance(fields, dict) or fields.get("use") not in (None, "sig"):
        return None
    if (fields.get("kty"), fields.get("crv", "")) not in ALGORITHMS.values():
        return None
    public = {name: fields[name] for name in ("kty", "crv", "n", "e", "x", "y", "kid", "alg") if name in fields}
    try:
        key = JWKRegistry.import_key(public)
        bits = getattr(key.public_key, "key_size", 0) if public["kty"] == "RSA" else _RSA_BITS[0]
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    return _Known(public, key) if bits in _RSA_BITS else None
