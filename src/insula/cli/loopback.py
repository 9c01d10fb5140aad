"""The code grant of OpenID Connect in a browser of this machine, which ends at a server on loopback (RFC 8252)."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from base64 import urlsafe_b64encode
from html import escape
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

from insula.model.errors import Denied, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from insula.client.oidc import Issuer, Tokens

WAIT = 300.0
"""Seconds until the browser must have come back."""
_PATH = "/callback"
_LONGEST = 8192


class _Listener(HTTPServer):
    """Waits for the one request that has the state of this login."""

    def __init__(self, state: str, issuer: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = state
        self.issuer = issuer
        self.answer: dict[str, str] | None = None
        self.timeout = 1.0

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a program that connected and said nothing, or went away


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = 5.0  # other programs of this machine may connect, and say nothing

    def do_GET(self) -> None:
        parts = urlsplit(self.path[:_LONGEST])
        found = {name: values[0] for name, values in parse_qs(parts.query).items()}
        state = found.get("state", "").encode("utf-8", "replace")
        if parts.path != _PATH or not hmac.compare_digest(state, self.server.state.encode()):
            self._page(404, "This is not the login that was begun.")
            return
        if found.get("iss", self.server.issuer) != self.server.issuer:  # RFC 9207: an answer of another provider
            self._page(400, "This is the answer of another provider.")
            return
        self.server.answer = found
        if "code" in found:
            self._page(200, "You are logged in. You can close this page.")
        else:
            reason = found.get("error_description") or found.get("error", "")
            self._page(400, f"The provider refused: {reason[:300]}")

    def _page(self, status: int, text: str) -> None:
        body = f"<!doctype html><meta charset=utf-8><title>Insula</title><p>{escape(text)}".encode()
        self.send_response(status)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-security-policy", "default-src 'none'")
        self.send_header("referrer-policy", "no-referrer")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass  # the code would be in it


def log_in(issuer: Issuer, open_browser: Callable[[str], None]) -> Tokens:
    """Log in with a browser: `open_browser` is called with the address. Denied, Unavailable."""
    state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
    challenge = urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    with _Listener(state, issuer.issuer) as listener:
        redirect = f"http://127.0.0.1:{listener.server_port}{_PATH}"
        open_browser(issuer.authorization(redirect, state, nonce, challenge))
        end = time.monotonic() + WAIT
        while listener.answer is None:
            if time.monotonic() > end:
                raise Unavailable("the browser did not come back", "try again, or without --browser")
            listener.handle_request()
    answer = listener.answer
    if "code" not in answer:
        why = answer.get("error_description") or answer.get("error", "")
        raise Denied(f"the provider refused the login: {why[:300]}", "ask its operator")
    return issuer.by_code(answer["code"], redirect, verifier, nonce)
