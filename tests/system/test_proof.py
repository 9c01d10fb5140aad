"""The proof finds each corruption of the data plane, with the packet that shows it; and nothing on a correct host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink import messages as rt
from insula.kernel.netns import call_in
from insula.model.policies import (
    AddressGroup,
    CidrPeer,
    Direction,
    GroupPeer,
    InstancePeer,
    NamePeer,
    OperatorPolicy,
    OperatorRule,
    Policy,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.model.routers import Router, StaticRoute
from insula.network.intent import PolicyIntent
from insula.network.linux import naming
from insula.network.proof.prover import Prover
from insula.network.proof.verify import verify
from tests.support.lab import Lab, World, isolated, two_tenants
from tests.support.proof_lab import Corruption, finds, nft, on_host, prove
from tests.system.network_peering.world import ICMP, TCP80
from tests.system.network_peering.world import two_tenants as peered_tenants


def mac(cloud: Lab, tenant: str, name: str) -> str:
    return cloud.instances[tenant, name].port.mac


def in_acme(cloud: Lab) -> Rtnl:
    return call_in(cloud.inside("acme"), Rtnl)


# -- corruptions ---------------------------------------------------------------------------------------------------


def filter_is_flushed(cloud: Lab) -> None:
    nft(cloud, "acme", "flush chain bridge lab prerouting; chain bridge lab prerouting { policy accept; }")


def address_too_many(cloud: Lab) -> None:
    nft(cloud, "acme", f'add element bridge lab ipv4 {{ "p1" . {mac(cloud, "acme", "web")} . 10.0.0.3 }}')


def mac_too_many(cloud: Lab) -> None:
    nft(cloud, "acme", 'add element bridge lab macs { "p1" . 02:00:00:00:00:99 }')
    nft(cloud, "acme", 'add element bridge lab ipv4 { "p1" . 02:00:00:00:00:99 . 10.0.0.2 }')


def target_of_neighbour_too_many(cloud: Lab) -> None:
    target = f"0x{0xFD000000000000000000000000000003:032x}"
    nft(cloud, "acme", f'add element bridge lab ndp {{ "p1" . {mac(cloud, "acme", "web")} . {target} }}')


def address_is_missing(cloud: Lab) -> None:
    nft(cloud, "acme", f'delete element bridge lab ipv4 {{ "p1" . {mac(cloud, "acme", "web")} . 10.0.0.2 }}')


def networks_are_joined(cloud: Lab) -> None:
    nft(cloud, "acme", 'add element inet lab paths { "br1" . "br3" }')


def everything_is_forwarded(cloud: Lab) -> None:
    nft(cloud, "acme", "insert rule inet lab forward accept")


def one_port_is_open_from_outside(cloud: Lab) -> None:
    nft(cloud, "acme", "insert rule inet lab forward ip saddr 203.0.113.77 tcp dport 4444 accept")


def fresh_connections_count_as_judged(cloud: Lab) -> None:
    nft(cloud, "acme", "insert rule inet lab forward ct mark 0 accept")


def translation_is_off(cloud: Lab) -> None:
    nft(cloud, "acme", "flush chain inet lab postrouting")


def gateway_answers_all(cloud: Lab) -> None:
    nft(cloud, "acme", "flush chain inet lab services; add rule inet lab services accept")


def epoch_is_missing(cloud: Lab) -> None:
    nft(cloud, "acme", "flush map inet lab epoch")


def bridge_may_not_reach_uplink(cloud: Lab) -> None:
    nft(cloud, "acme", 'delete element inet lab paths { "br1" . "uplink" }')


def port_is_flooded(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        acme.execute(netlink.set_bridge_port(naming.port_index(2), learning=False, flood=True, alias="db"))


def port_flags(**flags: bool) -> Callable[[Lab], None]:
    def set_flags(cloud: Lab) -> None:
        with in_acme(cloud) as acme:
            usual: dict[str, Any] = {"learning": False, "flood": False, "hairpin": True}
            acme.execute(netlink.set_bridge_port(naming.port_index(2), **(usual | flags)))

    set_flags.__name__ = "_".join(f"{name}_is_{value}" for name, value in flags.items())
    return set_flags


def port_is_isolated(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        parts = rtattr.nested((rt.INFO_SLAVE_KIND, b"bridge"), (rt.INFO_SLAVE_DATA, rtattr.nested((33, b"\1"))))
        body = rt.LINK.pack(0, 0, naming.port_index(2), 0, 0) + rtattr.attributes((rt.IFLA_LINKINFO, parts))
        acme.execute(Request("isolate a port", rt.RTM_NEWLINK, 0, body))


def another_vxlan_device(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        netns = cloud.inside("acme")
        make: dict[str, Any] = {
            "local": "127.0.0.1",
            "port": 4789,
            "index": 7777,
            "mtu": 1400,
            "master": naming.bridge_index(1),
        }
        acme.execute(netlink.vxlan("spy", vni=99, netns=netns, **make))


def cable_between_tenants(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        acme.execute(netlink.veth("cable", "cable", cloud.inside("globex"), master=naming.bridge_index(1)))


def wrong_forwarding_entry(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        acme.execute(netlink.add_forwarding(naming.port_index(1), mac(cloud, "acme", "db")))


def wrong_neighbour(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        acme.execute(netlink.add_neighbour(naming.bridge_index(1), "10.0.0.99", mac(cloud, "acme", "db")))


def route_is_missing(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        uplink = acme.link("uplink")
        assert uplink
        acme.execute(netlink.set_link(uplink.index, up=False))


def route_into_a_network(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        acme.execute(netlink.add_route("203.0.113.0/24", index=naming.bridge_index(1), gateway="10.0.0.3"))


def port_on_the_wrong_bridge(cloud: Lab) -> None:
    with in_acme(cloud) as acme:
        acme.execute(netlink.set_link(naming.port_index(1), master=naming.bridge_index(3)))


def hosts_forwarding_is_flushed(cloud: Lab) -> None:
    on_host(cloud, "flush chain inet lab from_tenant")


def hosts_input_is_flushed(cloud: Lab) -> None:
    on_host(cloud, "flush chain inet lab to_host")


def host_lets_others_in(cloud: Lab) -> None:
    on_host(cloud, "flush chain inet lab to_tenant")


def host_closes_a_port(cloud: Lab) -> None:
    on_host(cloud, "insert rule inet lab from_tenant tcp dport 443 drop")


def another_table_closes(cloud: Lab) -> None:
    nft(
        cloud, "acme", "table ip other { chain c { type filter hook forward priority 10; udp dport 5000-5010 drop; }; }"
    )


def something_strange(cloud: Lab) -> None:
    nft(cloud, "acme", "insert rule inet lab input meta cpu 77 accept")


CORRUPTIONS = [
    Corruption(filter_is_flushed, "forged", "acme/web", "", "is not its own"),
    Corruption(address_too_many, "forged", "acme/web", "", "can send packets with address 10.0.0.3"),
    Corruption(address_too_many, "forged", "acme/web", "", "can send ARP messages with address 10.0.0.3"),
    Corruption(mac_too_many, "forged", "acme/web", "", "10.0.0.2 and another MAC address"),
    Corruption(target_of_neighbour_too_many, "forged", "acme/web", "", "neighbor advertisements with address fd00::3"),
    Corruption(address_is_missing, "blocked", "acme/web", "acme/db", "from 10.0.0.2 to 10.0.0.3"),
    Corruption(address_is_missing, "blocked", "acme/web", "outside", "from 10.0.0.2 to"),
    Corruption(networks_are_joined, "leak", "acme/web", "acme/back", "from 10.0.0.2 to 10.1.0.4"),
    Corruption(everything_is_forwarded, "leak", "outside", "acme/web", "to 10.0.0.2"),
    Corruption(one_port_is_open_from_outside, "leak", "outside", "acme/web", "tcp/4444 from 203.0.113.77 to 10.0.0.2"),
    Corruption(fresh_connections_count_as_judged, "leak", "outside", "acme/db", "to 10.0.0.3"),
    Corruption(translation_is_off, "leak", "acme/web", "outside", "with its own source address"),
    Corruption(gateway_answers_all, "leak", "acme/web", "acme/router", "from 10.0.0.2 to 10.0.0.1"),
    Corruption(epoch_is_missing, "blocked", "acme/web", "acme/db", "from 10.0.0.2 to 10.0.0.3"),
    Corruption(bridge_may_not_reach_uplink, "blocked", "acme/web", "outside", "from 10.0.0.2"),
    Corruption(port_is_flooded, "overheard", "acme/web", "acme/db", "db is flooded"),
    Corruption(port_flags(hairpin=False), "blocked", "acme/web", "acme/db", "db does not send back"),
    Corruption(port_flags(learning=True), "overheard", "acme/web", "acme/db", "db learns addresses"),
    Corruption(port_flags(broadcast=False), "blocked", "acme/web", "acme/db", "db gets no broadcasts"),
    Corruption(port_flags(suppress=True), "blocked", "acme/web", "acme/db", "db gets no requests"),
    Corruption(port_is_isolated, "blocked", "acme/web", "acme/db", "db is isolated"),
    Corruption(another_vxlan_device, "overheard", "acme/web", "acme/device:spy", "is on the bridge of network net"),
    Corruption(cable_between_tenants, "overheard", "acme/web", "acme/cable", "device cable is on the bridge"),
    Corruption(wrong_forwarding_entry, "overheard", "acme/web", "acme/web", "web gets the frames of db"),
    Corruption(wrong_forwarding_entry, "blocked", "acme/web", "acme/db", "from 10.0.0.2 to 10.0.0.3"),
    Corruption(wrong_neighbour, "leak", "acme/web", "acme/db", "to 10.0.0.99"),
    Corruption(route_is_missing, "blocked", "acme/db", "outside", "from 10.0.0.3"),
    Corruption(route_into_a_network, "blocked", "acme/web", "outside", "to 203.0.113.0"),
    Corruption(port_on_the_wrong_bridge, "leak", "acme/web", "acme/back", "to 10.1.0.4"),
    Corruption(port_on_the_wrong_bridge, "blocked", "acme/web", "acme/db", "to 10.0.0.3"),
    Corruption(hosts_forwarding_is_flushed, "leak", "acme", "globex", "from 100.64.0.3 to 100.64.0.5"),
    Corruption(hosts_input_is_flushed, "leak", "acme", "host", "to 100.64.0.2"),
    Corruption(host_lets_others_in, "leak", "outside", "acme", "to 100.64.0.3"),
    Corruption(host_closes_a_port, "blocked", "acme", "outside", "tcp/443"),
    Corruption(another_table_closes, "blocked", "acme/web", "outside", "udp/5000"),
    Corruption(something_strange, "leak", "acme/web", "acme/router", "to 10.0.0.1"),
]  # fmt: skip


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: f"{c.do.__name__}-{c.kind}")
def test_a_corruption_is_found(corruption: Corruption) -> None:
    @isolated
    def test() -> None:
        World()
        with two_tenants() as cloud:
            cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
            cloud.instance("acme", "back", "back")
            finds(cloud, corruption)

    test()


@isolated
def test_routers_and_networks_without_a_way_out_are_proven() -> None:
    World()
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        cloud.network("acme", "10.2.0.0/24", "fd02::/64", name="far")
        back = cloud.instance("acme", "back", "back")
        cloud.instance("acme", "far", "far")
        routes = [
            StaticRoute(destination="172.16.0.0/12", next_hop=back.port.address),
            StaticRoute(destination="172.16.5.0/24", next_hop=cloud.instances["acme", "web"].port.address),
            StaticRoute(destination="fd20::/32", next_hop=str(back.port.address6)),
        ]
        router = Router(tenant="acme", name="core", networks=["net", "back"], routes=routes, created=0.0)
        closed = msgspec.structs.replace(cloud.networks["acme", "far"], outbound="none")
        cloud.networks["acme", "far"] = closed
        intent = cloud.intent("acme", routers=[router])
        assert not cloud.fabric.apply(intent)
        prover, running = Prover(cloud.fabric), {each.port.index for each in cloud.instances.values()}
        intents = [intent, cloud.intent("globex")]
        assert prover.prove(intents, running).findings == []
        without = cloud.intent("acme")
        found = prover.prove([without, intents[1]], running).findings
        assert {("leak", "acme/web", "acme/back"), ("leak", "acme/back", "acme/web")} <= {e[1:4] for e in found}
        nft(cloud, "acme", 'add element inet lab paths { "br4" . "uplink" }')
        found = prover.prove(intents, running).findings
        assert {each[1:4] for each in found} == {("leak", "acme/far", "outside")}


def policies_of_acme() -> PolicyIntent:
    """Policies with all kinds of peers, and the operator's above them."""

    def policy(name: str, tier: str, directions: list[Direction], *listed: PolicyRule, dns: bool = True) -> Policy:
        select = Selector(labels={"tier": tier})
        return Policy(
            tenant="acme", name=name, select=select, directions=directions, rules=[*listed], dns=dns, created=0.0
        )

    web, db = (InstancePeer(select=Selector(labels={"tier": tier})) for tier in ("web", "db"))
    some = CidrPeer(cidr="203.0.113.0/24", exceptions=["203.0.113.64/26"])
    asked = [PortMatch(protocol="tcp", port=5432), PortMatch(protocol="icmp")]
    return PolicyIntent(
        policies=[
            policy("db", "db", ["in"], PolicyRule(direction="in", peers=[web], ports=asked)),
            policy(
                "web",
                "web",
                ["out"],
                PolicyRule(direction="out", peers=[some], ports=[PortMatch(protocol="udp", port=100, end_port=200)]),
                PolicyRule(direction="out", peers=[db, GroupPeer(group="partners")]),
            ),
            policy("closed", "app", ["in", "out"], dns=False),
        ],
        groups=[
            AddressGroup(tenant="acme", name="partners", cidrs=["198.51.100.0/24", "2001:470:1::/48"], created=0.0)
        ],
        labels={name: {"tier": name} for name in ("web", "db", "app")},
        operator=[
            OperatorPolicy(
                name="company",
                rules=[
                    OperatorRule(action="deny", direction="out", peers=[CidrPeer(cidr="172.20.0.0/16")]),
                    OperatorRule(
                        action="accept",
                        direction="out",
                        peers=[CidrPeer(cidr="9.9.9.9/32")],
                        ports=[PortMatch(protocol="udp", port=53)],
                    ),
                ],
                created=0.0,
            )
        ],
    )


