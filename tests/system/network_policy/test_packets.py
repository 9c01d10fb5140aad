"""What policies let through, by packets: TCP, UDP and ICMP over IPv4 and IPv6."""

from __future__ import annotations

import socket

import pytest

from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.policies import AddressGroup, CidrPeer, OperatorPolicy, OperatorRule, PortMatch
from tests.support.lab import World, isolated, query
from tests.support.policy_lab import SHORT, PolicyLab, address, policy, policy_lab, reaches

FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
UDP = socket.SOCK_DGRAM


@isolated
@FAMILIES
def test_only_what_a_policy_allows_and_answers(family: int) -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        assert reaches(web, db, family, 80) and reaches(web, db, family, 80, UDP), "nothing is selected"
        lab.enforce(policy("db", {"app": "db"}, "in app=web tcp/80,udp/5000-5100"))
        assert reaches(web, db, family, 80)
        assert not reaches(web, db, family, 81)
        assert not reaches(web, db, family, 80, UDP)
        for port, allowed in ((4999, False), (5000, True), (5050, True), (5100, True), (5101, False)):
            assert reaches(web, db, family, port, UDP) == allowed, port
        assert reaches(db, web, family, 81), "direction out is not selected"
        assert not web.pings(address(db, family), SHORT)
        assert db.pings(address(web, family)), "answers come through"
        other = lab.instance("other")
        assert not reaches(other, db, family, 80)
        lab.remove("db")
        assert reaches(other, db, family, 81) and web.pings(address(db, family))


@isolated
@FAMILIES
def test_direction_out_and_both_together(family: int) -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        lab.enforce(policy("web", {"app": "web"}, "out app=db tcp/80,tcp/81", directions=("out",)))
        assert reaches(web, db, family, 80) and not reaches(web, db, family, 82)
        assert reaches(db, web, family, 82)
        lab.enforce(policy("db", {"app": "db"}, "in any tcp/81"))
        assert reaches(web, db, family, 81)
        assert not reaches(web, db, family, 80), "the destination does not allow it"
        assert not reaches(web, db, family, 82), "the source does not allow it"


@isolated
@FAMILIES
def test_a_policy_without_rules_denies_all_and_the_refused_learn_it_at_once(family: int) -> None:
    with policy_lab() as lab:
        lab.enforce(policy("none", {}, directions=("in", "out")))
        web, db = lab["web"], lab["db"]
        with web.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            with pytest.raises(ConnectionRefusedError):
                client.connect((address(db, family), 80))
        assert not reaches(db, web, family, 80, UDP) and not web.pings(address(db, family), SHORT)
        away, peer = lab.cloud.instances["globex", "web"], lab.cloud.instances["globex", "db"]
        assert reaches(away, peer, family, 80), "another tenant's are not selected"


@isolated
@FAMILIES
def test_echo_follows_rules_by_type_and_protocol(family: int) -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        kind = "icmp/8" if family == socket.AF_INET else "icmpv6/128"
        for rule, allowed in (("tcp", False), (kind, True), ("icmp", True), ("icmp/13,icmpv6/139", False)):
            lab.enforce(policy("db", {"app": "db"}, f"in any {rule}"))
            assert db.pings(address(web, family))
            assert web.pings(address(db, family), 5 if allowed else SHORT) == allowed, rule


@isolated
def test_ranges_groups_and_networks_as_peers() -> None:
    with policy_lab() as lab:
        lab.cloud.network("acme", "10.9.0.0/24", "fd09::/64", name="back")
        lab.cloud.router("acme", "net", "back")
        web, db = lab["web"], lab["db"]
        third, far = lab.instance("third"), lab.instance("far", "back")
        assert reaches(far, db, socket.AF_INET, 80)
        lab.enforce(policy("db", {"app": "db"}, "in network:back"))
        assert reaches(far, db, socket.AF_INET, 80) and reaches(far, db, socket.AF_INET6, 80)
        assert not reaches(web, db, socket.AF_INET, 80) and not reaches(web, db, socket.AF_INET6, 80)
        lab.enforce(policy("db", {"app": "db"}, f"in {web.port.address}/32"))
        assert reaches(web, db, socket.AF_INET, 80) and not reaches(web, db, socket.AF_INET6, 80)
        assert not reaches(third, db, socket.AF_INET, 80) and not reaches(far, db, socket.AF_INET, 80)
        lab.groups["some"] = AddressGroup(tenant="acme", name="some", cidrs=["10.9.0.0/24", "fd00::2/128"], created=0)
        lab.enforce(policy("db", {"app": "db"}, "in group:some tcp/80"))
        assert reaches(far, db, socket.AF_INET, 80) and not reaches(far, db, socket.AF_INET6, 80)
        assert reaches(web, db, socket.AF_INET6, 80) and not reaches(web, db, socket.AF_INET, 80)
        lab.groups["some"] = AddressGroup(tenant="acme", name="some", cidrs=["fd09::/64"], created=0)
        lab.enforce()
        assert reaches(far, db, socket.AF_INET6, 80) and not reaches(far, db, socket.AF_INET, 80)


