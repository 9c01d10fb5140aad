"""Errors of the API are problem details (RFC 9457), whoever answers: a route, the framework, the middleware, or the
parser of HTTP."""

from __future__ import annotations

import json
from contextlib import closing
from http import HTTPStatus
from typing import Any

import pytest

from insula.client.http import connect, head
from insula.model.errors import KINDS, Conflict, InsulaError, QuotaExceeded, TooManyRequests, from_dict
from insula.model.stream import Kind, encode
from tests.unit.conftest import StubDaemon


class Answered:
    """A response: its status, header fields (lower case) and body."""

    def __init__(self, data: bytes) -> None:
        top, _, self.body = data.partition(b"\r\n\r\n")
        line, *fields = top.decode().split("\r\n")
        self.status = int(line.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in fields)}


def ask(stub: StubDaemon, data: bytes) -> Answered:
    with closing(connect(str(stub.path), 10)) as sock:
        sock.sendall(data)
        answer = b""
        while more := sock.recv(65536):
            answer += more
    return Answered(answer)


def problem_of(answer: Answered) -> dict[str, Any]:
    """The members of a problem, all of which are there."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = json.loads(answer.body)
    assert problem["status"] == answer.status
    assert problem["type"] == f"urn:insula:error:{problem['code']}"
    assert problem["title"] and problem["detail"] and "hint" in problem
    assert problem["error"] == problem["code"] and problem["message"] == problem["detail"]  # for clients of 0.1.0
    return problem


JSON = "content-type: application/json"


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (head("GET", "/v1/tenants/globex"), 404, "NotFound"),
        (head("GET", "/v1/nothing/there"), 404, "NotFound"),
        (head("GET", "/"), 404, "NotFound"),
        (head("GET", "/nothing"), 404, "NotFound"),
        (head("GET", "/nothing.html"), 404, "NotFound"),
        (head("PUT", "/v1/tenants", "content-length: 0"), 405, "Invalid"),
        (head("POST", "/v1/tenants", JSON, "content-length: 1") + b"{", 400, "Invalid"),
        (head("POST", "/v1/tenants", JSON, "content-length: 11") + b'{"name":"A"', 400, "Invalid"),
        (head("POST", "/v1/tenants", JSON, "content-length: 2000000"), 413, "Invalid"),
        (head("GET", "/v1/tenants", "authorization: Bearer x"), 401, "Unauthenticated"),
        (b"\x16\x03\x01 hello\r\n\r\n", 400, "Invalid"),
        (head("GET", "/v1/tenants", "host: two\\hosts"), 400, "Invalid"),
    ],
)
def test_every_error_is_a_problem(stub: StubDaemon, request_: bytes, status: int, code: str) -> None:
    answer = ask(stub, request_)
    assert answer.status == status, answer.body
    assert problem_of(answer)["code"] == code


def test_what_is_no_error_is_no_problem(stub: StubDaemon) -> None:
    answer = ask(stub, head("GET", "/v1/tenants"))
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, "application/json", b"[]")
    assert ask(stub, head("GET", "/openapi.json")).status == 200


def test_a_method_that_is_not_there_comes_with_those_that_are(stub: StubDaemon) -> None:
    answer = ask(stub, head("PUT", "/v1/tenants", "content-length: 0"))
    assert {"GET", "POST"} <= set(answer.headers["allow"].replace(" ", "").split(","))


def test_a_proof_that_is_not_valid_is_told_its_scheme(stub: StubDaemon) -> None:
    answer = ask(stub, head("GET", "/v1/tenants", "authorization: Bearer x"))
    assert answer.headers["www-authenticate"] == "Bearer"


def test_an_error_that_passes_says_when(stub: StubDaemon) -> None:
    def busy() -> None:
        raise TooManyRequests("too many requests", "wait", 2.2)

    stub.plane.tenants.list = busy
    answer = ask(stub, head("GET", "/v1/tenants"))
    assert problem_of(answer)["code"] == "TooManyRequests"
    assert (answer.status, answer.headers["retry-after"]) == (429, "3")


def test_an_error_in_a_stream_has_the_same_members(stub: StubDaemon) -> None:
    stub.plane.events.items = []
    answer = ask(stub, head("GET", "/v1/events"))
    [line] = [json.loads(each) for each in answer.body.split(b"\r\n") if each.startswith(b"{")]
    assert (line["code"], line["status"], line["detail"]) == ("Failed", 500, "the rest is lost")


@pytest.mark.parametrize("error", [Conflict("it is there", "choose another"), QuotaExceeded("too much")])
def test_clients_read_both_forms(error: InsulaError) -> None:
    for data in (error.to_dict(), error.to_problem()):
        again = from_dict(data)  # type: ignore[arg-type]
        assert (type(again), str(again)) == (type(error), str(error))
    alone = {key: value for key, value in error.to_problem().items() if key not in ("error", "message")}
    assert str(from_dict(alone)) == str(error)  # type: ignore[arg-type]
    assert type(from_dict(alone)) is type(error)  # type: ignore[arg-type]


def test_statuses_and_titles_are_those_of_http() -> None:
    assert len(KINDS) == 10
    for code, kind in KINDS.items():
        assert kind("x").code == code
        assert HTTPStatus(kind.status).phrase and kind.title != InsulaError.title, kind


@pytest.mark.parametrize(("path", "kind"), [("run", "InstanceSpec"), ("instances/web/exec", "ExecSpec")])
def test_a_stream_that_begins_wrong_is_told_what_belongs_there(path: str, kind: str, stub: StubDaemon) -> None:
    for body, said in (
        (encode(Kind.STDIN, b"{}"), f"payload is an {kind} as JSON"),
        (encode(Kind.OPEN, b"{"), f"no valid {kind}: "),
        (encode(Kind.OPEN, b'{"nonsense": 1}'), f"no valid {kind}: "),
    ):
        answer = ask(stub, head("POST", f"/v1/tenants/acme/{path}", f"content-length: {len(body)}") + body)
        problem = problem_of(answer)
        assert problem["code"] == "Invalid" and said in f"{problem['detail']} {problem['hint']}"


@pytest.mark.parametrize(
    "target",
    [
        "/v1/events?from_revision=-1",
        "/v1/audit?since=-1",
        "/v1/audit?since=1e300",
        "/v1/usage?since=1e300",
        "/v1/tenants/acme/instances/web/logs?since=2e10",
    ],
)
def test_a_number_that_is_out_of_bounds_has_its_status(target: str, stub: StubDaemon) -> None:
    """It is found before the stream begins."""
    answer = ask(stub, head("GET", target))
    assert answer.status == 400 and problem_of(answer)["code"] == "Invalid", answer.body