@isolated
def test_policies_are_proven() -> None:
    World()
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        cloud.instance("acme", "back", "back")
        cloud.instance("acme", "app")
        intents = [cloud.intent("acme", policy=policies_of_acme()), cloud.intent("globex")]
        running = {each.port.index for each in cloud.instances.values()}
        prover = Prover(cloud.fabric)
        assert not cloud.fabric.apply(intents[0])
        assert prover.prove(intents, running).findings == []
        without = prover.prove([cloud.intent("acme"), intents[1]], running).findings
        assert {"blocked"} == {each.kind for each in without}, "the positive control"
        nft(cloud, "acme", "flush map inet lab subjects4")
        found = prover.prove(intents, running).findings
        assert ("leak", "acme/back", "acme/app") not in {each[1:4] for each in found}, "no router joins them"
        assert {("leak", "acme/app", "outside"), ("leak", "acme/web", "acme/app")} <= {each[1:4] for each in found}
        assert all(each.witness and each.witness.version == 4 for each in found)


@isolated
def test_policies_with_names_are_proven() -> None:
    World()
    with two_tenants() as cloud:
        named = PolicyRule(
            direction="out", peers=[NamePeer(name="*.example.com")], ports=[PortMatch(protocol="tcp", port=443)]
        )
        near = PolicyRule(direction="out", peers=[CidrPeer(cidr="203.0.113.0/24"), InstancePeer()])
        policy = Policy(
            tenant="acme",
            name="web",
            select=Selector(labels={"app": "web"}),
            directions=["out"],
            rules=[named, near],
            created=0.0,
        )
        cloud.others["acme"] = {"policy": PolicyIntent(policies=[policy], labels={"web": {"app": "web"}})}
        cloud.apply("acme")
        prover = Prover(cloud.fabric)
        assert prove(cloud, prover) == []
        nft(cloud, "acme", "add element inet lab leases4 { 10.0.0.2 . 198.51.100.1 . tcp . 443 timeout 1h }")
        assert prove(cloud, prover) == [], "the address of a name"
        nft(cloud, "acme", "add element inet lab leases4 { 10.0.0.2 . 198.51.100.1 . tcp . 22 timeout 1h }")
        [leak] = prove(cloud, prover)
        assert leak[1:4] == ("leak", "acme/web", "outside") and "tcp/22" in leak.text
        nft(cloud, "acme", "delete element inet lab leases4 { 10.0.0.2 . 198.51.100.1 . tcp . 22 }")
        nft(cloud, "acme", "delete element inet lab named4 { 10.0.0.2 }")
        found = {each[1:4] for each in prove(cloud, prover)}
        assert {("leak", "acme/web", "outside"), ("leak", "acme/web", "acme/db")} <= found, "queries pass by the gate"


