"""The device grant of the client (RFC 8628), with a provider that answers what a script says."""

from __future__ import annotations

import json
import threading
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs

import pytest

from insula.client.oidc import Issuer
from insula.model.errors import Denied, Failed, InsulaError, Unavailable


def jwt(**claims: Any) -> str:
    return f"ey.{urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.x"


SUCCESS = {"id_token": jwt(iat=1000, exp=1300, nonce="n"), "refresh_token": "r"}


class Script(HTTPServer):
    """A provider: `answers` of its token endpoint in order, `device` of that for devices; `forms` is what was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self.server_port}"
        self.metadata: dict[str, Any] = {
            "issuer": self.issuer,
            "token_endpoint": f"{self.issuer}/token",
            "device_authorization_endpoint": f"{self.issuer}/device",
        }
        self.device: dict[str, Any] = {
            "device_code": "d",
            "user_code": "U",
            "verification_uri": "https://x",
            "interval": 2,
        }
        self.answers: list[Any] = []
        self.forms: list[dict[str, list[str]]] = []


class Handler(BaseHTTPRequestHandler):
    server: Script

    def do_GET(self) -> None:
        self._send(200, self.server.metadata)

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
        if self.path == "/device":
            self._send(200, self.server.device)
            return
        self.server.forms.append(form)
        answer = self.server.answers.pop(0)
        self._send(400 if "error" in answer else 200, answer)

    def _send(self, status: int, answer: Any) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def script() -> Iterator[Script]:
    with Script() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def client(script: Script, **other: Any) -> Issuer:
    return Issuer({"issuer": script.issuer, "client_id": "insula", **other}, loopback=True)


def by_device(script: Script, **other: Any) -> tuple[Any, list[float]]:
    slept: list[float] = []
    return client(script, **other).by_device(lambda device: None, slept.append), slept


def test_it_polls_until_somebody_has_logged_in_and_never_again(script: Script) -> None:
    """A code that is used is not sent again: providers revoke the login then."""
    script.answers = [{"error": "authorization_pending"}, {"error": "slow_down"}, SUCCESS]
    tokens, slept = by_device(script)
    assert (tokens.token, tokens.refresh, slept) == (SUCCESS["id_token"], "r", [2, 2, 7])
    assert len(script.forms) == 3 and all(form["device_code"] == ["d"] for form in script.forms)


@pytest.mark.parametrize(
    ("error", "told"), [("access_denied", "access_denied"), ("expired_token", "before the code expired")]
)
def test_it_ends_when_there_will_be_no_login(script: Script, error: str, told: str) -> None:
    script.answers = [{"error": error}]
    with pytest.raises(Denied, match=told):
        by_device(script)


def test_it_ends_with_the_life_of_the_code(script: Script) -> None:
    script.device |= {"expires_in": 10, "interval": 4}
    script.answers = [{"error": "authorization_pending"}] * 9
    with pytest.raises(Denied, match="before the code expired"):
        by_device(script)
    assert len(script.forms) == 3


@pytest.mark.parametrize("bad", [{"interval": -1}, {"interval": "x"}, {"interval": None}, {"interval": True}])
def test_an_interval_that_is_none_is_the_default(script: Script, bad: dict[str, Any]) -> None:
    script.device |= bad
    script.answers = [SUCCESS]
    assert by_device(script)[1] == [5]


def test_the_audience_is_asked_for_and_its_kind_of_token_taken(script: Script) -> None:
    script.answers = [{**SUCCESS, "access_token": jwt(iat=0, exp=60)}, SUCCESS]
    tokens, _ = by_device(script, audience="https://api")
    assert tokens.token == jwt(iat=0, exp=60) and script.forms[0]["resource"] == ["https://api"]
    with pytest.raises(Failed, match="gave no access_token"):
        by_device(script, audience="https://api")


@pytest.mark.parametrize(
    "metadata",
    [
        {"issuer": "https://evil.example"},
        {"token_endpoint": "http://192.0.2.1/token"},
        {"token_endpoint": "file:///etc/passwd"},
        {"token_endpoint": "https://a@192.0.2.1/token"},
        {"token_endpoint": 7},
        {"device_authorization_endpoint": None},
    ],
)
def test_metadata_that_leads_elsewhere(script: Script, metadata: dict[str, Any]) -> None:
    script.metadata |= metadata
    with pytest.raises((Denied, Failed)):
        by_device(script)
    assert script.forms == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_answers_that_are_none(script: Script, body: bytes) -> None:
    script.answers = [body]
    with pytest.raises(InsulaError):
        client(script).refresh("r")


def test_loopback_takes_a_word(script: Script) -> None:
    with pytest.raises(Denied, match="no https address"):
        Issuer({"issuer": script.issuer, "client_id": "insula"}).metadata()
    assert client(script).metadata()["issuer"] == script.issuer


def test_nobody_answers(script: Script) -> None:
    script.metadata["token_endpoint"] = "http://127.0.0.1:1/token"
    with pytest.raises(Unavailable):
        client(script).refresh("r")


def test_a_code_for_another_login(script: Script) -> None:
    script.answers = [SUCCESS, SUCCESS]
    with pytest.raises(Denied, match="for another login"):
        client(script).by_code("c", "http://127.0.0.1:1/callback", "v", "another nonce")
    assert client(script).by_code("c", "http://127.0.0.1:1/callback", "v", "n").refresh == "r"
