"""An address that several instances may use (allowed address pairs): packets, the proof and a trace agree about it."""

from __future__ import annotations

import functools
import socket

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.model.objects import AddressPair
from insula.model.policies import CidrPeer, Direction, InstancePeer, Policy, PolicyRule, Selector
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.proof.prover import Prover
from insula.network.tracing.trace import parse, trace
from tests.support.lab import Instance, Lab, isolated, two_tenants

SHARED, SHARED6 = "10.0.0.100", "fd00::100"
ALIKE = {name: {"app": "gate"} for name in ("one", "two")}
APART = {"one": {"app": "one"}, "two": {"app": "two"}}


def made(cloud: Lab, labels: dict[str, dict[str, str]], *policies: Policy) -> TenantIntent:
    """Apply policies and return the tenant's intent."""
    others = {"web": {"app": "web"}, "db": {"app": "db"}}
    cloud.others["acme"] = {"policy": PolicyIntent(policies=policies, labels=labels | others)}
    cloud.apply("acme")
    return cloud.intent("acme")


def policy(app: str, direction: Direction, *rules: PolicyRule) -> Policy:
    select = Selector(labels={"app": app})
    return Policy(tenant="acme", name=app, select=select, directions=[direction], rules=[*rules], created=0.0)


def sends(sender: Instance, source: str, receiver: Instance, target: str) -> bool:
    """Whether a datagram arrives."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with sender.socket(family, socket.SOCK_DGRAM) as out, receiver.socket(family, socket.SOCK_DGRAM) as into:
        receiver.do(functools.partial(into.bind, (target, 9)))
        sender.do(functools.partial(out.bind, (source, 0)))
        into.settimeout(0.5)
        try:
            out.sendto(b"x", (target, 9))
            return into.recv(1) == b"x"
        except OSError:
            return False


def takes(instance: Instance) -> None:
    """Have the instance use both addresses."""

    def take() -> None:
        with Rtnl() as inside:
            index = inside.index("eth0")
            assert index
            inside.execute(netlink.add_address(index, f"{SHARED}/24"), netlink.add_address(index, f"{SHARED6}/64"))

    instance.do(take)


@isolated
def test_packets_the_proof_and_a_trace_agree_about_a_shared_address() -> None:
    with two_tenants() as cloud:
        pairs = [AddressPair(address=SHARED), AddressPair(address=SHARED6)]
        one, two = (cloud.instance("acme", name, pairs=pairs) for name in ("one", "two"))
        web = cloud.instances["acme", "web"]
        takes(one)
        to_all = PolicyRule(direction="out", peers=[CidrPeer(cidr="10.0.0.0/24"), CidrPeer(cidr="fd00::/64")])
        to_one = PolicyRule(direction="out", peers=[InstancePeer(select=Selector(labels={"app": "one"}))])
        to_gate = PolicyRule(direction="out", peers=[InstancePeer(select=Selector(labels={"app": "gate"}))])
        from_web = PolicyRule(direction="in", peers=[InstancePeer(select=Selector(labels={"app": "web"}))])
        cases: list[tuple[dict[str, dict[str, str]], list[Policy], bool, bool]] = [
            (ALIKE, [], True, True),
            (APART, [], True, False),
            (APART, [policy("web", "out", to_all)], True, False),
            (APART, [policy("web", "out", to_one)], False, False),
            (ALIKE, [policy("web", "out", to_gate)], True, True),
            (ALIKE, [policy("gate", "in", from_web)], True, True),
            (APART, [policy("two", "in", from_web)], False, False),  # whose policy, nobody can tell
            (APART, [policy("two", "in", from_web), policy("db", "in")], False, False),
            (APART, [policy("db", "in")], True, False),
        ]
        prover, running = Prover(cloud.fabric), {each.port.index for each in cloud.instances.values()}
        for number, (labels, policies, into, out) in enumerate(cases):
            intent = made(cloud, labels, *policies)
            assert prover.prove([intent, cloud.intent("globex")], running).findings == [], number
            for shared, own in ((SHARED, web.port.address), (SHARED6, str(web.port.address6))):
                assert sends(web, own, one, shared) == into, (number, shared)
                assert sends(one, shared, web, own) == out, (number, shared)
                for source, target, passes in (("web", shared, into), (shared, "web", out)):
                    told = trace(cloud.fabric, intent, parse(intent, source, target, "udp/9"), running)
                    assert (told.allowed, told.wanted) == (passes, passes), (number, source, target, told.steps)
        assert two.port.index in running


@isolated
def test_who_else_gets_or_uses_a_shared_address_is_found() -> None:
    with two_tenants() as cloud:
        pairs = [AddressPair(address=SHARED)]
        for name in ("one", "two"):
            cloud.instance("acme", name, pairs=pairs)
        intents = [made(cloud, APART, policy("two", "in")), cloud.intent("globex")]
        prover, running = Prover(cloud.fabric), {each.port.index for each in cloud.instances.values()}
        assert prover.prove(intents, running).findings == [], "the positive control"
        cloud.fabric._tenant(cloud.tenants["acme"]).nft.run("flush map inet lab subject_ranges4")
        found = prover.prove(intents, running).findings
        ways = [(a, b) for a in ("web", "db", "one", "two") for b in ("one", "two") if a != b]
        assert {("leak", f"acme/{a}", f"acme/{b}") for a, b in ways} <= {each[1:4] for each in found}
        assert all(each.witness and each.witness.target == SHARED for each in found)
