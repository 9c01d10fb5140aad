"""A laboratory for egress by name: two tenants' networks of a fabric, and an internet behind the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.policies import NamePeer, Policy, PolicyRule, PortMatch
from tests.support.internet import DNS4, DNS6, NameServer, TcpServer, certificate, echo, http, tls_echo
from tests.support.lab import Lab, World
from tests.support.names_world import SITES
from tests.support.policy_lab import PolicyLab, policy

SITE, OTHER, SITE6 = SITES[0], SITES[1], "2606:2800::1"
API, WWW = "api.example.com", "www.example.com"
PORT = 8443  # is not checked by the proxy


class NamesLab(PolicyLab):
    """acme and globex with web and db each. API is at SITE and SITE6, and WWW at OTHER.

    These have servers of TLS and HTTP, and at PORT one that says its address.
    """

    def __init__(self) -> None:
        cloud = Lab((DNS4, DNS6))
        for tenant in ("acme", "globex"):
            cloud.tenant(tenant)
            cloud.network(tenant, subnet6="fd00::/64")
            for name in ("web", "db"):
                cloud.instance(tenant, name)
        super().__init__(cloud)
        self.internet = World().instance.netns
        with call_in(self.internet, Rtnl) as rtnl:
            every = ((each, 128 if ":" in each else 32) for each in (DNS4, DNS6, *SITES))
            rtnl.execute(*(netlink.add_address(1, f"{address}/{length}") for address, length in every))
        self.server = NameServer(self.internet)
        self.server.names(API, SITE, SITE6)
        self.server.names(WWW, OTHER)
        paths = certificate(Path("/run"), API, WWW)
        for address in (SITE, OTHER, SITE6):
            for port, serve in ((443, tls_echo(paths)), (80, http), (PORT, echo)):
                TcpServer(self.internet, address, port, serve)


def by_name(name: str, app: str, *names: str, ports: Sequence[int] = (443, 80, PORT), **more: object) -> Policy:
    """A policy that lets the instances of an app reach these names at TCP ports."""
    matches = [PortMatch(protocol="tcp", port=port) for port in ports]
    rule = PolicyRule(direction="out", peers=[NamePeer(name=each) for each in names], ports=matches)
    made = policy(name, {"app": app}, directions=("out",), **more)  # type: ignore[arg-type]
    return Policy(**{**{each: getattr(made, each) for each in made.__struct_fields__}, "rules": [*made.rules, rule]})
