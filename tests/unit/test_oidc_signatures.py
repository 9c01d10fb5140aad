"""Signatures of a provider's tokens: one that was found right is not computed again, and nothing else passes for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from insula.control.identities import providers
from insula.control.identities.providers import OVERLAP, Provider
from insula.control.problems import Problems
from insula.control.tasks import Tasks
from insula.model.errors import Unauthenticated
from insula.model.oidc import OidcSettings

ISSUER = "https://id.example"
HEADER = {"alg": "ES256", "kid": "first"}
Signed = tuple[Provider, ECKey]


@pytest.fixture
def signed(monkeypatch: pytest.MonkeyPatch) -> Signed:
    """A provider whose key is known, and that key. Nothing is fetched."""
    provider = Provider(OidcSettings(issuer=ISSUER, client_id="insula"), Problems(), Tasks())
    key = ECKey.generate_key("P-256", {"kid": "first", "alg": "ES256", "use": "sig"})
    publish(provider, key)
    monkeypatch.setattr(provider, "_start", lambda: None)
    return provider, key


def publish(provider: Provider, *keys: ECKey) -> None:
    known = [providers._usable(key.as_dict(private=False)) for key in keys]
    provider._take([each for each in known if each])


def token(key: ECKey, subject: str = "ann") -> str:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": "insula", "sub": subject, "iat": now, "exp": now + 300}
    return jwt.encode(dict(HEADER), claims, key, algorithms=["ES256"])


def verify(provider: Provider, text: str) -> Any:
    return asyncio.run(provider.verify(text, dict(HEADER)))


def test_a_token_is_the_same_user_each_time(signed: Signed) -> None:
    provider, key = signed
    ann, bob = token(key), token(key, "bob")
    assert [verify(provider, each).subject for each in (ann, bob, ann, bob)] == ["ann", "bob", "ann", "bob"]
    assert len(provider._verified) == 2, "the positive control: they are known"


def test_nothing_passes_for_a_token_that_is_known(signed: Signed) -> None:
    """Neither its body with another signature, nor its signature with another body."""
    provider, key = signed
    other = ECKey.generate_key("P-256", {"kid": "first", "alg": "ES256", "use": "sig"})
    ann, bob, forged = token(key), token(key, "bob"), token(other)
    for each in (ann, bob):
        verify(provider, each)
    mixed = ".".join((*ann.split(".")[:2], bob.split(".")[2]))
    for bad in (forged, mixed, ann[:-8] + "AAAAAAAA"):
        for _ in range(2):
            with pytest.raises(Unauthenticated, match="not signed by a key"):
                verify(provider, bad)
    assert len(provider._verified) == 2, "what is wrong is not remembered"


def test_a_known_token_ends_with_its_key_and_at_its_time(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    provider, key = signed
    ann = token(key)
    verify(provider, ann)
    publish(provider, ECKey.generate_key("P-256", {"kid": "second", "alg": "ES256", "use": "sig"}))
    assert verify(provider, ann).subject == "ann", "for a while"
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr("insula.control.identities.providers.time.time", lambda: now + 3600)
        with pytest.raises(Unauthenticated, match="clock"):
            verify(provider, ann)
    for known in provider._keys:
        if known.gone is not None:
            known.gone -= OVERLAP
    with pytest.raises(Unauthenticated, match="not signed by a key"):
        verify(provider, ann)


def test_a_known_token_is_checked_by_a_key_that_was_published_anew(signed: Signed) -> None:
    provider, key = signed
    ann = token(key)
    verify(provider, ann)
    publish(provider, ECKey.generate_key("P-256", {"kid": "first", "alg": "ES256", "use": "sig"}))
    for known in provider._keys:
        known.gone = None if known.gone is None else known.gone - OVERLAP
    with pytest.raises(Unauthenticated, match="not signed by a key"):
        verify(provider, ann)


def test_so_many_tokens_are_known_and_no_more(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_MAX_VERIFIED", 3)
    provider, key = signed
    for number in range(5):
        verify(provider, token(key, f"user{number}"))
    assert len(provider._verified) == 3