@isolated
def test_the_outside_is_a_peer_too() -> None:
    with policy_lab() as lab:
        world = World()
        world.tells_callers(80)
        world.tells_callers(443)
        web, db = lab["web"], lab["db"]
        assert web.connects(world.ADDRESS, 80) and web.connects(world.ADDRESS6, 80)
        lab.enforce(policy("web", {"app": "web"}, "out 203.0.113.0/24 tcp/443", directions=("out",)))
        assert web.connects(world.ADDRESS, 443) and not web.connects(world.ADDRESS, 80, SHORT)
        assert not web.connects(world.ADDRESS6, 443, SHORT)
        assert db.connects(world.ADDRESS6, 443), "another instance"
        lab.enforce(policy("web", {"app": "web"}, "out app=db", directions=("out",)))
        assert not web.connects(world.ADDRESS, 443, SHORT)


def company(*rules: OperatorRule) -> OperatorPolicy:
    return OperatorPolicy(name="company", rules=[*rules], created=0)


def rule(action: str, cidr: str, *ports: int) -> OperatorRule:
    matches = [PortMatch(protocol="tcp", port=port) for port in ports]
    return OperatorRule(action=action, direction="out", peers=[CidrPeer(cidr=cidr)], ports=matches)  # type: ignore[arg-type]


@isolated
def test_the_operator_is_above_the_tenants_policies() -> None:
    with policy_lab() as lab:
        world = World()
        for port in (80, 81, 82):
            world.tells_callers(port)
        web, db = lab["web"], lab["db"]
        lab.operator = [
            company(rule("accept", "203.0.113.2/32", 80), rule("deny", "203.0.113.0/24"), rule("deny", "10.0.0.0/8"))
        ]
        lab.enforce(policy("web", {"app": "web"}, "out 203.0.113.0/24 tcp/81", "out app=db", directions=("out",)))
        assert web.connects(world.ADDRESS, 80), "accepted by the operator, whatever the tenant says"
        assert not web.connects(world.ADDRESS, 81, SHORT), "allowed by the tenant and denied by the operator"
        assert db.connects(world.ADDRESS6, 81), "the rules are about other addresses"
        assert reaches(web, db, socket.AF_INET, 80), "the company's 10.0.0.0/8 is not the tenant's"
        lab.operator = [company(rule("pass", "203.0.113.2/32", 81), rule("deny", "0.0.0.0/0"))]
        lab.enforce()
        assert web.connects(world.ADDRESS, 81) and not web.connects(world.ADDRESS, 80, SHORT)
        lab.operator = []
        lab.enforce()
        assert db.connects(world.ADDRESS, 82)


@isolated
def test_the_resolver_stays_reachable_unless_a_policy_says_no() -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        lab.cloud.set_names("acme", {"db": ["10.0.0.3"]})
        lab.enforce(policy("none", {}, directions=("in", "out")))
        for gateway in ("10.0.0.1", "fd00::1"):
            assert query(web.netns, gateway, "db.acme.internal") or query(web.netns, gateway, "db")
        lab.enforce(policy("quiet", {"app": "web"}, directions=("out",), dns=False))
        for gateway in ("10.0.0.1", "fd00::1"):
            assert query(web.netns, gateway, "db", timeout=SHORT) is None
            assert query(db.netns, gateway, "db") is not None, "another instance"
        lab.remove("quiet")
        assert query(web.netns, "10.0.0.1", "db") is not None


@isolated
def test_packets_within_the_instance_are_nobodys_business() -> None:
    with policy_lab() as lab:
        lab.enforce(policy("none", {}, directions=("in", "out")))
        web = lab["web"]
        for family in (socket.AF_INET, socket.AF_INET6):
            assert reaches(web, web, family, 80) and web.pings(address(web, family))


@isolated
def test_neighbours_are_found_and_errors_arrive_under_a_policy() -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        lab.enforce(policy("db", {"app": "db"}, "in app=web udp", directions=("in", "out")))
        for family in (socket.AF_INET, socket.AF_INET6):
            with web.socket(family, UDP) as asks:
                asks.connect((address(db, family), 9999))
                asks.send(b"x")
                asks.settimeout(5)
                with pytest.raises(ConnectionRefusedError):  # port unreachable, about an allowed packet
                    asks.recv(1)


def rules_of(lab: PolicyLab) -> str:
    netns = lab.cloud.inside("acme")

    def listed() -> str:
        with Nft() as nft:
            return nft.rules("inet", "lab") + nft.rules("bridge", "lab")

    return str(call_in(netns, listed))


@isolated
def test_the_rules_are_the_same_with_one_policy_and_with_a_thousand() -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        lab.enforce(policy("p0", {"app": "db"}, "in app=web tcp/80"))
        before = rules_of(lab)
        lab.enforce(
            *(
                policy(f"p{n}", {"app": f"a{n}"}, f"in app=web tcp/{n}", f"in 10.{n % 200}.0.0/16")
                for n in range(1, 1000)
            )
        )
        assert rules_of(lab) == before
        assert reaches(web, db, socket.AF_INET, 80) and not reaches(web, db, socket.AF_INET, 81)
        assert lab.cloud.fabric.installed(lab.cloud.tenants["acme"]).drift == []
