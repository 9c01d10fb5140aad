"""Egress by name as a part of tenants' networks: policies with names, instances, and an internet behind the host."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.objects import AddressPair
from insula.model.policies import CidrPeer, OperatorPolicy, OperatorRule
from insula.model.tracing import TraceView
from insula.network.addresses import link_local
from insula.network.linux.fabric import LinuxFabric
from insula.network.names import edns, wire
from insula.network.tracing.trace import parse, trace
from tests.support.internet import DNS4, DNS6, addresses_in, ask, greeting, query_of, tls_greeting
from tests.support.lab import Instance, eventually, isolated, query
from tests.support.names_lab import API, OTHER, PORT, SITE, SITE6, WWW, NamesLab, by_name
from tests.support.policy_lab import policy
from tests.support.wait import patiently

GATEWAYS = ["10.0.0.1", "fd00::1"]


@isolated
def test_an_instance_reaches_the_names_of_its_policies_and_nothing_else() -> None:
    lab = NamesLab()
    web, db = lab["web"].netns, lab["db"].netns
    assert tls_greeting(web, SITE, API) == API and greeting(web, OTHER, PORT) == OTHER, "no policy yet"
    lab.enforce(by_name("ci", "web", "api.example.com"))
    assert greeting(web, SITE, PORT) is None and greeting(web, SITE6, PORT) is None, "nobody has asked"
    for gateway in GATEWAYS:
        assert addresses_in(ask(web, API, server=gateway)) == [SITE]
        assert addresses_in(ask(web, API, wire.AAAA, server=gateway)) == [SITE6]
        denied = ask(web, WWW, server=gateway)
        assert denied is not None and denied.rcode == wire.NXDOMAIN and edns.errors_in(denied) == [edns.FILTERED]
    for address in (SITE, SITE6):
        assert tls_greeting(web, address, API) == API and tls_greeting(web, address, WWW) is None
        assert greeting(web, address, PORT) == address and greeting(web, address, 22) is None
    assert greeting(web, OTHER, PORT) is None and tls_greeting(web, OTHER, WWW) is None
    assert query(web, "10.0.0.1", "db") == (0, ["10.0.0.3"]), "the tenant's own names resolve"
    assert query(web, "10.0.0.1", "db.acme.internal", 28) == (0, ["fd00::3"])
    assert not lab["web"].connects("10.0.0.3", 80), "an instance with a policy reaches no other"
    assert addresses_in(ask(db, WWW)) == [OTHER] and tls_greeting(db, OTHER, WWW) == WWW, "others are not concerned"
    other = lab.cloud.instances["globex", "web"].netns
    assert addresses_in(ask(other, WWW)) == [OTHER] and greeting(other, OTHER, PORT) == OTHER
    assert lab.cloud.fabric.installed(lab.cloud.tenants["acme"]).drift == []
    leases = lab.cloud.fabric.leases(lab.cloud.tenants["acme"])
    assert {(each.instance, each.address, each.names) for each in leases} == {
        ("web", each, (API,)) for each in (SITE, SITE6)
    }
    assert (
        all(0 < each.seconds <= 360 for each in leases) and lab.cloud.fabric.leases(lab.cloud.tenants["globex"]) == []
    )


@isolated
def test_an_instance_has_its_names_from_its_start_on() -> None:
    lab = NamesLab()
    lab.enforce(by_name("ci", "ci", "*.example.com"))
    ci = lab.instance("ci")
    assert addresses_in(ask(ci.netns, API)) == [SITE] and tls_greeting(ci.netns, SITE, API) == API
    denied = ask(ci.netns, "secret.test")
    assert denied is not None and denied.rcode == wire.NXDOMAIN and ("secret.test", wire.A) not in lab.server.asked
    assert greeting(ci.netns, OTHER, PORT) is None, "what others or nobody has asked for is closed"
    assert addresses_in(ask(ci.netns, WWW)) == [OTHER] and greeting(ci.netns, OTHER, PORT) == OTHER
    second = lab.instance("second", labels={"app": "ci"})
    assert greeting(second.netns, OTHER, PORT) is None, "leases are of one instance"


@isolated
def test_an_allowed_address_has_the_names_of_its_instance() -> None:
    """Also one that another instance with the same rules may use, but not one that an instance with others may."""
    lab = NamesLab()
    lab.enforce(by_name("ci", "ci", API), by_name("other", "other", WWW))
    pairs = [AddressPair(address=each) for each in ("10.0.0.100", "fd00::100", "10.0.0.200")]
    one = lab.instance("ci", pairs=pairs)
    lab.instance("twin", labels={"app": "ci"}, pairs=pairs[:1])
    lab.instance("other", pairs=pairs[2:])
    for address in ("10.0.0.100", "fd00::100"):
        with uses(one, address):
            six = ":" in address
            server, site, type_ = GATEWAYS[six], SITE6 if six else SITE, wire.AAAA if six else wire.A
            assert addresses_in(ask(one.netns, API, type_, server, source=address)) == [site]
            denied = ask(one.netns, WWW, server=server, source=address)
            assert denied is not None and denied.rcode == wire.NXDOMAIN
            assert greeting(one.netns, site, PORT, source=address) == site
    with uses(one, "10.0.0.200"):
        assert ask(one.netns, API, source="10.0.0.200", timeout=1) is None, "other has other rules with it"
    assert addresses_in(ask(one.netns, API)) == [SITE], "the control"


@contextlib.contextmanager
def uses(instance: Instance, address: str) -> Iterator[None]:
    """Let the instance have a further address."""
    with instance.do(Rtnl) as inside:
        index, whole = inside.index("eth0"), f"{address}/{128 if ':' in address else 32}"
        inside.execute(netlink.add_address(index, whole))
        yield
        inside.execute(netlink.delete_address(index, whole))


@isolated
def test_a_rule_that_is_removed_is_closed_within_a_second_for_open_connections_too() -> None:
    lab = NamesLab()
    web = lab["web"]
    lab.enforce(by_name("api", "web", API), by_name("www", "web", WWW))
    for name in (API, WWW):
        ask(web.netns, name)
    sockets = {}
    for address in (SITE, OTHER):
        sockets[address] = web.socket(socket.AF_INET, socket.SOCK_STREAM)
        sockets[address].settimeout(patiently(2))
        sockets[address].connect((address, PORT))
        assert sockets[address].recv(100)
    lab.remove("api")
    with pytest.raises(OSError):
        sockets[SITE].sendall(b"x")
        sockets[SITE].recv(1)
        raise ConnectionResetError
    sockets[OTHER].sendall(b"still here")
    assert sockets[OTHER].recv(100) == b"still here"
    assert greeting(web.netns, SITE, PORT) is None and tls_greeting(web.netns, SITE, API) is None
    lab.remove("www")
    assert greeting(web.netns, SITE, PORT) == SITE, "no policy selects it any more"
    assert addresses_in(ask(web.netns, API)) == [SITE]
    assert not (Path("/run/lab/network/names") / "acme").exists(), "no process is left"
    lab.enforce(policy("none", {"app": "web"}, directions=("out",)))
    assert greeting(web.netns, OTHER, PORT) is None, "no lease is left"
    with pytest.raises(OSError):
        sockets[OTHER].sendall(b"x")
        sockets[OTHER].recv(1)
        raise ConnectionResetError


@isolated
def test_names_and_other_peers_together() -> None:
    lab = NamesLab()
    web = lab["web"].netns
    cidr = policy("cidr", {"app": "web"}, f"out {OTHER}/32 tcp/{PORT}", directions=("out",))
    lab.enforce(by_name("mixed", "web", API, ports=(443,)), cidr)
    assert greeting(web, OTHER, PORT) == OTHER and greeting(web, SITE, PORT) is None
    assert addresses_in(ask(web, API)) == [SITE]
    assert tls_greeting(web, SITE, API) == API and tls_greeting(web, SITE, WWW) is None
    lab.enforce(policy("cidr", {"app": "web"}, f"out {SITE}/32", directions=("out",)))
    assert tls_greeting(web, SITE, WWW) == WWW, "what an address opens is open whatever the name"
    assert greeting(web, SITE, PORT) == SITE


@isolated
def test_the_operator_is_above_names() -> None:
    lab = NamesLab()
    web = lab["web"].netns
    lab.enforce(by_name("ci", "web", "*.example.com"))
    for name in (API, WWW):
        ask(web, name)
    assert tls_greeting(web, SITE, API) == API
    rule = OperatorRule(action="deny", direction="out", peers=[CidrPeer(cidr=f"{SITE}/32")])
    lab.operator = [OperatorPolicy(name="no", rules=[rule], created=0)]
    lab.enforce()
    assert tls_greeting(web, SITE, API) is None and greeting(web, SITE, PORT) is None
    assert tls_greeting(web, OTHER, WWW) == WWW and greeting(web, OTHER, PORT) == OTHER, "the control"


@isolated
def test_other_resolvers_by_every_way() -> None:
    lab = NamesLab()
    web = lab["web"].netns
    lab.enforce(by_name("ci", "web", "*.example.com"))
    for server in (DNS4, DNS6):
        for tcp in (False, True):
            assert addresses_in(ask(web, API, server=server, tcp=tcp)) == [SITE]
            denied = ask(web, "secret.test", server=server, tcp=tcp)
            assert denied is not None and denied.rcode == wire.NXDOMAIN
        assert greeting(web, server, 853) is None and greeting(web, server, 443) is None
    assert not [name for name, _ in lab.server.asked if "secret" in name]


@isolated
def test_it_goes_on_without_insulad_and_is_adopted() -> None:
    lab = NamesLab()
    web, acme = lab["web"].netns, lab.cloud.tenants["acme"]
    lab.enforce(by_name("ci", "web", API))
    assert addresses_in(ask(web, API)) == [SITE]
    pid = int(Path("/run/lab/network/names/acme/pid").read_text())
    lab.cloud.fabric.close()
    assert tls_greeting(web, SITE, API) == API and addresses_in(ask(web, API, wire.AAAA)) == [SITE6]
    lab.cloud.fabric = LinuxFabric(lab.cloud.run, "lab", resolvers=(DNS4, DNS6))
    lab.cloud.fabric.open()
    lab.cloud.apply("acme")
    assert int(Path("/run/lab/network/names/acme/pid").read_text()) == pid, "it is adopted"
    assert lab.cloud.fabric.installed(acme).drift == [] and tls_greeting(web, SITE6, API) == API
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: lab.cloud.fabric.installed(acme).drift == ["the gate of names does not run"])
    assert ask(web, API, timeout=0.3) is None and greeting(web, SITE, PORT) == SITE, "leases stay, nothing opens"
    lab.cloud.apply("acme")
    assert lab.cloud.fabric.installed(acme).drift == []
    eventually(lambda: addresses_in(ask(web, API)) == [SITE] and tls_greeting(web, SITE, API) == API)
    lab.cloud.fabric.remove(acme)
    assert not Path("/run/lab/network/names/acme").exists()


@isolated
def test_queries_from_other_addresses_of_the_instance_get_no_answer() -> None:
    """From its link-local address, which no rule knows, and from one that nobody gave it."""
    lab = NamesLab()
    web = lab["web"]
    own = link_local(web.port.mac)
    with call_in(web.netns, Rtnl) as rtnl:
        if not any(each.address.startswith("fe80") for each in rtnl.addresses()):
            rtnl.execute(netlink.add_address(rtnl.index("eth0") or 0, f"{own}/64"))

    def asked(name: str) -> bool:
        with web.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.5)
            sock.bind((own, 0, 0, web.do(lambda: socket.if_nametoindex("eth0"))))
            sock.sendto(query_of(name), ("fd00::1", 53))
            with contextlib.suppress(OSError):
                sock.recv(512)
        return name in [each for each, _ in lab.server.asked]

    lab.enforce(by_name("ci", "web", API))
    assert not asked("secret.test") and not asked(API)
    assert addresses_in(ask(web.netns, API, server="fd00::1")) == [SITE], "the control"


@isolated
def test_a_policy_in_audit_or_without_dns() -> None:
    lab = NamesLab()
    web = lab["web"].netns
    lab.enforce(by_name("ci", "web", API, audit=True))
    assert greeting(web, OTHER, PORT) == OTHER and addresses_in(ask(web, WWW)) == [OTHER], "nothing is in force"
    lab.enforce(by_name("ci", "web", API, dns=False))
    assert ask(web, API, timeout=0.3) is None and greeting(web, SITE, PORT) is None


@isolated
def test_answers_have_the_name_in_the_case_in_which_it_was_asked() -> None:
    """The gate asks in random case, which nobody else has to see: some clients compare names letter by letter."""
    lab = NamesLab()
    lab.enforce(by_name("ci", "web", API))
    for name in ("dB.acme.internal", "aPi.Example.com"):
        for type_ in (wire.A, wire.AAAA):
            answer = ask(lab["web"].netns, name, type_)
            assert answer is not None and answer.answers
            assert {each.name for each in answer.answers} == {wire.name_of(name)}


@isolated
def test_trace_tells_that_an_address_is_open_once_its_name_was_asked_for() -> None:
    lab = NamesLab()
    lab.enforce(by_name("ci", "web", API))

    def traced(address: str, service: str) -> TraceView:
        intent = lab.cloud.intent("acme")
        running = {port.index for port in intent.ports}
        return trace(lab.cloud.fabric, intent, parse(intent, "web", address, service), running)

    opened = f"tcp/{PORT} is open to addresses of {API}, once web (10.0.0.2) has asked for the name"
    before = traced(SITE, f"tcp/{PORT}")
    assert not before.allowed and not before.wanted and opened in before.steps
    assert not any("drifted" in step for step in before.steps)
    assert not any("open to addresses" in step for step in traced(SITE, "tcp/22").steps), "no rule has this port"
    assert addresses_in(ask(lab["web"].netns, API)) == [SITE]
    after = traced(SITE, f"tcp/{PORT}")
    assert after.allowed and after.wanted and not any("drifted" in step for step in after.steps)
    assert greeting(lab["web"].netns, SITE, PORT) == SITE, "as real packets"
    assert not traced(OTHER, f"tcp/{PORT}").allowed and greeting(lab["web"].netns, OTHER, PORT) is None