@isolated
def test_peerings_are_proven_from_both_sides() -> None:
    cloud = peered_tenants()
    cloud.peer(acme=(["net"], [TCP80]), globex=(["net"], [ICMP]))
    prover = Prover(cloud.fabric)
    assert prove(cloud, prover) == []
    nft(cloud, "acme", 'add element inet lab peer_protocols { "peer7" . udp }')
    found = prove(cloud, prover)
    assert {each[1:4] for each in found} == {("leak", "globex", "acme/web")}
    assert "udp" in found[0].text


@isolated
def test_only_what_has_changed_is_computed_again() -> None:
    with two_tenants() as cloud:
        prover, running = Prover(cloud.fabric), {instance.port.index for instance in cloud.instances.values()}
        intents = [cloud.intent(name) for name in cloud.tenants]
        assert [prover.prove(intents, running).computed for _ in range(3)] == [2, 0, 0]
        nft(cloud, "acme", "add rule inet lab services drop")
        assert [prover.prove(intents, running).computed for _ in range(2)] == [1, 0]


@isolated
def test_a_repaired_host_is_proven_again() -> None:
    with two_tenants() as cloud:
        prover = Prover(cloud.fabric)
        everything_is_forwarded(cloud)
        assert prove(cloud, prover)
        cloud.apply("acme")
        assert prove(cloud, prover) == []


