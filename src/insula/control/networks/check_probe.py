"""One health check of a backend, by a socket in the network namespace of its tenant's router."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Final

from insula.model.load_balancers import BackendCheck
from insula.model.objects import Tenant
from insula.network.fabric import Fabric

MOST: Final = 1024
"""Bytes that are read of an answer."""
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset, so that nothing waits for the other end


async def probe(fabric: Fabric, tenant: Tenant, address: str, port: int, check: BackendCheck) -> str | None:
    """Check a backend once. Return why it fails, None if it passes. InsulaError without a router of the tenant."""
    sock = await asyncio.to_thread(fabric.router_socket, tenant, 6 if ":" in address else 4)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        async with asyncio.timeout(check.timeout):
            return await _ask(sock, address, check.port or port, check)
    except TimeoutError:
        return f"no answer within {check.timeout:g} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    finally:
        sock.close()


async def _ask(sock: socket.socket, address: str, port: int, check: BackendCheck) -> str | None:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (address, port))
    if check.kind == "tcp":
        return None
    host = f"[{address}]" if ":" in address else address
    request = f"GET {check.path} HTTP/1.0\r\nHost: {host}:{port}\r\nUser-Agent: insula\r\nConnection: close\r\n\r\n"
    await loop.sock_sendall(sock, request.encode())
    answer = b""
    while b"\n" not in answer and len(answer) < MOST:
        if not (more := await loop.sock_recv(sock, MOST - len(answer))):
            break
        answer += more
    return _judged(answer)


def _judged(answer: bytes) -> str | None:
    """Return why the start of an HTTP answer is no success (RFC 9112, 4)."""
    version, _, rest = answer.split(b"\n")[0].partition(b" ")
    if version.startswith(b"HTTP/1.") and (status := rest[:3]).isdigit() and len(status) == 3:
        with contextlib.suppress(ValueError):
            return None if 200 <= int(status) < 400 else f"it answers with status {int(status)}"
    return "it does not answer by HTTP"
