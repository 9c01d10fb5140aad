"""How requests reach a server: the protocol that every transport has."""

from __future__ import annotations

from typing import Protocol

from insula.sdk.messages import HTTPHead, HTTPRequest


class AsyncExchange(Protocol):
    """One request and its response. Their bodies may pass at the same time, which `exec` and `attach` need.

    `send` and `receive` may be called from two tasks at once. `aclose` may be called at any time, more than once, and
    ends both.
    """

    async def send(self, data: bytes) -> bool:
        """Send a piece of the request's body. False if the server takes no more: it has responded, or is gone."""
        ...

    async def end(self) -> None:
        """End the request's body."""
        ...

    async def head(self) -> HTTPHead:
        """Return the head of the response, waiting for it. ConnectionLost."""
        ...

    async def receive(self) -> bytes:
        """Return a piece of the response's body, waiting for it; b"" at its end. ConnectionLost if it is cut off."""
        ...

    async def aclose(self) -> None: ...


class AsyncTransport(Protocol):
    """Carries requests to a server. An object with these two methods is one, whatever it does."""

    async def open(self, request: HTTPRequest) -> AsyncExchange:
        """Send a request, without waiting for the response. Unavailable, Denied."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...
