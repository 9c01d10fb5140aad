"""The first packet of a connection to a name may follow the answer at once: the address is open before it is told."""

from __future__ import annotations

import functools
import socket
from concurrent.futures import ThreadPoolExecutor

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.names import wire
from insula.network.names.rules import ClientRules, EgressRules
from tests.support.internet import family_of, query_of
from tests.support.lab import isolated
from tests.support.names_world import GATEWAY4, GATEWAY6, SITES, NamesWorld, https
from tests.support.wait import patiently

PORT = 8443  # is not checked by the proxy
RULE = https("*.example.com", PORT)


@isolated
def test_a_thousand_connections_at_once_with_their_answers() -> None:
    """A thousand look-ups of ten instances at the same time, over both versions of IP. The SYN is sent by the one who
    gets the answer, without a pause; no retransmission would come within the time."""
    w, count = NamesWorld(), 50
    w.allow(RULE)
    own = {f"c{n}": (f"10.0.0.{100 + n}", f"fd00::{100 + n:x}") for n in range(10)}
    with call_in(w.client, Rtnl) as rtnl:
        index = rtnl.index("eth0")
        assert index
        every = ((each, 64 if ":" in each else 24) for some in own.values() for each in some)
        rtnl.execute(*(netlink.add_address(index, f"{address}/{length}") for address, length in every))
    clients = {name: ClientRules(some, (RULE,)) for name, some in own.items()}
    w.apply(EgressRules(clients, servers=w.rules.servers, own_servers=w.rules.own_servers, own=w.rules.own))
    for number in range(count):
        w.server.names(f"n{number}.example.com", SITES[2 + number], SITES[102 + number])

    def reached(source: str, number: int) -> bool:
        """Whether a connection gets to the address, where nobody listens, right after the answer."""
        six = ":" in source
        address, family = SITES[(102 if six else 2) + number], family_of(source)
        with (
            call_in(w.client, functools.partial(socket.socket, family, socket.SOCK_DGRAM)) as asks,
            call_in(w.client, functools.partial(socket.socket, family, socket.SOCK_STREAM)) as probe,
        ):
            for sock, timeout in ((asks, 10.0), (probe, 0.9)):
                sock.bind((source, 0))
                sock.settimeout(patiently(timeout))
            asks.connect((GATEWAY6 if six else GATEWAY4, 53))
            asks.send(query_of(f"n{number}.example.com", wire.AAAA if six else wire.A))
            assert asks.recv(512)[3] & 15 == wire.NOERROR
            try:
                probe.connect((address, PORT))
            except ConnectionRefusedError:  # an answer of the internet
                return True
            except OSError:
                return False
            return False

    def all_of(name: str) -> list[bool]:
        return [reached(source, number) for number in range(count) for source in own[name]]

    with ThreadPoolExecutor(len(own)) as pool:
        found = [each for some in pool.map(all_of, own) for each in some]
    assert found == [True] * 1000
