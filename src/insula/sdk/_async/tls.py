"""TLS over a socket, so that a connection can be read and written at the same time."""

from __future__ import annotations

import ssl
import threading

from insula.client.https import explained
from insula.model.errors import Unavailable
from insula.sdk._async.network import AsyncLock, AsyncSocket
from insula.sdk.sockets import CHUNK


class AsyncTLSSocket:
    """The client's side of TLS over a connected socket."""

    def __init__(self, plain: AsyncSocket, context: ssl.SSLContext, host: str) -> None:
        self._plain = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._using = threading.Lock()  # of `_tls`, which is not for two threads at once
        self._writing = AsyncLock()

    async def handshake(self, address: str) -> None:
        """Prove each other who one is. Denied if the server is not of the authority, Unavailable."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                raise explained(error, address) from None
            await self._flush()
            if not (data := await self._plain.read()):
                raise Unavailable(f"{address} closed the connection", "is it an address of Insula's HTTPS?")
            self._incoming.write(data)
        await self._flush()

    async def read(self) -> bytes:
        """Return what has arrived, waiting for it; b"" if the other side has closed."""
        while True:
            try:
                with self._using:
                    return self._tls.read(CHUNK)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:  # it was closed, or the server refuses the certificate
                return b""
            data = await self._plain.read()
            with self._using:
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()

    async def write(self, data: bytes) -> bool:
        """Send data; False if the other side takes no more."""
        try:
            with self._using:
                self._tls.write(data)
        except ssl.SSLError:
            return False
        return await self._flush()

    async def _flush(self) -> bool:
        """Send what TLS has to send."""
        async with self._writing:
            with self._using:
                data = self._outgoing.read()
            return not data or await self._plain.write(data)

    def stale(self) -> bool:
        return self._plain.stale()

    def shut(self) -> None:
        self._plain.shut()
