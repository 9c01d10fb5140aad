"""Server-sent events, as an EventSource reads them: events, statistics and logs; and how events are resumed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from insula.api import server_sent
from insula.api.streams import EVENTS, FRAMES, NDJSON, TAR, last_piece
from insula.client.http import Dechunker, head
from insula.model.errors import Denied
from insula.model.stream import Decoder, Kind
from tests.unit.conftest import StubDaemon
from tests.unit.test_problems import ask

ACCEPT = "accept: text/event-stream"


def events(stub: StubDaemon, target: str, *fields: str) -> list[dict[str, Any]]:
    """The events of a stream, parsed as HTML 9.2.6 says: field → value; `data` is decoded."""
    answer = ask(stub, head("GET", target, ACCEPT, *fields))
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    text = b"".join(Dechunker().feed(answer.body)).decode()
    assert text.endswith("\n\n")
    found = []
    for block in text[:-2].split("\n\n"):
        fields_ = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields_:
            found.append({**fields_, "data": json.loads(fields_["data"])})
    return found


def test_events(stub: StubDaemon) -> None:
    stub.plane.events.items = [
        {"kind": "tenant", "name": "a", "revision": 7},
        {"kind": "tenant", "name": "new\nline", "revision": 8},
    ]
    first, second, last = events(stub, "/v1/events")
    assert (first["data"]["name"], second["data"]["name"]) == ("a", "new\nline")
    assert first["id"] == first["data"]["cursor"] != second["id"]
    assert (last["event"], last["data"]["code"]) == ("error", "Failed")


def test_events_resume_where_they_ended(stub: StubDaemon) -> None:
    """By the ID of the last event, or by its cursor; neither shows the store's revision."""
    stub.plane.events.items = [{"kind": "tenant", "name": "a", "revision": 4711}]
    [first, _] = events(stub, "/v1/events")
    assert "4711" not in first["id"]
    for target, fields in (("/v1/events", [f"last-event-id: {first['id']}"]), (f"/v1/events?cursor={first['id']}", [])):
        events(stub, target, *fields)
        assert stub.plane.events.asked[-1] == 4711
    answer = ask(stub, head("GET", "/v1/events", ACCEPT, "last-event-id: 4711"))
    assert (answer.status, json.loads(answer.body)["code"]) == (400, "Invalid")


def test_lines_of_json_have_the_cursor_too(stub: StubDaemon) -> None:
    stub.plane.events.items = [{"kind": "tenant", "name": "a", "revision": 9}]
    answer = ask(stub, head("GET", "/v1/events"))
    line = json.loads(b"".join(Dechunker().feed(answer.body)).splitlines()[0])
    assert line["revision"] == 9 and len(line["cursor"]) > 20


def test_statistics(stub: StubDaemon) -> None:
    found = events(stub, "/v1/stats?interval=0.5")
    assert [each["data"]["time"] for each in found] == [0.0, 1.0, 2.0]


def test_logs(stub: StubDaemon) -> None:
    stub.client.instances.run("acme", "x", ["true"], name="web", start=False)
    stub.plane.instances.log = [(Kind.STDOUT, b"one\n\ntwo"), (Kind.STDERR, b"\xff\x00")]
    found = [each["data"] for each in events(stub, "/v1/tenants/acme/instances/web/logs?follow=true")]
    assert found == [
        {"time": 0.0, "stream": "stdout", "data": "one\n\ntwo"},
        {"time": 1.0, "stream": "stderr", "base64": "/wA="},
    ]
    answer = ask(stub, head("GET", "/v1/tenants/acme/instances/web/logs"))
    assert answer.headers["content-type"] == "application/vnd.insula.frames"


def test_a_quiet_stream_is_kept_alive(stub: StubDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def slow() -> Any:
        yield {"n": 1}
        await asyncio.sleep(0.05)
        yield {"n": 2}

    async def main() -> list[Any]:
        return [each async for each in server_sent._kept_alive(slow())]

    monkeypatch.setattr(server_sent, "QUIET", 0.01)
    found = asyncio.run(main())
    assert [each for each in found if each] == [{"n": 1}, {"n": 2}] and None in found


def test_every_stream_has_an_end_that_says_why() -> None:
    """The same problem in the form of each media type; a tar has no place for it."""
    error = Denied("a role was taken", "ask again")
    line = last_piece(f"{NDJSON}; charset=utf-8", error)
    [(kind, payload)] = Decoder().feed(last_piece(FRAMES, error))
    head, _, data = last_piece(EVENTS, error).decode().partition("\n")
    assert line.endswith(b"\n") and kind is Kind.ERROR and head == "event: error" and data.endswith("\n\n")
    for text in (line, payload, data.removeprefix("data: ")):
        assert json.loads(text) == error.to_problem()
    assert last_piece(TAR, error) == b""
