"""`insula trace` on the fabric: the installed rules decide, and the reasons are in the tenant's words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from insula.kernel.netlink import Rtnl
from insula.model.errors import Invalid, NotFound
from insula.model.guarantees import PortRates, Rate, Shaping
from insula.model.objects import PublishedPort
from insula.model.policies import AnyPeer, Policy, PolicyRule, PortMatch, Selector
from insula.model.routers import Router, StaticRoute
from insula.model.tracing import TraceView
from insula.network.intent import (
    BalancerIntent,
    BalancerListener,
    FloatingIntent,
    Forward,
    OutsideIntent,
    PolicyIntent,
    TenantIntent,
)
from insula.network.linux.state import addresses
from insula.network.linux.tenant import TenantNamespace
from insula.network.tracing.trace import live, parse, trace
from tests.support.lab import Lab, World, isolated, two_tenants
from tests.system.network_peering.world import TCP80
from tests.system.network_peering.world import two_tenants as peered_tenants


def traced(cloud: Lab, source: str, target: str, service: str = "tcp/80", **others: Any) -> TraceView:
    return of_intent(cloud, cloud.intent("acme"), source, target, service, **others)


def of_intent(cloud: Lab, intent: TenantIntent, source: str, target: str, service: str, **others: Any) -> TraceView:
    running = {instance.port.index for instance in cloud.instances.values()}
    return trace(cloud.fabric, intent, parse(intent, source, target, service), running, **others)


@isolated
def test_the_reasons_are_networks_routers_and_the_way_out() -> None:
    World()
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        back = cloud.instance("acme", "back", "back")
        near = traced(cloud, "web", "db")
        assert near.allowed and near.wanted
        assert near.steps == [
            "web (10.0.0.2) is on network net",
            "db (10.0.0.3) is on the same network",
            "no policy selects either end",
        ]
        far = traced(cloud, "web", "back")
        assert not far.allowed and not far.wanted
        assert far.steps == ["web (10.0.0.2) is on network net", "no router joins networks net and back"]
        out = traced(cloud, "web", "outside", "udp/53")
        assert out.allowed and "way out" in out.steps[1]
        assert not traced(cloud, "outside", "web").allowed
        assert traced(cloud, "web", "10.0.0.1", "icmp").allowed, "the gateway"
        assert not traced(cloud, "web", "10.0.0.1", "tcp/22").allowed
        assert traced(cloud, "fd00::2", "fd00::3").allowed and not traced(cloud, "fd00::2", "fd01::5").allowed
        routes = [StaticRoute(destination="172.16.0.0/12", next_hop=back.port.address)]
        router = Router(tenant="acme", name="core", networks=["net", "back"], routes=routes, created=0.0)
        intent = cloud.intent("acme", routers=[router])
        assert not cloud.fabric.apply(intent)
        joined = of_intent(cloud, intent, "web", "back", "tcp/80")
        assert joined.allowed and joined.steps[1] == "router core joins networks net and back"
        routed = of_intent(cloud, intent, "web", "172.16.9.9", "tcp/80")
        assert routed.allowed and routed.steps[1] == "router core has a route to 172.16.0.0/12 via 10.1.0.4"


@isolated
def test_drift_is_told() -> None:
    with two_tenants() as cloud:
        cloud.fabric._tenant(cloud.tenants["acme"]).nft.run("insert rule inet lab forward tcp dport 80 drop")
        found = traced(cloud, "web", "db", rules=True)
        assert found.wanted and not found.allowed
        assert found.steps[-1] == "but the installed rules drop it: this host has drifted; see `insula verify`"
        assert (found.rules[-1].where, found.rules[-1].text) == ("inet lab forward", "tcp dport 80 drop")
        assert traced(cloud, "web", "db", "tcp/81").allowed


@isolated
def test_a_policy_that_has_no_rule_for_it_is_named() -> None:
    """What is told is by the intent, whether or not the rules of policies are installed."""
    with two_tenants() as cloud:
        rule = PolicyRule(direction="in", peers=[{"type": "any"}], ports=[PortMatch(protocol="tcp", port=5432)])  # type: ignore[list-item]
        rule = msgspec.convert(msgspec.to_builtins(rule), PolicyRule)
        select = Selector(labels={"tier": "db"})
        policy = Policy(tenant="acme", name="db-only", select=select, directions=["in"], rules=[rule], created=0.0)
        labels = {"db": {"tier": "db"}}
        intent = cloud.intent("acme", policy=PolicyIntent(policies=[policy], labels=labels))
        denied = of_intent(cloud, intent, "web", "db", "tcp/80")
        assert not denied.wanted
        said = (
            "policy db-only selects db (10.0.0.3) for incoming connections, "
            "and no rule there allows tcp/80 from web (10.0.0.2)"
        )
        assert said in denied.steps
        for source, target in (("web", "db"), ("fd00::2", "fd00::3")):
            allowed = of_intent(cloud, intent, source, target, "tcp/5432")
            assert allowed.wanted and "it is allowed by policy db-only" in allowed.steps
        none = Policy(tenant="acme", name="all", select=Selector(), directions=["in"], rules=[], created=0.0)
        intent = cloud.intent("acme", policy=PolicyIntent(policies=[policy, none], labels=labels))
        assert not cloud.fabric.apply(intent)
        for source, target in (("web", "db"), ("fd00::2", "fd00::3")):
            denied = of_intent(cloud, intent, source, target, "udp/53")
            assert not denied.wanted and not denied.allowed
            assert any("all" in step and "db-only" in step and "udp/53" in step for step in denied.steps), denied.steps


@isolated
def test_a_peering_is_named() -> None:
    cloud = peered_tenants()
    cloud.peer(acme=(["net"], [TCP80]), globex=(["net"], []))
    out = traced(cloud, "web", "10.2.0.9")
    beyond = ["10.2.0.9 is in a network of globex, by a peering", "globex does not open tcp/80 there"]
    assert not out.allowed and not out.wanted and out.steps[1:] == beyond
    inward = traced(cloud, "10.2.0.9", "web")
    assert inward.allowed and "which this tenant has a peering with" in inward.steps[0]
    assert not traced(cloud, "10.2.0.9", "web", "tcp/81").allowed
    assert not traced(cloud, "10.2.0.9", "db").allowed


@isolated
def test_an_instance_of_a_peer_has_the_name_that_it_has_there() -> None:
    cloud = peered_tenants()
    cloud.peer(acme=(["net"], []), globex=(["net"], [TCP80]))
    out = traced(cloud, "web", "app.globex.peer")
    assert out.allowed and out.steps[1] == "app.globex.peer (10.2.0.9) is in a network of globex, by a peering"
    closed = traced(cloud, "web", "app.globex.peer", "tcp/81")
    assert not closed.allowed and closed.steps[-1] == "globex does not open tcp/81 there"
    assert traced(cloud, "fd00:1::9", "app.globex.peer").allowed, "by its IPv6 address"
    with pytest.raises(NotFound, match=r"no instance 'spy\.globex\.peer"):
        traced(cloud, "web", "spy.globex.peer")


@isolated
def test_what_leads_from_the_outside_is_named() -> None:
    World()
    with two_tenants() as cloud:
        web, db = (cloud.instances["acme", name].port for name in ("web", "db"))
        denied = traced(cloud, "outside", "web")
        nothing = "no published port, floating address or load balancer leads there from the outside"
        assert not denied.allowed and denied.steps == [nothing]
        published = PublishedPort(port=8080, target=80, count=3)
        listener = BalancerListener(address=None, port=9000)
        outside = OutsideIntent(
            forwards=[Forward(published=published, addresses=addresses(web))],
            floating=[FloatingIntent(address="203.0.113.50", target=db.address)],
            balancers=[BalancerIntent(index=1, listeners=[listener], backends=[(web.address or "", 90)])],
        )
        rule = PolicyRule(direction="in", peers=[AnyPeer()], ports=[PortMatch(protocol="tcp", port=82)])
        intent = cloud.intent("acme", outside=outside)
        assert not cloud.fabric.apply(intent)
        for service, words in (("tcp/81", "port 8081 of the host is published"), ("tcp/90", "a load balancer at port")):
            found = of_intent(cloud, intent, "outside", "web", service)
            assert found.allowed and found.wanted and found.steps[0].startswith(words), found.steps
        assert not of_intent(cloud, intent, "outside", "web", "tcp/83").allowed
        floating = of_intent(cloud, intent, "outside", "db", "udp/7")
        assert floating.allowed and floating.steps[0] == "the floating address 203.0.113.50 leads to it"
        out = of_intent(cloud, intent, "db", "outside", "tcp/443")
        assert out.allowed and "becomes the floating address 203.0.113.50" in out.steps[1]
        policy = Policy(tenant="acme", name="only-82", select=Selector(), directions=["in"], rules=[rule], created=0.0)
        intent = msgspec.structs.replace(intent, policy=PolicyIntent(policies=[policy], labels={}))
        assert not cloud.fabric.apply(intent)
        refused = of_intent(cloud, intent, "outside", "web", "tcp/81")
        assert not refused.allowed and not refused.wanted and "policy only-82" in refused.steps[-1]
        assert of_intent(cloud, intent, "outside", "web", "tcp/82").allowed


@isolated
def test_a_packet_is_sent_and_told_where_it_was_seen() -> None:
    with two_tenants() as cloud:
        intent, ports = cloud.intent("acme"), [cloud.instances["acme", name].port for name in ("web", "db")]

        def seen(source: str, target: str, service: str = "tcp/80") -> str:
            return live(cloud.fabric, intent, parse(intent, source, target, service), ports)

        assert seen("web", "db") == "seen last at acme/db, where it arrived"
        assert seen("fd00::2", "fd00::3", "udp/9") == "seen last at acme/db, where it arrived"
        assert seen("web", "outside") == "seen last at the host, from the uplink of acme"
        cloud.fabric._tenant(cloud.tenants["acme"]).nft.run("insert rule inet lab forward tcp dport 80 drop")
        assert seen("web", "db") != "seen last at acme/db, where it arrived"
        assert seen("web", "db", "tcp/81") == "seen last at acme/db, where it arrived", "the positive control"
        with pytest.raises(Invalid):
            seen("outside", "web")


@isolated
def test_bad_requests_are_refused() -> None:
    with two_tenants() as cloud:
        for source, target, service in [
            ("web", "db", "tcp"), ("web", "db", "tcp/0"), ("web", "db", "sctp/1"), ("web", "db", "icmp/8"),
            ("web", "fd00::3", "tcp/80"), ("outside", "1.1.1.1", "tcp/80"),
        ]:  # fmt: skip
            if (source, target) == ("web", "fd00::3"):
                assert traced(cloud, source, target, service).source_address == "fd00::2"
                continue
            with pytest.raises(Invalid):
                traced(cloud, source, target, service)
        with pytest.raises(Invalid):
            traced(cloud, "10.0.0.2", "fd00::3")
        with pytest.raises(NotFound):
            traced(cloud, "web", "nobody")


@isolated
def test_queues_of_guarantees_are_named_as_they_are_installed() -> None:
    mbit = 1_000_000
    World()
    with two_tenants() as cloud:
        assert not any("waits" in step for step in traced(cloud, "web", "outside").steps)
        number = cloud.instances["acme", "web"].port.index
        web = PortRates(number=0, out=Rate(floor=20 * mbit, ceiling=80 * mbit), in_=Rate(ceiling=70 * mbit))
        shaping = Shaping(link=100 * mbit, out=Rate(floor=50 * mbit), ports={number: web})
        cloud.others["acme"] = {"shaping": shaping}
        cloud.apply("acme")
        cloud.apply("globex", shaping=Shaping(link=100 * mbit))
        own = "it waits with all that web sends, which has a ceiling of 80mbit"
        assert traced(cloud, "web", "outside").steps[-2:] == [
            own,
            "it waits with the packets of web to the outside, which have a floor of 20mbit",
        ]
        assert traced(cloud, "web", "db").steps[-1] == own
        assert (
            traced(cloud, "db", "web").steps[-1] == "it waits with all that web receives, which has a ceiling of 70mbit"
        )
        found = traced(cloud, "db", "outside", rules=True)
        words = "it waits with the packets of tenant acme to the outside, which have a floor of 30mbit"
        assert found.steps[-1] == words, "what is left of the tenant's"
        assert found.rules[-1].where == "queue lab-out 1:4001"
        cloud.fabric.shaper.apply(*_handles(cloud), cloud.intent("acme", shaping=None))
        assert not any("waits" in step for step in traced(cloud, "web", "outside").steps), "by what is installed"


def _handles(cloud: Lab) -> tuple[Rtnl, TenantNamespace]:
    return cloud.fabric._handles()[0], cloud.fabric._tenant(cloud.tenants["acme"])
