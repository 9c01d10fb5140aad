"""Leases in the kernel: a second answer renews their timeouts, as do open connections, on every kernel.

Linux before 6.12 ignores an element that is added once more, and its timeout goes on. So these tests also run in the
virtual machine of tests/modern.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from functools import partial

from insula.kernel.netlink.conntrack import ConntrackSocket
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in
from insula.network.names import wire
from insula.network.names.leases import LEAST, RENEWED, Leases
from insula.network.names.lessor import Lessor
from tests.support.internet import TcpServer, ask, echo, family_of
from tests.support.lab import isolated
from tests.support.names_world import SITES, NamesWorld, https
from tests.support.wait import patiently

NAME, SITE, SITE6, PORT = "api.example.com", SITES[0], "2606:2800::1", 8443
SETS = [("leases4", wire.A, SITE), ("leases6", wire.AAAA, SITE6)]
LONG = 86_400


def left(w: NamesWorld, name: str) -> dict[bytes, float]:
    """The seconds that each element of a set has left, as the kernel tells."""
    return {each.key: each.milliseconds / 1000 for each in w.nftables.timed("inet", "t", name)}


@isolated
def test_a_later_answer_renews_what_the_kernel_has() -> None:
    w = NamesWorld()
    w.allow(https(NAME, PORT))
    for ttl in (1, LONG):
        w.server.records = []
        w.server.names(NAME, SITE, SITE6, ttl=ttl)
        for name, type_, address in SETS:
            ask(w.client, NAME, type_)
            [seconds] = left(w, name).values()
            assert max(ttl, LEAST) < seconds <= max(ttl, LEAST) + 60, (address, ttl)


async def made(nftables: NftablesSocket, conntrack: ConntrackSocket, gate: socket.socket) -> Lessor:
    """A lessor; it is made in an event loop."""
    return Lessor("t", nftables, conntrack, gate)


@isolated
def test_an_open_connection_renews_what_the_kernel_has() -> None:
    """As the lessor does it once a minute, with a clock of the test's own."""
    w = NamesWorld()
    w.allow(https(NAME, PORT))
    now = [0.0]
    nftables, conntrack = call_in(w.router, NftablesSocket), call_in(w.router, ConntrackSocket)
    gate, _other = socket.socketpair()
    lessor = asyncio.run(made(nftables, conntrack, gate))
    lessor._leases = leases = Leases(lambda: now[0])
    leases.rules = w.rules
    for address in (SITE, SITE6):
        TcpServer(w.internet, address, PORT, echo)
        change = leases.grant("web", [NAME], [address], 1)
        assert change
        lessor._commit(change)
    with ExitStack() as stack:
        for _, _, address in SETS:
            sock = call_in(w.client, partial(socket.socket, family_of(address), socket.SOCK_STREAM))
            stack.enter_context(sock).settimeout(patiently(5))
            sock.connect((address, PORT))
            assert sock.recv(100)
        now[0] = LEAST  # the leases have a minute left, the elements all of their time
        lessor._commit(leases.renew(conntrack.pairs(4) | conntrack.pairs(6)))
        for name, _, _ in SETS:
            [seconds] = left(w, name).values()
            assert RENEWED - 30 < seconds <= RENEWED, "the kernel has taken the new time"
    now[0] += RENEWED + 1
    lessor._commit(leases.renew(set()))
    assert leases.names_of("web", SITE) == set() == leases.names_of("web", SITE6), "without one they end"
