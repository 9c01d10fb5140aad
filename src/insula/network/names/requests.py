"""The gate's side of its conversation with the lessor."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import msgspec

from insula.network.names.messages import (
    CheckRequest,
    GrantRequest,
    LessorReply,
    MessageChannel,
    NamesRequest,
    NewRules,
    RulesInForce,
    ToGate,
)


class LessorClient:
    """Requests to the lessor. `new_rules` is called with rules that it sends."""

    def __init__(self, sock: socket.socket, new_rules: Callable[[NewRules], None], ended: Callable[[], None]) -> None:
        self._new_rules = new_rules
        self._decoder = msgspec.json.Decoder(ToGate)
        self._waiting: dict[int, asyncio.Future[LessorReply]] = {}
        self._number = 0
        self._loop = asyncio.get_running_loop()
        self._channel = MessageChannel(sock, self._receive, ended)

    async def grant(self, source: str, names: list[str], addresses: list[str], ttl: int) -> bool:
        """Whether the addresses are leased now."""
        return (await self._ask(GrantRequest(self._next(), source, names, addresses, ttl))).allowed

    async def check(self, source: str, address: str, port: int, name: str) -> bool:
        """Whether the instance may connect to a name at this address and TCP port."""
        return (await self._ask(CheckRequest(self._next(), source, address, port, name))).allowed

    async def names(self, source: str, address: str) -> list[str]:
        """Return the names that an address is leased for."""
        return (await self._ask(NamesRequest(self._next(), source, address))).names

    def in_force(self, id_: int) -> None:
        """Report that new rules are in force."""
        self._channel.send(RulesInForce(id_))

    def _next(self) -> int:
        self._number += 1
        return self._number

    async def _ask(self, request: GrantRequest | CheckRequest | NamesRequest) -> LessorReply:
        waiting = self._waiting[request.id] = self._loop.create_future()
        self._channel.send(request)
        try:
            reply: LessorReply = await waiting
            return reply
        finally:
            del self._waiting[request.id]

    def _receive(self, data: bytes) -> None:
        message = self._decoder.decode(data)
        if isinstance(message, NewRules):
            self._new_rules(message)
        elif (waiting := self._waiting.get(message.id)) is not None and not waiting.done():
            waiting.set_result(message)
