"""How requests reach a server: the protocol that every transport has."""

from __future__ import annotations

from typing import Protocol

from insula.sdk.messages import HTTPHead, HTTPRequest


class Exchange(Protocol):
    """One request and its response. Their bodies may pass at the same time, which `exec` and `attach` need.

    `send` and `receive` may be called from two tasks at once. `close` may be called at any time, more than once, and
    ends both.
    """

    def send(self, data: bytes) -> bool:
        """Send a piece of the request's body. False if the server takes no more: it has responded, or is gone."""
        ...

    def end(self) -> None:
        """End the request's body."""
        ...

    def head(self) -> HTTPHead:
        """Return the head of the response, waiting for it. ConnectionLost."""
        ...

    def receive(self) -> bytes:
        """Return a piece of the response's body, waiting for it; b"" at its end. ConnectionLost if it is cut off."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """Carries requests to a server. An object with these two methods is one, whatever it does."""

    def open(self, request: HTTPRequest) -> Exchange:
        """Send a request, without waiting for the response. Unavailable, Denied."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...
