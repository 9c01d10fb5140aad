"""The cache of principals, bindings and tokens: what it answers, in whatever order it learns of changes."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.identities.authority import Authority
from insula.control.identities.cache import IdentityCache
from insula.control.identities.tokens import Parsed, generate
from insula.control.keys import BINDINGS, HOST, PRINCIPALS, TOKENS
from insula.model.principals import Binding, Principal, Token
from insula.store.protocol import Put, Write

ANN = Principal(id="a" * 16, name="ann", uid=1000, created=0.0)
TEXT, PARSED = generate()


def put(value: Principal | Binding | Token) -> Put:
    match value:
        case Principal():
            return PRINCIPALS.put(value, value.tenant or HOST, value.name)
        case Binding():
            return BINDINGS.put(value, value.tenant or HOST, value.principal)
        case Token():
            return TOKENS.put(value, value.id)


def token(**other: Any) -> Token:
    made = {"id": PARSED.id, "principal": ANN.id, "digest": PARSED.digest, "created": 0.0, "expires": time.time() + 600}
    return Token(**{**made, **other})


def bound(role: Any, tenant: str | None = "acme") -> Binding:
    return Binding(principal=ANN.id, tenant=tenant, role=role, created=0.0)


def cache(*values: Principal | Binding | Token) -> IdentityCache:
    made = IdentityCache(cast(Any, None))
    made.take([put(value) for value in values], 1)
    return made


def of_token(of: IdentityCache, parsed: Parsed = PARSED) -> Authority | None:
    return of.of_token(parsed)


def test_a_user_of_the_host_and_a_token_are_the_same_principal() -> None:
    found = cache(ANN, bound("member"), token())
    by_uid, by_token = found.of_user(1000), of_token(found)
    assert by_uid and by_token
    assert by_uid.tenants == by_token.tenants == {"acme": "member"}
    assert (by_uid.proof, by_token.proof) == ("uid 1000", f"token {PARSED.id}")
    assert found.of_user(1001) is None


@pytest.mark.parametrize(
    "values",
    [
        (ANN, token(expires=time.time() - 1)),
        (ANN, token(digest=generate()[1].digest)),
        (ANN,),
        (token(),),
    ],
    ids=["expired", "another secret", "unknown", "its owner is gone"],
)
def test_no_right_by_a_token_that_is_not_valid(values: tuple[Any, ...]) -> None:
    assert of_token(cache(*values)) is None


def test_a_principal_of_the_same_name_inherits_nothing() -> None:
    found = cache(ANN, bound("admin"), token())
    found.take([PRINCIPALS.delete(HOST, "ann")], 2)
    found.take([put(Principal(id="b" * 16, name="ann", uid=1000, created=1.0))], 3)
    again = found.of_user(1000)
    assert again and again.tenants == {}
    assert of_token(found) is None


def test_a_damaged_record_gives_no_right() -> None:
    found = cache(ANN, bound("admin"))
    found.take([Put(BINDINGS.key("acme", ANN.id), b'{"role": "root"}')], 2)
    again = found.of_user(1000)
    assert again and again.tenants == {}


CHANGES: list[Write] = [
    put(ANN),
    put(bound("viewer")),
    put(bound("admin")),
    BINDINGS.delete("acme", ANN.id),
    put(bound("member")),
    put(token()),
    TOKENS.delete(PARSED.id),
    put(bound("operator", None)),
    BINDINGS.delete(HOST, ANN.id),
]


@given(st.permutations(list(range(len(CHANGES)))), st.lists(st.integers(0, len(CHANGES) - 1), max_size=5))
def test_the_order_in_which_changes_arrive_does_not_matter(order: list[int], again: list[int]) -> None:
    """What this daemon commits arrives before what the store tells, and twice."""
    found = IdentityCache(cast(Any, None))
    for number in [*order, *again]:
        found.take([CHANGES[number]], number + 1)
    sender = found.of_user(1000)
    assert sender and sender.tenants == {"acme": "member"} and sender.host == frozenset()
    assert of_token(found) is None


def test_watchers_are_told_whose_rights_have_changed() -> None:
    found = cache(ANN)
    told: list[str] = []
    found.watchers.add(told.append)
    found.take([put(bound("member"))], 2)
    found.take([put(token())], 3)
    found.take([TOKENS.delete(PARSED.id)], 4)
    assert told == [ANN.id] * 3


def test_what_was_granted_is_asked_again() -> None:
    """`again` says what the sender of an earlier request may do now."""
    found = cache(ANN, bound("member"), token())
    by_token, by_uid = of_token(found), found.of_user(1000)
    assert by_token and by_uid
    found.take([put(bound("viewer"))], 2)
    now = found.again(by_token)
    assert now and now.tenants == {"acme": "viewer"}
    found.take([TOKENS.delete(PARSED.id)], 3)
    assert found.again(by_token) is None and found.again(by_uid)
    found.take([PRINCIPALS.delete(HOST, "ann")], 4)
    assert found.again(by_uid) is None
