"""Streams that are ended: each is silent at once, gets one last piece, and is cancelled then."""

from __future__ import annotations

import asyncio

import pytest

from insula.model.errors import Unauthenticated
from tests.unit.test_access import ROOT, Application, Exchange

STREAMS = 100
WHY = Unauthenticated("no more", "make a new token")


async def chatter(exchange: Exchange) -> None:
    await exchange.send({"type": "http.response.start", "headers": [(b"content-type", b"application/x-ndjson")]})
    while True:
        await exchange.send({"type": "http.response.body", "body": b"tick\n", "more_body": True})
        await asyncio.sleep(0)


async def one_piece(exchange: Exchange) -> None:
    await exchange.send({"type": "http.response.start", "headers": [(b"content-type", b"application/x-ndjson")]})
    await exchange.send({"type": "http.response.body", "body": b"all\n"})
    await asyncio.Event().wait()


async def archive(exchange: Exchange) -> None:
    await exchange.send({"type": "http.response.start", "headers": [(b"content-type", b"application/x-tar")]})
    await exchange.send({"type": "http.response.body", "body": b"tar", "more_body": True})
    await asyncio.Event().wait()


async def begun(exchanges: list[Exchange]) -> list[asyncio.Task[None]]:
    tasks = [asyncio.ensure_future(each.run()) for each in exchanges]
    while not all(len(each.sent) > 1 for each in exchanges):
        await asyncio.sleep(0)
    return tasks


def end(exchange: Exchange) -> None:
    for request in tuple(exchange.access._open):
        request.end(WHY)
        request.end(WHY)  # changes nothing


def test_nothing_is_sent_after_the_end_but_the_reason_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        some = [Exchange(chatter, ROOT, monkeypatch) for _ in range(STREAMS)]
        shared = some[0].access._open
        for each in some[1:]:
            each.access._open = shared
        tasks = await begun(some)
        end(some[0])
        before = [len(each.sent) for each in some]
        await shared.cut()
        assert [len(each.sent) for each in some] == [count + 1 for count in before], "a last piece, nothing else"
        await asyncio.wait(tasks)
        assert [each.seen for each in some] == [["called", "cancelled"]] * STREAMS
        assert [len(each.sent) for each in some] == [count + 1 for count in before]
        for each in some:
            last = each.sent[-1]
            assert b'"Unauthenticated"' in last["body"] and last["body"].endswith(b"\n") and not last["more_body"]
        assert not shared

    asyncio.run(main())


@pytest.mark.parametrize("app", [one_piece, archive])
def test_an_answer_without_place_for_a_reason_is_only_cancelled(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is complete, or an archive, which is cut off."""

    async def main() -> None:
        exchange = Exchange(app, ROOT, monkeypatch)
        (task,) = await begun([exchange])
        before = list(exchange.sent)
        end(exchange)
        await asyncio.wait([task])
        assert exchange.seen == ["called", "cancelled"] and exchange.sent == before

    asyncio.run(main())
