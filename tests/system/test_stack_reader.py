"""What is read again of a stack: what changed meanwhile is seen, and what did not change is the same object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink.messages import Route, Rule
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in
from insula.network.linux import naming, sysctl
from insula.network.linux.interpreter.stack import Stack, StackReader
from tests.support.lab import Lab, isolated, two_tenants

BRIDGE, PORT = naming.bridge_index(1), naming.port_index(1)
CHANGES: Sequence[Request] = (
    netlink.add_neighbour(BRIDGE, "10.0.0.77", "02:00:00:00:00:77"),
    netlink.add_neighbour(BRIDGE, "10.0.0.77", "02:00:00:00:00:78"),
    netlink.add_neighbour(BRIDGE, "fd00::77", "02:00:00:00:00:78"),
    netlink.delete_neighbour(BRIDGE, "10.0.0.77"),
    netlink.add_forwarding(PORT, "02:00:00:00:00:79"),
    netlink.delete_forwarding(PORT, "02:00:00:00:00:79"),
    netlink.add_address(BRIDGE, "192.0.2.1/24"),
    netlink.delete_address(BRIDGE, "192.0.2.1/24"),
    netlink.add_route_in(Route(77, "203.0.113.0/24", "10.0.0.3", BRIDGE), protocol=4),
    netlink.add_route_in(Route(77, "203.0.113.0/24", "10.0.0.4", BRIDGE), protocol=4),
    netlink.add_route_in(Route(77, "2001:db8::/32", "fd00::3", BRIDGE), protocol=4),
    netlink.add_rule(Rule(2, "br1", 77, 900), protocol=4),
    netlink.add_rule(Rule(10, "br1", 77, 900), protocol=4),
    netlink.delete_rule(Rule(2, "br1", 77, 900)),
    netlink.set_bridge_port(PORT, learning=True, flood=False),
    netlink.set_link(PORT, up=False),
    netlink.set_link(PORT, up=True),
)


def anew(cloud: Lab) -> Stack:
    """Return what a reader says that has read nothing before."""
    rtnl, nftables = call_in(cloud.inside("acme"), lambda: (Rtnl(), NftablesSocket()))
    with rtnl, nftables:
        return StackReader(rtnl, nftables).read(filters_bridged={})


@isolated
def test_every_change_is_seen_and_nothing_else() -> None:
    with two_tenants() as cloud:
        namespace = cloud.fabric._tenant(cloud.tenants["acme"])
        web, db = (cloud.instances["acme", name] for name in ("web", "db"))

        def read() -> Stack:
            return namespace.stack.read(filters_bridged={})

        def changed(do: Callable[[], object], what: str) -> None:
            before = read()
            assert read() is before, what
            do()
            after = read()
            assert after != before and after == replace(anew(cloud), program=after.program), what
            assert read() is after, what

        before = read()
        assert web.pings(db.port.address) and read() is before, "packets change nothing"
        for request in CHANGES:
            changed(functools.partial(namespace.rtnl.execute, request), request.what)
        changed(lambda: namespace.nft.run("add rule inet lab services drop"), "a rule")


@isolated
def test_settings_whose_files_stay_open_are_those_of_their_namespace() -> None:
    with two_tenants() as cloud:
        names = ("ipv4/ip_forward", "bridge/bridge-nf-call-iptables")
        acme, globex = (sysctl.OpenSettings(cloud.inside(each), names) for each in ("acme", "globex"))
        for value in ("0", "1", "0"):
            call_in(cloud.inside("acme"), functools.partial(sysctl.write, dict.fromkeys(names, value)))
            assert acme.read() == dict.fromkeys(names, value)
            assert globex.read() == dict.fromkeys(names, "1"), "those of another namespace"
        lacking = sysctl.OpenSettings(cloud.inside("acme"), ("ipv4/ip_forward", "ipv4/unheard_of"))
        for _ in range(2):
            assert lacking.read() == {"ipv4/ip_forward": "0", "ipv4/unheard_of": None}
        for each in (acme, globex, lacking):
            each.close()
