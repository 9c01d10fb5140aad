"""AccessMiddleware to the application: allowed users, and requests during the stop of the daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from insula.api import access
from insula.api.access import AccessMiddleware
from insula.api.peer import Peer
from insula.control.allocation.rates import Rates
from insula.control.identities.cache import IdentityCache
from insula.settings import OPERATORS

ROOT, MEMBER, STRANGER = Peer(1, 0, 0), Peer(1, 1000, 1000, (900,)), Peer(1, 1000, 1000, (901,))
Application = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request: what was sent, and how far the application `app` came: "called", "ended", "cancelled"."""

    def __init__(self, app: Application, who: object, monkeypatch: pytest.MonkeyPatch, group: int | None = 900) -> None:
        monkeypatch.setattr(access, "group_id", lambda: group)
        monkeypatch.setattr(access, "GRACE", 0.05)
        self.app, self.who = app, who
        self.sent: list[dict[str, Any]] = []
        self.seen: list[str] = []
        self.stopping = asyncio.Event()
        self.at_work = asyncio.Event()
        self.cache = IdentityCache(cast(Any, None))
        self.access = AccessMiddleware(self._application, self.cache, Rates(None))

    async def _application(self, _scope: Any, _receive: Any, send: Any) -> None:
        self.send = send
        self.seen.append("called")
        self.at_work.set()
        try:
            await self.app(self)
            self.seen.append("ended")
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise

    async def run(self) -> None:
        async def receive() -> Any:
            raise AssertionError("the body is the application's")

        async def send(message: Any) -> None:
            self.sent.append(message)

        state = {"stopping": self.stopping}
        if self.who is not None:
            state["peer"] = self.who  # type: ignore[assignment]
        await self.access({"type": "http", "state": state, "headers": []}, receive, send)  # type: ignore[arg-type]

    def refusal(self) -> tuple[int, dict[str, Any]]:
        """Status and body of an error, which must be the whole answer and close the connection."""
        start, body = self.sent
        assert start["type"] == "http.response.start"
        length = (b"content-length", str(len(body["body"])).encode())
        assert start["headers"] == [(b"content-type", b"application/problem+json"), (b"connection", b"close"), length]
        assert (body["type"], body["more_body"]) == ("http.response.body", False)
        return start["status"], json.loads(body["body"])


async def answer(exchange: Exchange) -> None:
    await exchange.send({"type": "http.response.start"})
    await exchange.send({"type": "http.response.body"})


async def forever(_exchange: Exchange) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("who", [ROOT, MEMBER])
def test_allowed_users_reach_the_application(who: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        exchange = Exchange(answer, who, monkeypatch)
        await exchange.run()
        assert exchange.seen == ["called", "ended"]
        assert [message["type"] for message in exchange.sent] == ["http.response.start", "http.response.body"]
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 2  # this one, and that which waits for the stop of the daemon

    asyncio.run(main())


@pytest.mark.parametrize(
    ("who", "group", "named"),
    [
        (STRANGER, 900, "user 1000 may"),
        (MEMBER, None, "user 1000 may"),
        (None, 900, "an unknown user may"),
    ],
)
def test_denied_users_do_not_reach_the_application(
    who: Peer | None, group: int | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        exchange = Exchange(answer, who, monkeypatch, group)
        await exchange.run()
        status, body = exchange.refusal()
        assert (status, exchange.seen) == (403, [])
        assert named in json.dumps(body) and OPERATORS in json.dumps(body)

    asyncio.run(main())


def test_a_request_may_take_as_long_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async def later(exchange: Exchange) -> None:
            await asyncio.sleep(0.02)
            await answer(exchange)

        exchange = Exchange(later, ROOT, monkeypatch)
        monkeypatch.setattr(access, "GRACE", 0.001)
        await exchange.run()
        assert exchange.seen == ["called", "ended"]

    asyncio.run(main())


def test_exceptions_of_the_application_are_answered_as_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_exchange: Exchange) -> None:
        raise ZeroDivisionError("secret")

    async def main() -> None:
        exchange = Exchange(fail, ROOT, monkeypatch)
        await exchange.run()
        status, body = exchange.refusal()
        assert (status, body["detail"]) == (500, "insulad has a defect: ZeroDivisionError")
        assert "secret" not in json.dumps(body)

    asyncio.run(main())


def test_a_request_may_finish_when_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async def finish(exchange: Exchange) -> None:
            await exchange.stopping.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            await answer(exchange)

        exchange = Exchange(finish, ROOT, monkeypatch)
        monkeypatch.setattr(access, "GRACE", 60)
        running = asyncio.create_task(exchange.run())
        await exchange.at_work.wait()
        exchange.stopping.set()
        await running
        assert exchange.seen == ["called", "ended"]
        assert len(exchange.sent) == 2

    asyncio.run(main())


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_never_finishes_is_ended(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told why, unless its answer has begun."""

    async def main() -> None:
        async def follow(exchange: Exchange) -> None:
            if begun:
                await exchange.send({"type": "http.response.start"})
            await forever(exchange)

        exchange = Exchange(follow, ROOT, monkeypatch)
        running = asyncio.create_task(exchange.run())
        await exchange.at_work.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not running.done()  # nothing ends it before
        exchange.stopping.set()
        await running
        assert exchange.seen == ["called", "cancelled"]
        if begun:
            assert exchange.sent == [{"type": "http.response.start"}]
        else:
            status, body = exchange.refusal()
            assert status == 503 and "insulad is stopping" in json.dumps(body)

    asyncio.run(main())


def test_a_request_without_a_connection_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        exchange = Exchange(forever, ROOT, monkeypatch)
        running = asyncio.create_task(exchange.run())
        await exchange.at_work.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(0)
        assert (exchange.seen, exchange.sent) == (["called", "cancelled"], [])
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 2

    asyncio.run(main())
