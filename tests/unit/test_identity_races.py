"""Principals that are changed by two at the same time, and streams whose sender has other roles meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from insula.api.access import AccessMiddleware
from insula.api.peer import Peer
from insula.control.allocation.rates import Rates
from insula.control.identities.authority import OPERATOR
from insula.control.identities.cache import IdentityCache
from insula.control.identities.claims import OidcClaims
from insula.control.identities.verbs import Identities
from insula.control.keys import BINDINGS
from insula.model.errors import InsulaError, NotFound
from insula.model.oidc import OidcSettings
from insula.model.principals import Binding, Principal
from insula.settings import Settings
from insula.store.sqlite import SqliteStore
from tests.unit.test_identity_cache import put

PROVIDER = OidcSettings(issuer="https://login.example", client_id="insula")
CLAIMS = OidcClaims(PROVIDER.issuer, "4711", PROVIDER.name, groups=frozenset({"ops"}), expires=1e10)


class InterruptedStore(SqliteStore):
    """`before` is called once, between what a verb has read and its transaction."""

    before: Callable[[], Awaitable[object]] | None = None

    async def transact(self, *args: Any, **more: Any) -> int:
        if (before := self.before) is not None:
            self.before = None
            await before()
        return await super().transact(*args, **more)


@pytest.mark.parametrize("verb", ["bind", "unbind"])
def test_a_user_that_is_removed_meanwhile_stays_removed(verb: str, tmp_path: Path) -> None:
    async def main() -> None:
        store = InterruptedStore(tmp_path / "state.db")
        context: Any = SimpleNamespace(store=store, settings=Settings(oidc=[PROVIDER]))
        cache = IdentityCache(context)
        identities = Identities(context, cast(Any, None), cache)

        async def change(label: str) -> None:
            if verb == "bind":
                await identities.bind(OPERATOR, label, "auditor", None)
            else:
                await identities.unbind(OPERATOR, label, None)

        for name, uid in (("ann", 1000), ("bob", 1001)):
            await identities.create_user(name, uid)
            await identities.bind(OPERATOR, name, "operator", None)
        store.before = lambda: identities.remove("ann")
        with pytest.raises(NotFound):
            await change("ann")
        assert store.before is None, "it was removed in between"
        await change("bob")
        assert [each.principal.name for each in identities.list()] == ["bob"]
        assert cache.of_user(1000) is None and cache.of_user(1001) is not None
        assert not [each for each in (await store.list("/")).entries if b"ann" in each.value]
        again = await identities.create_user("ann", 1000)
        assert (again.principal.name, again.bindings) == ("ann", []), "name and user ID are free again"
        await identities.bind(OPERATOR, "oidc:ops", "auditor", None)
        store.before = lambda: identities.unbind(OPERATOR, "oidc:ops", None)
        await identities.bind(OPERATOR, "oidc:ops", "operator", None)  # a group is there as long as it has a role
        assert [(each.user, each.role) for each in identities.bindings(None) if each.kind == "group"] == [
            ("oidc:ops", "operator")
        ]
        await store.close()

    asyncio.run(main())


def principal(name: str, **other: Any) -> Principal:
    return Principal(id=name, name=name, issuer=PROVIDER.issuer, created=0.0, **other)


USER, GROUP = principal("ann", subject="4711"), principal("oidc:ops")


def bound(to: Principal) -> Binding:
    return Binding(principal=to.id, tenant="acme", role="viewer", created=0.0)


@pytest.mark.parametrize(("first", "then"), [(USER, GROUP), (GROUP, USER)], ids=["user, group", "group, user"])
def test_a_stream_ends_with_the_last_role_that_it_had_meanwhile(first: Principal, then: Principal) -> None:
    """It began by one role, went on by another that was given later, and ends when that is taken."""

    async def main() -> None:
        cache = IdentityCache(cast(Any, None))
        ended: list[InsulaError] = []
        begun = asyncio.Event()

        async def stream(scope: Any, _receive: Any, _send: Any) -> None:
            scope["state"]["permission"] = "instance.read", "acme"
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(scope["state"]["ended"])

        class Signed:
            async def verify(self, _text: str) -> OidcClaims:
                return CLAIMS

        access = AccessMiddleware(stream, cache, Rates(None), providers=cast(Any, Signed()))
        headers = [(b"authorization", b"Bearer ey.a.b")]
        scope: Any = {"type": "http", "state": {"stopping": asyncio.Event()}, "headers": headers}

        async def nothing(*_: Any) -> Any:
            return None

        def take(*values: Principal | Binding) -> None:
            cache.take([put(each) for each in values], 1)

        def unbind(of: Principal) -> None:
            cache.take([BINDINGS.delete("acme", of.id)], 2)

        take(first, bound(first))
        running = asyncio.create_task(access(scope, nothing, nothing))
        await begun.wait()
        take(then, bound(then))
        unbind(first)
        await asyncio.sleep(0)
        assert not running.done() and not ended, "the other role allows it"
        unbind(then)
        await asyncio.wait_for(running, 60)
        assert isinstance(ended[0], NotFound)

    asyncio.run(main())


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "kept"])
def test_a_stream_about_oneself_ends_if_a_role_was_taken_before_it_began(taken: bool) -> None:
    """Such a request may answer, as one that revokes its own token; but nothing follows that the role had allowed."""

    async def main() -> None:
        cache = IdentityCache(cast(Any, None))
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def statistics(scope: Any, _receive: Any, send: Any) -> None:
            scope["state"]["permission"] = "self.read", None
            begun.set()
            await go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"of acme", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        user = Principal(id="ann", name="ann", uid=1000, created=0.0)
        other = Binding(principal=user.id, tenant="globex", role="viewer", created=0.0)
        cache.take([put(user), put(bound(user)), put(other)], 1)
        access = AccessMiddleware(statistics, cache, Rates(None))
        scope: Any = {
            "type": "http",
            "state": {"stopping": asyncio.Event(), "peer": Peer(1, 1000, 1000)},
            "headers": [],
        }
        running = asyncio.create_task(access(scope, cast(Any, None), send))
        await begun.wait()
        cache.take([BINDINGS.delete("acme", user.id) if taken else put(bound(user))], 2)
        go_on.set()
        await running
        assert (b"of acme" in [each.get("body") for each in sent]) == (not taken)

    asyncio.run(main())