SENT = [
    (networks_are_joined, "acme/web", "acme/back", "seen last at acme/back, where it arrived"),
    (one_port_is_open_from_outside, "outside", "acme/web", "seen last at acme/web, where it arrived"),
    (address_too_many, "acme/web", "", "seen last at"),
    (port_is_flooded, "acme/web", "acme/db", "seen last at acme/db, where it arrived"),
    (epoch_is_missing, "acme/web", "acme/db", "seen last at"),
    (translation_is_off, "acme/web", "outside", "seen last at the host, from the uplink of acme"),
]


@pytest.mark.parametrize(("do", "source", "target", "sent"), SENT, ids=lambda value: getattr(value, "__name__", ""))
def test_the_witness_is_sent_and_told_where_it_was_seen(
    do: Callable[[Lab], None], source: str, target: str, sent: str
) -> None:
    @isolated
    def test() -> None:
        with two_tenants() as cloud:
            cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
            cloud.instance("acme", "back", "back")
            do(cloud)
            report = verify(
                cloud.fabric,
                list(cloud.tenants.values()),
                list(cloud.networks.values()),
                [each.port for each in cloud.instances.values()],
                {each.port.index: each.netns for each in cloud.instances.values()},
            )
            assert not report.passed and report.classes > 10_000
            told = [each for each in report.findings if (each.source, each.target) == (source, target)]
            assert any(sent in (each.sent or "") for each in told), report.findings

    test()
