"""Queries to name servers: over UDP, again over TCP if the answer is truncated or doubtful.

Whoever guesses a query can forge its answer (RFC 5452). So each has a socket and port of its own, a random ID, and a
name with random upper and lower case, which servers repeat (draft-vixie-dnsext-dns0x20). An answer that repeats the
name in another case is not believed: the query is sent again over TCP, which can't be forged from elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Sequence
from typing import Final

from insula.network.names import edns, wire
from insula.network.names.wire import MalformedMessage, Message, Question, Record

TIMEOUTS: Final = (1.0, 2.0, 3.0)  # seconds: of each try with all servers
TCP_TIMEOUT: Final = 4.0
_NEXT: Final = (wire.SERVFAIL, wire.REFUSED, wire.NOTIMP)
"""Response codes of a server that can't help; another may."""


class NoAnswer(Exception):
    """No server has answered."""


ServerAddress = tuple[str, int]


async def ask(servers: Sequence[ServerAddress], question: Question) -> Message:
    """Return the answer of the first server that helps, or the failure of the last. NoAnswer."""
    failure: Message | None = None
    for timeout in TIMEOUTS:
        for server in servers:
            try:
                answer = await _ask(server, question, timeout)
            except (TimeoutError, OSError, MalformedMessage):
                continue
            if answer.rcode not in _NEXT:
                return answer
            failure = answer
        if failure is not None:
            return failure
    raise NoAnswer


async def _ask(server: ServerAddress, question: Question, timeout: float) -> Message:
    """Ask one server. TimeoutError, OSError, MalformedMessage."""
    sent = Question(_mixed_case(question.name), question.type, question.class_)
    query = Message(secrets.randbits(16), wire.RECURSION_DESIRED, [sent], additionals=[edns.opt()])
    answer = await _over_udp(server, query, timeout)
    if answer is None:
        answer = await asyncio.wait_for(_over_tcp(server, query), TCP_TIMEOUT)
    answer.answers = [_in_case_of(question, record) for record in answer.answers]
    return answer


def _in_case_of(question: Question, record: Record) -> Record:
    """Return a record about the question's name with that name as it was asked."""
    return record._replace(name=question.name) if record.name.lower() == question.name.lower() else record


async def _over_udp(server: ServerAddress, query: Message, timeout: float) -> Message | None:
    """Return the answer; None if it is truncated, or its name has another case than the query's."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[Message | None] = loop.create_future()
    with socket.socket(_family(server), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(server)
        sock.send(wire.compose(query))

        def read() -> None:
            try:
                answer = wire.parse(sock.recv(65535))
            except BlockingIOError:
                return
            except MalformedMessage:  # ours may follow
                return
            except OSError as error:
                if not received.done():
                    received.set_exception(error)
                return
            if not _answers(query, answer) or received.done():
                return
            doubtful = answer.flags & wire.TRUNCATED or answer.questions != query.questions
            received.set_result(None if doubtful else answer)

        loop.add_reader(sock.fileno(), read)
        try:
            async with asyncio.timeout(timeout):
                return await received
        finally:
            loop.remove_reader(sock.fileno())


async def _over_tcp(server: ServerAddress, query: Message) -> Message:
    loop = asyncio.get_running_loop()
    with socket.socket(_family(server), socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        await loop.sock_connect(sock, server)
        packed = wire.compose(query)
        await loop.sock_sendall(sock, len(packed).to_bytes(2, "big") + packed)
        length = int.from_bytes(await read_exactly(sock, 2), "big")
        answer = wire.parse(await read_exactly(sock, length))
    if not _answers(query, answer):
        raise MalformedMessage("an answer to another query")
    return answer


async def read_exactly(sock: socket.socket, length: int) -> bytes:
    """Read so many bytes. MalformedMessage if the stream ends before."""
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < length:
        piece = await loop.sock_recv(sock, length - len(data))
        if not piece:
            raise MalformedMessage("the stream has ended")
        data += piece
    return data


def _answers(query: Message, answer: Message) -> bool:
    """Whether a message is the answer to a query, whatever the case of its name."""
    if answer.id != query.id or not answer.flags & wire.RESPONSE or answer.flags & wire.OPCODE:
        return False
    [asked] = query.questions
    return [each._replace(name=each.name.lower()) for each in answer.questions] == [
        asked._replace(name=asked.name.lower())
    ]


def _mixed_case(name: bytes) -> bytes:
    """Return a name with random case. A length byte is at most 63, so it is no letter."""
    flips = os.urandom(len(name))
    return bytes(
        byte ^ (0x20 if flip & 1 else 0) if 0x41 <= byte & 0xDF <= 0x5A else byte
        for byte, flip in zip(name, flips, strict=True)
    )


def _family(server: ServerAddress) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in server[0] else socket.AF_INET
