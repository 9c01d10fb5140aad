"""Egress by DNS name by the command line: insulad, an instance, and an internet of our own behind the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.names import wire
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.internet import (
    DNS4,
    NameServer,
    TcpServer,
    addresses_in,
    ask,
    certificate,
    echo,
    greeting,
    tls_echo,
    tls_greeting,
)
from tests.support.wait import until

SITE, SITE6, OTHER = "93.184.216.1", "2606:2800::1", "93.184.216.2"
API, WWW = "api.example.com", "www.example.com"


@pytest.fixture
def server(unstarted: Daemon, tmp_path: Path) -> Iterator[NameServer]:
    """insulad, whose host's name server is in the namespace behind it, as are the servers."""
    outside = os.open(unstarted.namespaces.outside, os.O_RDONLY)
    with call_in(outside, Rtnl) as rtnl:
        every = ((each, 128 if ":" in each else 32) for each in (DNS4, SITE, SITE6, OTHER))
        rtnl.execute(*(netlink.add_address(1, f"{address}/{length}") for address, length in every))
    server = NameServer(outside, (DNS4,))
    server.names(API, SITE, SITE6)
    server.names(WWW, OTHER)
    paths = certificate(tmp_path, API, WWW)
    for address in (SITE, SITE6, OTHER):
        TcpServer(outside, address, 443, tls_echo(paths))
        TcpServer(outside, address, 8443, echo)
    unstarted.configure(f'[network]\nresolvers = ["{DNS4}"]')
    unstarted.start()
    yield server
    os.close(outside)


def launched(cli: Cli, name: str) -> int:
    """An instance with its name as the label "app"; returns a descriptor of its network namespace."""
    cli.ok("run", "-d", "--name", name, "-l", f"app={name}", "--network", "net", "busybox", "sleep", "600")
    [view] = [view for view in cli.json("ps") if view["instance"]["name"] == name]
    return os.open(f"/proc/{view['status']['pid']}/ns/net", os.O_RDONLY)


def test_a_policy_with_a_name_from_its_creation_to_its_removal(unstarted: Daemon, server: NameServer) -> None:
    cli = unstarted.cli
    cli.ok("network", "create", "net", "--subnet", "10.7.0.0/24", "--subnet6", "fd07::/64")
    web = launched(cli, "web")
    gateways = "10.7.0.1", "fd07::1"
    assert addresses_in(ask(web, WWW, server=gateways[0])) == [OTHER] and greeting(web, OTHER, 8443) == OTHER
    cli.ok("policy", "create", "ci", "--select", "app=web", "--allow", f"to:{API} tcp/443,tcp/8443")
    for gateway in gateways:
        denied = ask(web, WWW, server=gateway)
        assert denied is not None and denied.rcode == wire.NXDOMAIN
        assert addresses_in(ask(web, API, server=gateway)) == [SITE]
        assert addresses_in(ask(web, API, wire.AAAA, server=gateway)) == [SITE6]
    for address in (SITE, SITE6):
        assert tls_greeting(web, address, API) == API and tls_greeting(web, address, WWW) is None
        assert greeting(web, address, 8443) == address
    assert greeting(web, OTHER, 8443) is None
    shown = cli.ok("policy", "show", "--effective", "web")
    assert f"leased     {SITE} for {API}" in shown and f"leased     {SITE6} for {API}" in shown
    assert "names of rules and the tenant's own only" in shown
    assert f"to:{API} tcp/443" in shown

    unstarted.kill("insulad")
    assert addresses_in(ask(web, API, server=gateways[0])) == [SITE] and tls_greeting(web, SITE, API) == API
    unstarted.start()
    assert addresses_in(ask(web, API, server=gateways[0])) == [SITE] and tls_greeting(web, SITE, API) == API
    second = launched(cli, "second")
    cli.ok("update", "second", "--label", "app=web")
    assert greeting(second, SITE, 8443) is None, "what another has asked for"
    assert addresses_in(ask(second, API, server=gateways[0])) == [SITE] and greeting(second, SITE, 8443) == SITE

    cli.ok("policy", "update", "ci", "--allow", "to:*.example.com tcp/443", "--remove", f"to:{API} tcp/443,tcp/8443")
    assert tls_greeting(web, SITE, API) == API and greeting(web, SITE, 8443) is None
    assert addresses_in(ask(web, WWW, server=gateways[0])) == [OTHER] and tls_greeting(web, OTHER, WWW) == WWW
    cli.ok("policy", "rm", "ci")
    assert greeting(web, OTHER, 8443) == OTHER and addresses_in(ask(web, WWW, server=gateways[1])) == [OTHER]
    until(lambda: "leased" not in cli.ok("policy", "show", "--effective", "web"), "no lease is left")


@pytest.mark.parametrize(
    "rule",
    ["to:*.com tcp/443", "to:web.acme.internal tcp/443", "to:api.example.com tcp/1-1000", "to:api.example.com icmp/8"],
)
def test_what_can_not_be_a_rule_is_refused_in_one_line(fresh: Daemon, rule: str) -> None:
    result = fresh.cli.run("policy", "create", "p", "--all", "--allow", rule)
    assert result.status != 0 and result.err.startswith("error: ") and result.err.count("\n") <= 1
    assert "hint: " in result.err and fresh.cli.json("policy", "ls") == []
