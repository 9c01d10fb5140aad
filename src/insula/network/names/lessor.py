"""The lessor: the process with the right to change sets. It leases addresses to instances, as the rules allow.

It takes rules from insulad over a socket that only root can reach, and requests from the gate over another. The gate
parses hostile data, so each of its requests is checked here against the rules. What a gate in the hands of an attacker
can get is public addresses, for instances with rules, on ports of their rules, within the limits of `leases`.

At its start it takes over the elements that the kernel has, so leases survive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from typing import Final

import msgspec

from insula.kernel.netlink import NetlinkError, Request
from insula.kernel.netlink.conntrack import ConntrackSocket
from insula.kernel.netlink.nftables import NftablesSocket, TimedElement, add_elements, delete_elements, refresh_elements
from insula.network.names import elements
from insula.network.names.leases import LeaseChange, Leases
from insula.network.names.messages import (
    FROM_GATE,
    CheckRequest,
    ControlReply,
    FromGate,
    FromInsulad,
    GrantRequest,
    LeaseListed,
    LessorReply,
    MessageChannel,
    NamesRequest,
    NewRules,
    RulesInForce,
    SetRules,
)
from insula.network.names.patterns import normalise
from insula.network.names.rules import EgressRules

SWEEP: Final = 60.0  # seconds between looks at connections
_FAMILY: Final = "inet"


class Lessor:
    """Leases, the sets of one table, and the conversations with gate and insulad."""

    def __init__(self, table: str, nftables: NftablesSocket, conntrack: ConntrackSocket, gate: socket.socket) -> None:
        self._table, self._nftables, self._conntrack = table, nftables, conntrack
        self._leases = Leases()
        self.counters: Counter[str] = Counter()
        self._requests = msgspec.json.Decoder(FromGate)
        self._orders = msgspec.json.Decoder(FromInsulad)
        self._gate = MessageChannel(gate, self._from_gate, self._gate_ended, FROM_GATE)
        self._number = 0
        self._in_force: dict[int, asyncio.Future[None]] = {}

    def _gate_ended(self) -> None:
        raise SystemExit("the gate has ended")

    # -- insulad ---------------------------------------------------------------------------------------------------

    async def serve(self, listener: socket.socket) -> None:
        """Answer insulad's orders, one after the other, and look at connections once a minute."""
        sweeping = asyncio.create_task(self._sweep())
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        try:
            while True:
                connection, _ = await loop.sock_accept(listener)
                with connection, contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                    async with asyncio.timeout(20):
                        await self._converse(connection)
        finally:
            sweeping.cancel()

    async def _converse(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        try:
            data = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
            try:
                order = self._orders.decode(data)
                reply = await self._set_rules(order.rules) if isinstance(order, SetRules) else self._list()
            except (msgspec.MsgspecError, OSError) as error:
                reply = ControlReply(error=str(error))
            packed = msgspec.json.encode(reply)
            writer.write(len(packed).to_bytes(4, "big") + packed)
            await writer.drain()
        finally:
            writer.close()

    async def _set_rules(self, rules: EgressRules) -> ControlReply:
        """Use these rules; returns when leases and connections that they forbid are gone."""
        try:
            self._commit(self._leases.replace(rules))
        except OSError as error:  # begin anew, with what the kernel has
            raise SystemExit(f"leases can't be changed: {error}") from error
        self._number += 1
        done = self._in_force[self._number] = asyncio.get_running_loop().create_future()
        try:
            self._gate.send(NewRules(self._number, rules))
            await done
        finally:
            del self._in_force[self._number]
        return ControlReply()

    def _list(self) -> ControlReply:
        leases = [LeaseListed(*each) for each in self._leases.listed()]
        return ControlReply(leases=leases, counters=dict(self.counters))

    # -- the gate --------------------------------------------------------------------------------------------------

    def start(self, rules: EgressRules) -> None:
        """Begin with these rules, and the leases that the kernel has."""
        self._leases.rules = rules
        found = [
            (element, timed.milliseconds / 1000, [name for name in timed.comment.split() if normalise(name) == name])
            for set_ in elements.SETS
            for timed in self._nftables.timed(_FAMILY, self._table, set_)
            if (element := elements.element_of(set_, timed.key)) is not None
        ]
        self._commit(self._leases.restore(found))
        self._gate.send(NewRules(0, rules))

    def _from_gate(self, data: bytes) -> None:
        try:
            request = self._requests.decode(data)
        except msgspec.MsgspecError:
            raise SystemExit("the gate sends messages that are none") from None
        if isinstance(request, RulesInForce):
            if (waiting := self._in_force.get(request.id)) is not None and not waiting.done():
                waiting.set_result(None)
            return
        client = self._leases.rules.by_address.get(request.source)
        reply = LessorReply(request.id, allowed=False)
        if client is None:
            self.counters["unknown"] += 1
        elif isinstance(request, GrantRequest):
            reply.allowed = self._grant(client, request)
        elif isinstance(request, CheckRequest):
            reply.allowed = self._leases.covers(client, request.address, request.port, request.name)
        elif isinstance(request, NamesRequest):
            reply.names = sorted(self._leases.names_of(client, request.address))
            reply.allowed = bool(reply.names)
        self._gate.send(reply)

    def _grant(self, client: str, request: GrantRequest) -> bool:
        """Lease addresses; False if the rules forbid it, or the kernel refuses it."""
        names = [name for name in request.names if normalise(name) == name]
        if not names or names[0] != request.names[0] or not 0 <= request.ttl <= 1 << 31:
            return False
        change = self._leases.grant(client, names, request.addresses, request.ttl)
        if change is None:
            self.counters["refused"] += 1
            return False
        try:
            self._commit(change)
        except OSError:
            self._leases.undo(change)
            self.counters["failed"] += 1
            return False
        self.counters["granted"] += 1
        self.counters["evicted"] += change.evicted
        return True

    # -- the kernel ------------------------------------------------------------------------------------------------

    def _commit(self, change: LeaseChange) -> None:
        """Change the sets in one transaction. NetlinkError."""
        refreshed: dict[str, list[TimedElement]] = {}
        for element, seconds, names in change.refreshed:
            timed = TimedElement(element.key, max(1, int(seconds * 1000)), elements.comment_of(names))
            refreshed.setdefault(element.set, []).append(timed)
        deleted: dict[str, list[bytes]] = {}
        for element in change.deleted:
            deleted.setdefault(element.set, []).append(element.key)
        requests: list[Request] = []
        for set_, some in refreshed.items():
            requests += refresh_elements(_FAMILY, self._table, set_, some)
        for set_, keys in deleted.items():  # added first, since some may have expired
            requests += add_elements(_FAMILY, self._table, set_, keys)
            requests += delete_elements(_FAMILY, self._table, set_, keys)
        self._nftables.transact(*requests)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            with contextlib.suppress(NetlinkError):  # the next sweep is before any lease has ended
                self._commit(self._leases.renew(self._conntrack.pairs(4) | self._conntrack.pairs(6)))
