"""The gate: forwarder and proxy in one process without rights, which talks to the lessor."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.network.names.forwarder import Forwarder
from insula.network.names.listeners import QueryListener, datagram_socket, stream_socket
from insula.network.names.messages import NewRules
from insula.network.names.proxy import Proxy
from insula.network.names.requests import LessorClient

ADDRESS4: Final = "192.0.2.53"
ADDRESS6: Final = "2001:db8:53::53"
"""Addresses of the loopback device in the tenant's namespace, to which packets are translated. Their ranges are for
documentation (RFC 5737, RFC 3849): no network of a tenant can have them."""
DNS_PORT: Final = 5380
PROXY_PORT: Final = 5381
_LOOPBACK: Final = 1


class GateSockets(NamedTuple):
    """What the gate listens on."""

    datagrams: Sequence[socket.socket]
    queries: Sequence[socket.socket]
    connections: Sequence[socket.socket]


def open_sockets() -> GateSockets:
    """Open the sockets in the caller's network namespace; without IPv6 in the kernel those of IPv4 alone. OSError."""
    addresses = [ADDRESS4, ADDRESS6] if os.path.exists("/proc/sys/net/ipv6") else [ADDRESS4]
    with Rtnl() as rtnl:
        lengths = ((address, 128 if ":" in address else 32) for address in addresses)
        rtnl.execute(*(netlink.add_address(_LOOPBACK, f"{address}/{length}") for address, length in lengths))
    return GateSockets(
        [datagram_socket(address, DNS_PORT) for address in addresses],
        [stream_socket(address, DNS_PORT) for address in addresses],
        [stream_socket(address, PROXY_PORT) for address in addresses],
    )


async def serve(lessor: socket.socket, sockets: GateSockets) -> None:
    """Serve until the lessor ends."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()
    tasks: set[asyncio.Task[None]] = set()

    def new_rules(message: NewRules) -> None:
        forwarder.rules = proxy.rules = message.rules
        task = asyncio.create_task(put_in_force(message.id))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def put_in_force(id_: int) -> None:
        await proxy.cut_forbidden()
        client.in_force(id_)

    def ended() -> None:
        if not over.done():
            over.set_result(None)

    client = LessorClient(lessor, new_rules, ended)
    forwarder, proxy = Forwarder(client), Proxy(client)
    queries = QueryListener(forwarder.respond)
    for sock in sockets.datagrams:
        queries.datagrams(sock)
    for sock in sockets.queries:
        queries.streams(sock)
    for sock in sockets.connections:
        proxy.listen(sock)
    await over
