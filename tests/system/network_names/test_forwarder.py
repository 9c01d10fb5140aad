"""Queries of instances with name rules: what is answered, what leaves, and what is open afterwards."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from insula.kernel import netlink, syscalls
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.conntrack import ConntrackSocket
from insula.kernel.netns import call_in
from insula.network.names import edns, forwarder, wire
from insula.network.names.rules import ClientRules, DestinationRange, EgressRules, NameRule
from insula.network.names.wire import Message, Question, Record
from tests.support.internet import (
    NameServer,
    TcpServer,
    addresses_in,
    alias_record,
    ask,
    echo,
    greeting,
    query_of,
)
from tests.support.lab import isolated
from tests.support.names_world import CLIENT4, CLIENT6, GATEWAY4, GATEWAY6, SITES, NamesWorld, https
from tests.support.wait import patiently

SITE, OTHER, SITE6 = SITES[0], SITES[1], "2606:2800::1"
PORT = 8443  # is not checked by the proxy
RULE = https("*.example.com", PORT)


def world(*rules: NameRule) -> NamesWorld:
    made = NamesWorld()
    made.allow(*(rules or (RULE,)))
    made.server.names("api.example.com", SITE, SITE6)
    for address in (SITE, OTHER, SITE6):
        TcpServer(made.internet, address, PORT, echo)
    return made


@isolated
def test_a_name_opens_its_addresses_for_its_ports_over_both_versions_of_ip() -> None:
    w = world()
    for address in (SITE, SITE6):
        TcpServer(w.internet, address, 22, echo)
    assert greeting(w.client, SITE, PORT) is None and greeting(w.client, SITE6, PORT) is None, "nobody has asked yet"
    for server in (GATEWAY4, GATEWAY6):
        for tcp in (False, True):
            assert addresses_in(ask(w.client, "api.example.com", wire.A, server, tcp=tcp)) == [SITE]
            assert addresses_in(ask(w.client, "api.example.com", wire.AAAA, server, tcp=tcp)) == [SITE6]
    assert greeting(w.client, SITE, PORT) == SITE and greeting(w.client, SITE6, PORT) == SITE6
    assert greeting(w.client, SITE, 22) is None and greeting(w.client, SITE6, 22) is None
    assert greeting(w.client, OTHER, PORT) is None, "an address without a name"


@isolated
def test_a_name_outside_the_rules_never_leaves() -> None:
    w = world(https("api.example.com", PORT), https("*.a.test"))
    for name in ("secret.evil.test", "example.com", "x.api.example.com", "a.test", "xa.test", "8.8.8.8.in-addr.arpa"):
        for type_ in (wire.A, wire.AAAA, 16, wire.HTTPS, wire.ANY, wire.PTR):
            answer = ask(w.client, name, type_)
            assert answer is not None and answer.rcode == wire.NXDOMAIN and edns.errors_in(answer) == [edns.FILTERED]
    for type_ in (16, 15, 33, wire.ANY, wire.NS, wire.SOA, 251, 252):
        answer = ask(w.client, "api.example.com", type_)
        assert answer is not None and answer.rcode == wire.NOERROR and not answer.answers, type_
    answer = ask(w.client, "api.example.com", class_=3)
    assert answer is not None and answer.rcode == wire.NXDOMAIN
    assert w.server.asked == [], "none of it has left"
    assert ask(w.client, "B.C.a.TEST") and w.server.asked == [("b.c.a.test", wire.A)], "the control"
    for name, type_ in (("web", wire.A), ("web.acme.internal", wire.AAAA), ("2.0.0.10.in-addr.arpa", wire.PTR)):
        ask(w.client, name, type_)
    assert [name for name, _ in w.own.asked] == ["web", "web.acme.internal", "2.0.0.10.in-addr.arpa"]
    assert len(w.server.asked) == 1, "the tenant's own names are asked of its own server"


_LOOK_UP = """if True:
    import json, socket, sys
    try:
        found = socket.getaddrinfo(sys.argv[1], 0, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        found = error.errno
    print(json.dumps(found if isinstance(found, int) else sorted(each[4][0] for each in found)))
"""


@isolated
def test_a_c_library_goes_through_its_search_list_and_asks_for_both_versions_of_ip() -> None:
    """With ndots:5, names of the list that are denied come before the one that is meant. A denial other than NXDOMAIN
    would end the list, or be waited for."""
    w = world()
    Path("/run/resolv.conf").write_text(
        f"nameserver {GATEWAY4}\nsearch acme.internal corp.test example.com\noptions ndots:5 timeout:60 attempts:1\n"
    )
    place = os.path.realpath("/etc/resolv.conf")
    syscalls.mount("/run/resolv.conf", place, None, syscalls.MS_BIND)

    def found(name: str) -> object:
        command = [sys.executable, "-c", _LOOK_UP, name]
        run = functools.partial(subprocess.run, command, capture_output=True, timeout=50, check=True)
        return json.loads(call_in(w.client, run).stdout)

    for name in ("api.example.com", "api"):
        assert found(name) == [SITE6, SITE], name
    assert found("other.name") == socket.EAI_NONAME
    left = {name for name, _ in w.server.asked}
    assert left == {"api.example.com", "api.example.com.example.com", "other.name.example.com"}, "a rule allows these"
    assert greeting(w.client, SITE, PORT) == SITE and greeting(w.client, SITE6, PORT) == SITE6


@isolated
def test_other_servers_are_not_reached() -> None:
    w = world()
    seen = NameServer(w.internet, ("8.8.8.8",)) if call_in_has(w, "8.8.8.8") else None
    assert seen is not None
    for tcp in (False, True):
        answer = ask(w.client, "api.example.com", server="8.8.8.8", tcp=tcp)
        assert addresses_in(answer) == [SITE], "it was answered by the gate"
        answer = ask(w.client, "secret.evil.test", server="8.8.8.8", tcp=tcp)
        assert answer is not None and answer.rcode == wire.NXDOMAIN
    assert seen.asked == []
    for port in (853, 443, 784, 8853, 5353, 5355):
        with call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            sock.connect(("8.8.8.8", port))
            sock.send(b"x")
    assert greeting(w.client, "8.8.8.8", 853) is None
    other = call_in(w.router, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    other.settimeout(patiently(3))
    other.sendto(query_of("x.test"), ("8.8.8.8", 53))
    assert other.recv(512) and seen.asked == [("x.test", wire.A)], "the control: the router reaches it"


def call_in_has(w: NamesWorld, address: str) -> bool:
    """Give the internet one more address."""
    with call_in(w.internet, Rtnl) as rtnl:
        rtnl.execute(netlink.add_address(1, f"{address}/32"))
    return True


@pytest.mark.parametrize("ttl", [0, 1, 86_400])
@isolated
def test_clients_keep_answers_for_a_shorter_time_than_leases_last(ttl: int) -> None:
    w = world()
    w.server.records = []
    w.server.names("api.example.com", SITE, ttl=ttl)
    answer = ask(w.client, "api.example.com")
    assert answer is not None and [each.ttl for each in answer.answers] == [min(ttl, 300)]
    [lease] = w.gates.leases("acme")
    assert max(ttl, 300) + 30 < lease.seconds <= max(ttl, 300) + 60


@isolated
def test_sixty_addresses_in_turn() -> None:
    w = world()
    TcpServer(w.internet, "0.0.0.0", 22, echo)
    w.allow(https("*.example.com", 22))
    for turn in range(60):
        w.server.records = []
        w.server.names("api.example.com", *(SITES[(turn + k) % 60] for k in range(4)))
        told = addresses_in(ask(w.client, "api.example.com"))
        assert len(told) == 4 and greeting(w.client, told[-1], 22) == told[-1]
    assert len(w.gates.leases("acme")) == 60


@isolated
def test_chains_of_aliases() -> None:
    w = world(https("api.example.com", PORT))
    links = ["api.example.com", *(f"n{n}.cdn.test" for n in range(8))]
    w.server.records = [alias_record(one, other) for one, other in itertools.pairwise(links)]
    w.server.names(links[-1], SITE)
    answer = ask(w.client, "api.example.com")
    assert addresses_in(answer) == [SITE] and answer is not None and len(answer.answers) == 9
    assert greeting(w.client, SITE, PORT) == SITE
    [lease] = w.gates.leases("acme")
    assert set(lease.names) == set(links)
    denied = ask(w.client, links[3])
    assert denied is not None and denied.rcode == wire.NXDOMAIN, "an alias can't be asked for by itself"
    w.server.records[-2:] = [alias_record(links[-2], links[0])]
    answer = ask(w.client, "api.example.com")
    assert answer is not None and answer.rcode == wire.SERVFAIL, "a loop"
    w.server.records = [alias_record("api.example.com", "metadata.test")]
    w.server.names("metadata.test", "169.254.169.254")
    assert addresses_in(ask(w.client, "api.example.com")) == []


REBINDING = [
    "169.254.169.254",
    "10.0.0.1",
    "10.0.0.3",
    "127.0.0.1",
    "100.64.0.1",
    "192.168.0.1",
    "224.0.0.251",
    "0.0.0.0",
]
REBINDING6 = [
    "::1",
    "::ffff:10.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "fd00::1",
    "fe80::1",
    "ff02::1",
    "2002:a00:1::1",
    "fd00:ec2::254",
]


@isolated
def test_names_lead_to_no_address_inside() -> None:
    w = world()
    w.server.records = []
    w.server.names("api.example.com", SITE, *REBINDING, SITE6, *REBINDING6)
    w.server.names("bad.example.com", *REBINDING, *REBINDING6)
    assert addresses_in(ask(w.client, "api.example.com")) == [SITE]
    assert addresses_in(ask(w.client, "api.example.com", wire.AAAA)) == [SITE6]
    for type_ in (wire.A, wire.AAAA):
        answer = ask(w.client, "bad.example.com", type_)
        assert answer is not None and addresses_in(answer) == [] and edns.errors_in(answer) == [edns.FILTERED]
    assert {lease.address for lease in w.gates.leases("acme")} == {SITE, SITE6}
    rules = ClientRules((CLIENT4,), (RULE,), open=(DestinationRange("10.0.0.0/24"),))
    w.apply(EgressRules({"web": rules}, servers=w.rules.servers, own=w.rules.own))
    assert addresses_in(ask(w.client, "bad.example.com")) == ["10.0.0.1", "10.0.0.3"], "another rule opens these"
    assert {lease.address for lease in w.gates.leases("acme")} == {SITE}, "that of before"


@isolated
def test_an_answer_must_be_that_of_the_question() -> None:
    w = world()
    forged = wire.name_of("api.example.com")

    def other(change: str, query: Message, answer: Message, tcp: bool) -> Message | bytes | None:
        if tcp:
            return answer
        if change == "id":
            return Message(answer.id ^ 1, answer.flags, answer.questions, answer.answers)
        if change == "name":
            answer.questions = [Question(wire.name_of("evil.test"), wire.A)]
        if change == "query":
            answer.flags &= ~wire.RESPONSE
        if change == "two":
            answer.questions *= 2
        if change == "garbage":
            return b"\xff" * 40
        if change == "lower":
            answer.questions = [Question(query.questions[0].name.lower(), wire.A)]
            answer.answers = [Record(forged, wire.A, 1, 60, bytes([8, 8, 8, 8]))]
        if change == "truncated":
            answer.flags |= wire.TRUNCATED
            answer.answers = []
        return answer

    for change in ("id", "name", "query", "two", "garbage"):
        first = [True]

        def only_first(
            query: Message, answer: Message, tcp: bool, change: str = change, first: list[bool] = first
        ) -> object:
            if first.pop() if first else False:
                return other(change, query, answer, tcp)
            return answer

        w.server.change = only_first  # type: ignore[assignment]
        assert addresses_in(ask(w.client, "api.example.com", timeout=patiently(10))) == [SITE], change
    for change in ("lower", "truncated"):
        w.server.change = functools.partial(other, change)
        assert addresses_in(ask(w.client, "api.example.com")) == [SITE], f"{change}: it was asked again over TCP"
    w.server.change = lambda query, answer, tcp: Message(answer.id, answer.flags | wire.SERVFAIL, answer.questions)
    answer = ask(w.client, "api.example.com")
    assert answer is not None and answer.rcode == wire.SERVFAIL
    assert {lease.address for lease in w.gates.leases("acme")} == {SITE}


@isolated
def test_long_answers_are_truncated_for_who_takes_no_more() -> None:
    w = world()
    w.server.records = []
    w.server.names("api.example.com", *SITES[:99])
    for size in (None, 512, 1232, 4096):
        answer = ask(w.client, "api.example.com", size=size)
        assert answer is not None and answer.flags & wire.TRUNCATED and not answer.answers, size
        assert (edns.edns_of(answer) is None) == (size is None)
    assert len(addresses_in(ask(w.client, "api.example.com", tcp=True))) == 99
    w.server.records = w.server.records[:20]
    assert len(addresses_in(ask(w.client, "api.example.com"))) == 20
    answer = ask(w.client, "api.example.com", size=None)
    assert len(addresses_in(answer)) == 20 and answer is not None and not answer.additionals


@isolated
def test_hostile_queries() -> None:
    w = world()

    def raw(data: bytes) -> bytes | None:
        with call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            sock.settimeout(patiently(0.3))
            sock.connect((GATEWAY4, 53))
            sock.send(data)
            try:
                return sock.recv(4096)
            except TimeoutError:
                return None

    good = query_of("api.example.com")
    assert raw(b"") is None and raw(b"\0" * 5) is None
    assert raw(good[:2] + b"\x80" + good[3:]) is None, "a response deserves none"
    for data, rcode in (
        (good[:20], wire.FORMERR),
        (good + b"x", wire.FORMERR),
        (good[:12] + b"\xc0\x0c" + good[14:], wire.FORMERR),
        (good[:4] + b"\0\2" + good[6:12] + 2 * b"\1a\0\0\1\0\1" + good[-11:], wire.FORMERR),
        (good[:2] + b"\x10" + good[3:], wire.NOTIMP),
        (good[:2] + b"\x28" + good[3:], wire.NOTIMP),
    ):
        answer = raw(data)
        assert answer is not None and answer[3] & 15 == rcode and answer[:2] == good[:2], data
    for length in (0, 5, 65535):
        with call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
            sock.connect((GATEWAY4, 53))
            sock.sendall(struct.pack("!H", length) + os.urandom(length))
    assert addresses_in(ask(w.client, "api.example.com")) == [SITE], "it still answers"
    assert w.server.asked == [("api.example.com", wire.A)]


@isolated
def test_floods_and_tunnels_are_slowed_down() -> None:
    w = world()
    with call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.connect((GATEWAY4, 53))
        for number in range(1000):
            sock.send(query_of(f"{number:04}{'x' * 50}.example.com"))
        sock.settimeout(patiently(1))
        refused = 0
        try:
            while True:
                refused += sock.recv(512)[3] & 15 == wire.REFUSED
        except TimeoutError:
            pass
    assert len(w.server.asked) < 200, "data hidden in names of an allowed domain leaves slowly"
    assert refused > 0


@isolated
def test_a_flood_of_one_instance_does_not_slow_down_another() -> None:
    """Over UDP, and over more connections of TCP than an instance may have."""
    w, other = world(), "10.0.0.3"
    w.apply(EgressRules(w.rules.clients | {"db": ClientRules((other,), (RULE,))}, w.rules.servers, own=w.rules.own))
    with call_in(w.client, Rtnl) as rtnl:
        rtnl.execute(netlink.add_address(rtnl.index("eth0") or 0, f"{other}/24"))

    def bound(kind: int, source: str) -> socket.socket:
        sock: socket.socket = call_in(w.client, lambda: socket.socket(socket.AF_INET, kind))
        sock.settimeout(patiently(3))
        sock.bind((source, 0))
        sock.connect((GATEWAY4, 53))
        return sock

    def codes(sock: socket.socket, count: int) -> list[int]:
        """The response codes of so many queries, as far as they are answered."""
        found: list[int] = []
        with contextlib.suppress(TimeoutError):
            while len(found) < count:
                found.append(sock.recv(512)[3] & 15)
                sock.settimeout(patiently(1))
        return found

    held = [bound(socket.SOCK_STREAM, CLIENT4) for _ in range(60)]
    flood, few = bound(socket.SOCK_DGRAM, CLIENT4), bound(socket.SOCK_DGRAM, other)
    began = time.monotonic()
    for sock, count in ((flood, 600), (few, 50)):
        for _ in range(count):
            sock.send(query_of("api.example.com"))
    assert codes(few, 50) == [wire.NOERROR] * 50, "the other has asked little"
    answered = codes(flood, 600)
    most = forwarder.BURST + forwarder.RATE * (time.monotonic() - began)
    assert wire.REFUSED in answered and 0 < answered.count(wire.NOERROR) <= most
    with bound(socket.SOCK_STREAM, other) as sock:
        query = query_of("api.example.com")
        sock.sendall(struct.pack("!H", len(query)) + query)
        assert sock.recv(512)[5] & 15 == wire.NOERROR
    for sock in (*held, flood, few):
        sock.close()


@isolated
def test_services_are_told_without_hints_and_keys() -> None:
    w = world(https("api.example.com"))
    parameters = b"\0\1\0\3\2h2" + b"\0\4\0\4" + bytes([8, 8, 8, 8]) + b"\0\5\0\3ech" + b"\0\6\0\20" + bytes(16)
    api = wire.name_of("api.example.com")
    w.server.records = [
        Record(api, wire.HTTPS, 1, 60, b"\0\1\0" + parameters),
        Record(api, wire.HTTPS, 1, 60, b"\0\2" + wire.name_of("other.test") + parameters),
        Record(api, wire.HTTPS, 1, 60, b"\0\3\0" + b"\0\0\0\2\0\4" + parameters),
        Record(api, wire.HTTPS, 1, 60, b"\0\4\0\0\1\xff\xff"),
    ]
    answer = ask(w.client, "api.example.com", wire.HTTPS)
    assert answer is not None and [each.data for each in answer.answers] == [b"\0\1\0" + b"\0\1\0\3\2h2"]


@isolated
def test_the_name_of_a_leased_address_is_told() -> None:
    w = world()
    reverse = ".".join(SITE.split(".")[::-1]) + ".in-addr.arpa"
    denied = ask(w.client, reverse, wire.PTR)
    assert denied is not None and denied.rcode == wire.NXDOMAIN
    ask(w.client, "api.example.com")
    answer = ask(w.client, reverse, wire.PTR)
    assert answer is not None and [wire.text_of(each.data) for each in answer.answers] == ["api.example.com"]
    assert len(w.server.asked) == 1


@isolated
def test_no_lease_no_answer() -> None:
    """The sets are gone, as by a hand at the rules: the client is told no address that it can't reach."""
    w = world()
    w.nft.run("flush chain inet t leased4\ndelete set inet t leases4\n")
    answer = ask(w.client, "api.example.com")
    assert answer is not None and answer.rcode == wire.SERVFAIL and addresses_in(answer) == []
    assert addresses_in(ask(w.client, "api.example.com", wire.AAAA)) == [SITE6], "the other set is there"


@isolated
def test_a_rule_that_goes_closes_what_it_opened() -> None:
    w = world(RULE, https("api.example.com", 443))
    ask(w.client, "api.example.com")
    assert w.leased("leases4") and w.leased("checked4")
    w.allow(https("api.example.com", 443))
    assert not w.leased("leases4") and w.leased("checked4")
    w.allow(https("other.example.com", 443))
    assert not w.leased("checked4") and w.gates.leases("acme") == []
    denied = ask(w.client, "api.example.com")
    assert denied is not None and denied.rcode == wire.NXDOMAIN


@isolated
def test_connections_are_seen_by_which_leases_are_renewed() -> None:
    w = world(https("*.example.com", PORT, 443))
    TcpServer(w.internet, SITE, 443, echo)
    for type_ in (wire.A, wire.AAAA):
        ask(w.client, "api.example.com", type_)
    with call_in(w.router, ConntrackSocket) as conntrack:
        assert (CLIENT4, SITE) not in conntrack.pairs(4)
        with call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as checked:
            checked.connect((SITE, 443))
            assert (CLIENT4, SITE) in conntrack.pairs(4), "the proxy's connection is the client's"
        assert (CLIENT6, SITE6) not in conntrack.pairs(6)
        assert greeting(w.client, SITE6, PORT) == SITE6
        assert (CLIENT6, SITE6) in conntrack.pairs(6)


@isolated
def test_a_silent_server_delays_nobody_else() -> None:
    w = world()
    w.server.change = lambda query, answer, tcp: None if b"slow" in query.questions[0].name.lower() else answer
    thread = threading.Thread(target=ask, args=(w.client, "slow.example.com"), kwargs={"timeout": patiently(5)})
    thread.start()
    assert addresses_in(ask(w.client, "api.example.com")) == [SITE]
    assert thread.is_alive(), "it still waits for the other"
    thread.join()
