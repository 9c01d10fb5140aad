"""`HttpsLink`: a connection to another host's API, over which an instance is sent: one request, as frames both ways.

The other host proves itself by the authority that its ticket names. The addresses that may be connected to are the
operator's choice (`machines.migration`): else a tenant could have this host connect to whatever only it can reach.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import Final, NamedTuple

import msgspec

from insula.model.errors import Denied, Invalid, Unavailable
from insula.model.migration import MigrationTarget
from insula.model.stream import Decoder, Kind, encode

PATH: Final = "/v1/migrations"
CONNECT: Final = 10.0
"""Seconds to connect, and for the handshake."""
_LIMIT: Final = 1 << 20
_HEAD: Final = 64 << 10
_MOST_ADDRESSES: Final = 8


class _Place(NamedTuple):
    host: str
    address: str
    port: int


class HttpsLink:
    """The connection; see `HostLink`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames: deque[tuple[Kind, bytes]] = deque()
        self._decoder = Decoder()
        self._begun = False
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, target: MigrationTarget, allowed: Sequence[str], offer: msgspec.Struct) -> HttpsLink:
        """Connect, and offer an instance. Denied for an address that is not allowed; Unavailable."""
        link = await cls._connect(target, allowed)
        head = f"POST {PATH} HTTP/1.1\r\nhost: insula\r\ncontent-type: application/vnd.insula.frames\r\n"
        link._writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        await link.send(Kind.OPEN, msgspec.json.encode(offer))
        return link

    @classmethod
    async def ask(cls, target: MigrationTarget, allowed: Sequence[str], path: str, body: msgspec.Struct) -> bytes:
        """Send a request with a body, and return the answer's. OSError, Denied; Unavailable unless it succeeds."""
        link = await cls._connect(target, allowed)
        try:
            data = msgspec.json.encode(body)
            head = f"POST {path} HTTP/1.1\r\nhost: insula\r\ncontent-type: application/json\r\nconnection: close\r\n"
            link._writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
            async with asyncio.timeout(CONNECT):
                headers = await link._head()
                if (length := int(headers.get("content-length", "0"))) > _HEAD:
                    raise ValueError("its answer is too long")
                return await link._reader.readexactly(length)
        except (TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            raise Unavailable(f"the other host does not answer: {error}", "try again") from None
        finally:
            await link.close()

    @classmethod
    async def _connect(cls, target: MigrationTarget, allowed: Sequence[str]) -> HttpsLink:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_verify_locations(cadata=target.authority)
        except (ssl.SSLError, ValueError):
            raise Invalid("the authority of the other host is no certificate", "get another ticket") from None
        problems = []
        for place in await _places(target.addresses, allowed):
            try:
                async with asyncio.timeout(CONNECT):
                    ends = await asyncio.open_connection(
                        place.address, place.port, ssl=context, server_hostname=place.host, limit=_LIMIT
                    )
            except (OSError, TimeoutError) as error:
                reason = getattr(error, "verify_message", None) or getattr(error, "strerror", None) or "no answer"
                problems.append(f"{place.host}:{place.port}: {reason}")
                continue
            return cls(*ends)
        raise Unavailable(f"the other host can't be reached: {'; '.join(problems)}", "is insulad running there?")

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        frame = encode(kind, payload)
        async with self._turn:
            self._writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
            await self._writer.drain()

    async def next(self) -> tuple[Kind, bytes] | None:
        if not self._begun:
            headers = await self._head()
            if headers.get("transfer-encoding", "").lower() != "chunked":
                raise OSError("the answer is not in chunks")
            self._begun = True
        while not self._frames:
            if (piece := await self._chunk()) is None:
                return None
            self._frames.extend(self._decoder.feed(piece))
        return self._frames.popleft()

    async def _head(self) -> dict[str, str]:
        """The fields of the answer's head. OSError; Unavailable with what the other host says."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise OSError("the connection has ended") from None
        status, *lines = head.split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if " 200 " in f"{status} " or " 201 " in f"{status} ":
            return fields
        length = fields.get("content-length", "")
        said = await self._reader.read(min(int(length), _HEAD)) if length.isdecimal() else b""
        try:
            problem = msgspec.json.decode(said, type=_Problem)
        except msgspec.MsgspecError:
            problem = _Problem(detail=status[:100])
        raise Unavailable(f"the other host refuses: {problem.detail[:300]}", problem.hint[:300])

    async def _chunk(self) -> bytes | None:
        try:
            size = int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16)
            if size > _LIMIT << 1:
                raise OSError("a chunk is too large")
            data = await self._reader.readexactly(size + 2)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return None
        return data[:-2] if size else None

    async def close(self) -> None:
        self._writer.transport.abort()


class _Problem(msgspec.Struct):
    detail: str = ""
    hint: str = ""


async def _places(addresses: Sequence[str], allowed: Sequence[str]) -> Sequence[_Place]:
    """The addresses to connect to. Each is resolved once: what was checked is what is connected to. Invalid, Denied."""
    hint = "the operator of this host lists those that machines may move to in machines.migration of insulad.toml"
    if not allowed:
        raise Denied("machines may not move to other hosts from here", hint)
    ranges = [ip_network(each) for each in allowed]
    found: list[_Place] = []
    for each in addresses[:_MOST_ADDRESSES]:
        host, _, port = each.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise Invalid(f"{each[:100]!r} is no address of a server", "write HOST:PORT")
        for address in await _resolved(host):
            if any(ip_address(address) in known for known in ranges):
                found.append(_Place(host, address, int(port)))
    if not found:
        raise Denied(f"machines may not move to {', '.join(addresses)[:200] or 'nowhere'} from here", hint)
    return found


async def _resolved(host: str) -> Sequence[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(each[4][0]).partition("%")[0] for each in found]
