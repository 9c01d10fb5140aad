"""The gate's side of its conversation with the lessor."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

import msgspec

from insula.network.names.leases import LEAST
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
from insula.network.names.permission import permits
from insula.network.names.rules import EgressRules

_REMEMBERED: Final = 50_000


class LessorClient:
    """Requests to the lessor. `new_rules` is called with rules that it sends.

    What was leased at the request of this process is remembered while the rules stay, and not asked about again: an
    address is leased for `LEAST` seconds at least, and without its lease no connection would get here.
    """

    def __init__(self, sock: socket.socket, new_rules: Callable[[NewRules], None], ended: Callable[[], None]) -> None:
        self.rules = EgressRules()
        self._new_rules = new_rules
        self._decoder = msgspec.json.Decoder(ToGate)
        self._waiting: dict[int, asyncio.Future[LessorReply]] = {}
        self._number = 0
        self._leased: dict[tuple[str, str, str], float] = {}  # by source, address and name: until when
        self._loop = asyncio.get_running_loop()
        self._channel = MessageChannel(sock, self._receive, ended)

    async def grant(self, source: str, names: list[str], addresses: list[str], ttl: int) -> bool:
        """Whether the addresses are leased now."""
        allowed = (await self._ask(GrantRequest(self._next(), source, names, addresses, ttl))).allowed
        if allowed:
            if len(self._leased) > _REMEMBERED:
                self._leased.clear()
            until = time.monotonic() + LEAST
            self._leased.update({(source, address, names[0]): until for address in addresses})
        return allowed

    async def check(self, source: str, address: str, port: int, name: str) -> bool:
        """Whether the instance may connect to a name at this address and TCP port."""
        if self._leased.get((source, address, name), 0.0) > time.monotonic():
            return permits(self.rules, self.rules.by_address.get(source, ""), address, port, name)
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
            self._leased.clear()
            self.rules = message.rules
            self._new_rules(message)
        elif (waiting := self._waiting.get(message.id)) is not None and not waiting.done():
            waiting.set_result(message)
