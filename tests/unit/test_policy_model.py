"""The reference model of policies: each statement of docs/networking.md about them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from insula.model.objects import Network, Port, Tenant
from insula.model.policies import (
    AddressGroup,
    AnyPeer,
    CidrPeer,
    Direction,
    GroupPeer,
    InstancePeer,
    LabelRequirement,
    NamePeer,
    OperatorPolicy,
    OperatorRule,
    Policy,
    PolicyPeer,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.reference import policy_model
from insula.network.reference.policy_model import judge, matches, permits, resolves, would_deny

WEB, DB, OTHER = "10.0.0.2", "10.0.0.3", "10.1.0.2"
OUTSIDE = "203.0.113.7"
LABELS = {"web": {"app": "web"}, "db": {"app": "db", "tier": "back"}, "other": {"app": "web"}}
HTTP = [PortMatch(protocol="tcp", port=80)]


def network(name: str, index: int, subnet: str, subnet6: str) -> Network:
    return Network(
        tenant="acme",
        name=name,
        index=index,
        vni=index,
        subnet=subnet,
        gateway=subnet.replace("0/24", "1"),
        subnet6=subnet6,
        gateway6=subnet6.replace("/64", "1"),
        created=0,
    )


def port(instance: str, network: str, index: int, address: str, address6: str) -> Port:
    mac = f"02:42:00:00:00:{index:02x}"
    return Port(
        tenant="acme", network=network, instance=instance, index=index, mac=mac, address=address, address6=address6
    )


NETWORKS = [network("front", 1, "10.0.0.0/24", "fd00::/64"), network("back", 2, "10.1.0.0/24", "fd01::/64")]
PORTS = [
    port("web", "front", 1, WEB, "fd00::2"),
    port("db", "front", 2, DB, "fd00::3"),
    port("other", "back", 3, OTHER, "fd01::2"),
]


def intent(
    *policies: Policy, groups: tuple[AddressGroup, ...] = (), operator: tuple[OperatorPolicy, ...] = ()
) -> TenantIntent:
    tenant = Tenant(name="acme", index=1, id_base=1 << 16, created=0)
    policy = PolicyIntent(policies=policies, groups=groups, labels=LABELS, operator=operator)
    return TenantIntent(tenant=tenant, networks=NETWORKS, ports=PORTS, policy=policy)


def policy(
    select: dict[str, str],
    *rules: PolicyRule,
    directions: tuple[Direction, ...] = ("in",),
    name: str = "p",
    **other: bool,
) -> Policy:
    return Policy(
        tenant="acme",
        name=name,
        select=Selector(labels=select),
        directions=list(directions),
        rules=list(rules),
        created=0,
        **other,  # type: ignore[arg-type]
    )


def rule(*peers: PolicyPeer, ports: list[PortMatch] | None = None, direction: Direction = "in") -> PolicyRule:
    return PolicyRule(direction=direction, peers=list(peers), ports=ports or [])


def labelled(network: str | None = None, **labels: str) -> InstancePeer:
    return InstancePeer(select=Selector(labels=labels), network=network)


def test_nothing_selected_is_all_allowed() -> None:
    assert permits(intent(), WEB, DB, "tcp", 5432)
    assert permits(intent(policy({"app": "none"})), WEB, DB, "tcp", 5432)


def test_a_policy_without_rules_denies_its_direction_and_no_other() -> None:
    world = intent(policy({"app": "db"}))
    assert not permits(world, WEB, DB, "tcp", 80)
    assert permits(world, DB, WEB, "tcp", 80)
    assert judge(world, WEB, DB, "udp", 1) == (False, "in", ("p",))


def test_an_empty_selector_selects_all() -> None:
    world = intent(policy({}))
    assert not permits(world, WEB, DB, "tcp", 80) and not permits(world, DB, WEB, "tcp", 80)


def test_both_directions_must_allow() -> None:
    out = policy({"app": "web"}, rule(labelled(app="db"), direction="out"), directions=("out",), name="out")
    into = policy({"app": "db"}, rule(labelled(app="web"), ports=HTTP), name="in")
    world = intent(out, into)
    assert permits(world, WEB, DB, "tcp", 80)
    assert not permits(world, WEB, DB, "tcp", 81)
    assert not permits(world, WEB, OUTSIDE, "tcp", 80)


def test_conditions_of_a_peer_all_hold_and_one_of_several_peers() -> None:
    world = intent(policy({"app": "db"}, rule(labelled("back", app="web"), CidrPeer(cidr="203.0.113.0/24"))))
    assert not permits(world, WEB, DB, "tcp", 80)
    assert permits(world, OTHER, DB, "tcp", 80)
    assert permits(world, OUTSIDE, DB, "tcp", 80)


def test_rules_are_no_cross_product() -> None:
    ssh = [PortMatch(protocol="tcp", port=22)]
    world = intent(
        policy({"app": "db"}, rule(labelled("front", app="web"), ports=HTTP), rule(labelled("back"), ports=ssh))
    )
    assert permits(world, WEB, DB, "tcp", 80) and permits(world, OTHER, DB, "tcp", 22)
    assert not permits(world, WEB, DB, "tcp", 22) and not permits(world, OTHER, DB, "tcp", 80)


def test_ranges_ports_and_icmp() -> None:
    ports = [PortMatch(protocol="udp", port=100, end_port=200), PortMatch(protocol="icmp", icmp_type=8)]
    world = intent(policy({"app": "db"}, rule(AnyPeer(), ports=ports)))
    assert [permits(world, WEB, DB, "udp", number) for number in (99, 100, 200, 201)] == [False, True, True, False]
    assert permits(world, WEB, DB, "icmp", 8) and not permits(world, WEB, DB, "icmp", 13)
    assert not permits(world, "fd00::2", "fd00::3", "icmpv6", 128)
    every = intent(policy({"app": "db"}, rule(AnyPeer(), ports=[PortMatch(protocol="icmp")])))
    assert permits(every, "fd00::2", "fd00::3", "icmpv6", 128)
    assert not permits(every, WEB, DB, "sctp")
    assert permits(intent(policy({"app": "db"}, rule(AnyPeer()))), WEB, DB, "sctp")


def test_ranges_groups_and_exceptions_are_of_addresses_whoever_has_them() -> None:
    ranges = policy({"app": "db"}, rule(CidrPeer(cidr="10.0.0.0/8", exceptions=["10.1.0.0/16"])))
    assert permits(intent(ranges), WEB, DB, "tcp", 1) and not permits(intent(ranges), OTHER, DB, "tcp", 1)
    assert not permits(intent(ranges), "fd00::2", "fd00::3", "tcp", 1)
    group = AddressGroup(tenant="acme", name="office", cidrs=["203.0.113.0/29", "fd00::2/128"], created=0)
    grouped = policy({"app": "db"}, rule(GroupPeer(group="office")))
    assert permits(intent(grouped, groups=(group,)), OUTSIDE, DB, "tcp", 1)
    assert permits(intent(grouped, groups=(group,)), "fd00::2", "fd00::3", "tcp", 1)
    assert not permits(intent(grouped), OUTSIDE, DB, "tcp", 1)
    assert not permits(
        intent(policy({"app": "db"}, rule(CidrPeer(cidr="0.0.0.0/0", exceptions=["0.0.0.0/0"])))), WEB, DB, "tcp", 1
    )


def test_a_name_is_no_address() -> None:
    named = policy({"app": "web"}, rule(NamePeer(name="example.com"), direction="out"), directions=("out",))
    assert not permits(intent(named), WEB, OUTSIDE, "tcp", 443)


@pytest.mark.parametrize(
    ("operator", "values", "holds"),
    [
        ("In", ["web", "x"], (True, False, False)),
        ("NotIn", ["web"], (False, True, True)),
        ("Exists", [], (True, True, False)),
        ("DoesNotExist", [], (False, False, True)),
    ],
)
def test_requirements_are_those_of_kubernetes(operator: str, values: list[str], holds: tuple[bool, ...]) -> None:
    requirement = LabelRequirement(key="app", operator=operator, values=values)  # type: ignore[arg-type]
    selector = Selector(expressions=[requirement])
    assert tuple(matches(selector, labels) for labels in ({"app": "web"}, {"app": "db"}, {})) == holds


def test_an_address_of_a_network_that_no_instance_has_may_send_nothing() -> None:
    assert judge(intent(), "10.0.0.99", WEB, "tcp", 80) == (False, "address", ())


def test_the_operator_is_asked_first_and_in_order() -> None:
    company = CidrPeer(cidr="203.0.113.0/24")
    rules = [
        OperatorRule(action="accept", direction="out", peers=[company], ports=HTTP),
        OperatorRule(action="pass", direction="out", peers=[company], ports=[PortMatch(protocol="tcp", port=81)]),
        OperatorRule(action="deny", direction="out", peers=[company, CidrPeer(cidr="10.0.0.0/8")]),
        OperatorRule(action="deny", direction="in", peers=[AnyPeer()], ports=[PortMatch(protocol="tcp", port=22)]),
    ]
    tier = OperatorPolicy(name="company", rules=rules, created=0)
    isolated = policy({"app": "web"}, directions=("out",))
    world = intent(isolated, operator=(tier,))
    assert permits(world, WEB, OUTSIDE, "tcp", 80)
    assert not permits(world, WEB, OUTSIDE, "tcp", 81)
    assert permits(intent(operator=(tier,)), WEB, OUTSIDE, "tcp", 81)
    assert judge(intent(operator=(tier,)), WEB, OUTSIDE, "tcp", 82) == (False, "operator", ("company",))
    assert permits(intent(operator=(tier,)), WEB, DB, "tcp", 82), "10.0.0.0/8 of the company is not that of the tenant"
    assert not permits(intent(operator=(tier,)), "198.51.100.1", WEB, "tcp", 22)
    assert permits(intent(operator=(tier,)), OTHER, WEB, "tcp", 22)


def test_audit_denies_and_allows_nothing_and_tells_what_it_would_deny() -> None:
    audited = policy({"app": "db"}, rule(labelled(app="web"), ports=HTTP), name="audited", audit=True)
    world = intent(audited)
    assert permits(world, WEB, DB, "tcp", 81)
    assert would_deny(world, audited, "in", WEB, DB, "tcp", 81)
    assert not would_deny(world, audited, "in", WEB, DB, "tcp", 80)
    assert not would_deny(world, audited, "in", DB, WEB, "tcp", 81)
    enforced = policy({"app": "db"}, name="enforced")
    assert not permits(intent(audited, enforced), WEB, DB, "tcp", 80)


def test_the_resolver_is_closed_by_any_policy_without_dns() -> None:
    open_, closed = policy({}, directions=("out",)), policy({"app": "web"}, directions=("out",), dns=False, name="q")
    assert resolves(intent(open_), WEB)
    assert not resolves(intent(open_, closed), WEB) and resolves(intent(open_, closed), DB)


def test_the_model_and_the_compiler_import_nothing_of_each_other() -> None:
    model = Path(policy_model.__file__)
    compiler = sorted((model.parents[1] / "linux").rglob("*.py"))
    assert compiler

    def imported(path: Path) -> set[str]:
        tree = ast.walk(ast.parse(path.read_text()))
        found = set()
        for node in tree:
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
            if isinstance(node, ast.Import):
                found |= {each.name for each in node.names}
        return found

    assert not any(name.startswith("insula.network.linux") for name in imported(model))
    for path in compiler:
        assert not any("policy_model" in name for name in imported(path)), path
