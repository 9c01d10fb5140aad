"""From policies to the rules of egress by name."""

from __future__ import annotations

import msgspec
import pytest

from insula.model.errors import Invalid
from insula.model.objects import AddressPair, Network, Port, Tenant
from insula.model.policies import (
    AddressGroup,
    AnyPeer,
    CidrPeer,
    GroupPeer,
    LabelRequirement,
    NamePeer,
    OperatorPolicy,
    OperatorRule,
    Policy,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.names.compiler import ClientCompiler, check_rule, egress_rules, has_names
from insula.network.names.rules import ClientRules, DestinationRange, NameRule, OperatorRange
from tests.support.policy_lab import policy

ALL = ("tcp", "udp", "icmp", "icmpv6")


def named(*names: str, ports: tuple[PortMatch, ...] = (), select: Selector | None = None, **more: object) -> Policy:
    rule = PolicyRule(direction="out", peers=[NamePeer(name=name) for name in names], ports=list(ports))
    return Policy(
        tenant="acme",
        name="p",
        select=select or Selector(labels={"app": "web"}),
        directions=["out"],
        rules=[rule],
        created=0,
        **more,  # type: ignore[arg-type]
    )


def rules_of(*policies: Policy, labels: dict[str, str] | None = None, **more: object) -> ClientRules | None:
    intent = PolicyIntent(policies=policies, **more)  # type: ignore[arg-type]
    return ClientCompiler(intent).rules({"app": "web"} if labels is None else labels, ["10.0.0.2"])


def test_ports_and_protocols() -> None:
    tcp, udp = PortMatch(protocol="tcp", port=443), PortMatch(protocol="udp")
    many = PortMatch(protocol="tcp", port=1, end_port=1000)
    found = rules_of(named("API.example.com.", ports=(tcp, many, udp)), named("*.b.test"))
    assert found and found.rules == (
        NameRule("api.example.com", "tcp", (443,)),
        NameRule("api.example.com", "udp"),
        *(NameRule("*.b.test", protocol) for protocol in ALL),  # type: ignore[arg-type]
    ), "a range of more ports than a lease can have is left out, not widened"
    few = PortMatch(protocol="tcp", port=8000, end_port=8002)
    found = rules_of(named("a.test", ports=(few, PortMatch(protocol="icmp"))))
    assert found and found.rules == (
        NameRule("a.test", "tcp", (8000, 8001, 8002)),
        NameRule("a.test", "icmp"),
        NameRule("a.test", "icmpv6"),
    )
    assert rules_of(named("a.test", ports=(PortMatch(protocol="icmp", icmp_type=8),))) is None


def test_rules_that_can_not_be_leased_are_refused_when_they_are_made() -> None:
    def rule(name: str, *ports: PortMatch) -> PolicyRule:
        return PolicyRule(direction="out", peers=[NamePeer(name=name), AnyPeer()], ports=list(ports))

    assert check_rule(rule("API.Example.com.", PortMatch(protocol="tcp", port=1, end_port=64))).peers[0] == NamePeer(
        name="api.example.com"
    )
    for wrong in (
        rule("*.com"),
        rule("1.2.3.4"),
        rule("web.acme.internal"),
        rule("a.test", PortMatch(protocol="tcp", port=1, end_port=65)),
        rule("a.test", PortMatch(protocol="icmp", icmp_type=8)),
    ):
        with pytest.raises(Invalid):
            check_rule(wrong)
    assert rules_of(named("*.com")) is None, "one that was made all the same opens nothing"
    other = PolicyRule(direction="out", peers=[AnyPeer()], ports=[PortMatch(protocol="tcp", port=1, end_port=65535)])
    assert check_rule(other) is other


def test_which_instances_have_rules() -> None:
    assert rules_of(named("a.test"), labels={"app": "db"}) is None
    assert rules_of(named("a.test", audit=True)) is None
    assert (
        rules_of(named("a.test", dns=False)) is None and rules_of(named("a.test"), named("b.test", dns=False)) is None
    )
    assert rules_of(policy("q", {"app": "web"}, "out 10.0.0.0/8", directions=("out",))) is None
    for operator, values, labels, selected in (
        ("In", ["a", "b"], {"app": "b"}, True), ("In", ["a"], {}, False), ("NotIn", ["a"], {}, True),
        ("NotIn", ["a"], {"app": "a"}, False), ("Exists", [], {"app": ""}, True), ("Exists", [], {}, False),
        ("DoesNotExist", [], {}, True), ("DoesNotExist", [], {"app": "x"}, False),
    ):  # fmt: skip
        requirement = LabelRequirement(key="app", operator=operator, values=values)  # type: ignore[arg-type]
        found = rules_of(named("a.test", select=Selector(expressions=[requirement])), labels=labels)
        assert (found is not None) == selected, (operator, labels)


def test_what_other_rules_open() -> None:
    group = AddressGroup(tenant="acme", name="g", cidrs=["9.9.9.0/24"], created=0)
    but = CidrPeer(cidr="8.0.0.0/8", exceptions=["8.8.8.8/32"])
    cidr = PolicyRule(direction="out", peers=[but, GroupPeer(group="g")])
    other = Policy(tenant="acme", name="o", select=Selector(), directions=["out"], rules=[cidr], created=0)
    found = rules_of(named("a.test"), other, policy("x", {}, "out any tcp/22", directions=("out",)), groups=[group])
    assert found and found.open == (
        DestinationRange("8.0.0.0/8", without=("8.8.8.8/32",)),
        DestinationRange("9.9.9.0/24"),
        DestinationRange("0.0.0.0/0", "tcp", (22, 22)),
        DestinationRange("::/0", "tcp", (22, 22)),
    )


def test_the_whole_intent() -> None:
    def network(name: str, number: int, **more: object) -> Network:
        subnet, six = f"10.{number}.0.0/24", f"fd00:{number}::/64"
        return Network(
            tenant="acme", name=name, index=number, vni=number, subnet=subnet, gateway=f"10.{number}.0.1", subnet6=six,
            gateway6=f"fd00:{number}::1", created=0, **more,  # type: ignore[arg-type]
        )  # fmt: skip

    def port(index: int, instance: str, network: str, address: str) -> Port:
        return Port(
            tenant="acme", network=network, instance=instance, index=index, mac="02:10:00:00:00:01", address=address,
            address6=f"fd00::{index}",
        )  # fmt: skip

    operator = OperatorPolicy(
        name="o", rules=[OperatorRule(action="deny", direction="out", peers=[CidrPeer(cidr="8.0.0.0/8")])], created=0
    )
    intent = TenantIntent(
        tenant=Tenant(name="acme", index=1, id_base=1 << 16, created=0),
        networks=[network("a", 1), network("b", 2), network("closed", 3, outbound="none")],
        ports=[port(1, "web", "a", "10.1.0.2"), port(2, "web", "b", "10.2.0.2"), port(3, "web", "closed", "10.3.0.2"),
               port(4, "db", "a", "10.1.0.3")],
        policy=PolicyIntent(policies=[named("a.test")], labels={"web": {"app": "web"}}, operator=[operator]),
    )  # fmt: skip
    found = egress_rules(intent, [("100.64.0.2", 5300)], ["100.64.0.0/10"])
    assert found.by_address == dict.fromkeys(["10.1.0.2", "fd00::1", "10.2.0.2", "fd00::2"], "web"), "with a way out"
    subnets = (subnet for n in (1, 2, 3) for subnet in (f"10.{n}.0.0/24", f"fd00:{n}::/64"))
    assert found.own == (*subnets, "100.64.0.0/10")
    assert found.operator == (OperatorRange("deny", DestinationRange("8.0.0.0/8")),)
    assert found.own_servers[0] == ("10.1.0.1", 53) and found.servers == (("100.64.0.2", 5300),)
    assert has_names(intent.policy.policies) and not has_names([])


def test_an_address_that_several_may_use_has_names_if_their_rules_are_the_same() -> None:
    db = {"app": "db"}
    pairs = [AddressPair(address=each) for each in ("10.1.0.100", "10.1.0.101", "10.1.0.3", "172.16.0.0/16")]

    def port(index: int, instance: str, *allowed: AddressPair) -> Port:
        return Port(
            tenant="acme", network="a", instance=instance, index=index, mac="02:10:00:00:00:01",
            address=f"10.1.0.{index}", allowed_pairs=[*allowed],
        )  # fmt: skip

    def owners(*ports: Port) -> dict[str, str]:
        labels = {"web": {"app": "web"}, "twin": {"app": "web"}, "db": {"app": "db"}, "none": {}}
        policies = [named("a.test"), msgspec.structs.replace(named("b.test"), name="b", select=Selector(labels=db))]
        intent = TenantIntent(
            tenant=Tenant(name="acme", index=1, id_base=1 << 16, created=0),
            ports=ports,
            policy=PolicyIntent(policies=policies, labels=labels),
        )
        return egress_rules(intent, [], []).by_address

    web, twin = port(2, "web", *pairs), port(3, "twin", pairs[0])
    own = {"10.1.0.2": "web", "10.1.0.3": "twin"}
    assert owners(web, twin) == {**own, "10.1.0.100": "twin", "10.1.0.101": "web"}, "an own address is its owner's"
    for other in ("db", "none"):
        found = owners(web, twin, port(4, other, pairs[0]))
        assert "10.1.0.100" not in found and found["10.1.0.101"] == "web", other
