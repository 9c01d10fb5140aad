"""Broadcasts and multicasts are proven: they come to everybody in their network whom policies let them, and to nobody
else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from insula.kernel import netlink
from insula.model.policies import AnyPeer, Policy, PolicyRule, PortMatch, Selector
from insula.network.intent import PolicyIntent
from insula.network.linux import naming
from insula.network.proof.verify import verify
from tests.support.lab import Lab, World, isolated, two_tenants
from tests.support.proof_lab import Corruption, finds, nft
from tests.system.test_proof import cable_between_tenants, in_acme, port_flags, port_on_the_wrong_bridge


def out(*rules: PolicyRule) -> Policy:
    select = Selector(labels={"app": "web"})
    return Policy(tenant="acme", name="out", select=select, directions=["out"], rules=[*rules], created=0.0)


CLOSED = Policy(tenant="acme", name="in", select=Selector(labels={"app": "db"}), directions=["in"], created=0.0)
SOME = PolicyRule(direction="out", peers=[AnyPeer()], ports=[PortMatch(protocol="udp", port=5353)])


def multicasts_are_dropped(cloud: Lab) -> None:
    nft(cloud, "acme", "insert rule inet lab forward ip daddr 224.0.0.0/4 drop")


def frames_to_all_are_dropped(cloud: Lab) -> None:
    nft(cloud, "acme", "insert rule bridge lab forward ether daddr ff:ff:ff:ff:ff:ff drop")


def nobody_is_guarded(cloud: Lab) -> None:
    nft(cloud, "acme", "flush set bridge lab guarded")


def broadcasts_pass_policies(cloud: Lab) -> None:
    nft(cloud, "acme", "insert rule inet lab forward ip daddr 255.255.255.255 accept")


def multicasts_pass_policies(cloud: Lab) -> None:
    nft(cloud, "acme", "insert rule inet lab forward ip6 daddr ff02::/16 udp dport 9 accept")


def frames_are_reflected(cloud: Lab) -> None:
    nft(cloud, "acme", "flush set bridge lab reflected")


def a_multicast_is_sent_outside(cloud: Lab) -> None:
    nft(cloud, "acme", "table ip other { chain c { type nat hook prerouting priority -100; "
        "ip daddr 224.0.0.99 dnat to 203.0.113.2; }; }")  # fmt: skip


def overlay_is_flooded(cloud: Lab) -> None:
    """A device of another VXLAN network gets what is for everybody, and not what is for single stations."""
    with in_acme(cloud) as acme:
        bridge = naming.bridge_index(1)
        made = netlink.vxlan(
            "spy", vni=99, netns=cloud.inside("acme"), local="127.0.0.1", port=4789, index=7777, mtu=1400, master=bridge
        )
        acme.execute(made)


CORRUPTIONS = [
    Corruption(multicasts_are_dropped, "blocked", "acme/web", "acme/db", "udp/53 from 10.0.0.2 to 224.0.0.0"),
    Corruption(frames_to_all_are_dropped, "blocked", "acme/web", "acme/db", "from 10.0.0.2 to 10.0.0.255"),
    Corruption(port_flags(broadcast=False), "blocked", "acme/web", "acme/db", "from 10.0.0.2 to 10.0.0.255"),
    Corruption(port_flags(multicast=False), "blocked", "acme/web", "acme/db", "from fd00::2 to ff"),
    Corruption(frames_are_reflected, "leak", "acme/web", "acme/web", "from 10.0.0.2 to 10.0.0.255"),
    Corruption(a_multicast_is_sent_outside, "leak", "acme/web", "outside", "from 10.0.0.2 to 224.0.0.99"),
    Corruption(cable_between_tenants, "leak", "acme/web", "acme/device:cable", "from 10.0.0.2 to 10.0.0.255"),
    Corruption(overlay_is_flooded, "leak", "acme/web", "acme/device:spy", "from 10.0.0.2 to 10.0.0.255"),
    Corruption(port_on_the_wrong_bridge, "leak", "acme/web", "acme/back", "from 10.0.0.2 to 10.1.0.255"),
    Corruption(nobody_is_guarded, "leak", "acme/web", "acme/db", "from 10.0.0.2 to 10.0.0.255", (CLOSED,)),
    Corruption(nobody_is_guarded, "leak", "acme/web", "acme/db", "from fd00::2 to ff", (CLOSED,)),
    Corruption(broadcasts_pass_policies, "leak", "acme/web", "acme/db", "to 255.255.255.255", (out(),)),
    Corruption(broadcasts_pass_policies, "leak", "acme/web", "acme/db", "to 255.255.255.255", (out(SOME),)),
    Corruption(multicasts_pass_policies, "leak", "acme/web", "acme/db", "udp/9 from fd00::2 to ff02::", (out(SOME),)),
]


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: f"{c.do.__name__}-{len(c.policies)}-{c.kind}")
def test_a_corruption_is_found(corruption: Corruption) -> None:
    @isolated
    def test() -> None:
        World()
        with two_tenants() as cloud:
            cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
            cloud.instance("acme", "back", "back")
            labels = {name: {"app": name} for name in ("web", "db")}
            cloud.others["acme"] = {"policy": PolicyIntent(policies=corruption.policies, labels=labels)}
            cloud.apply("acme")
            finds(cloud, corruption)

    test()


SENT = [
    (broadcasts_pass_policies, (out(),), "acme/db", "udp/53 from 10.0.0.2 to 255.255.255.255"),
    (nobody_is_guarded, (CLOSED,), "acme/db", "udp/53 from 10.0.0.2 to 10.0.0.255"),
    (nobody_is_guarded, (CLOSED,), "acme/db", "udp/53 from fd00::2 to ff02::2"),
    (multicasts_are_dropped, (), "acme/db", "udp/53 from 10.0.0.2 to 224.0.0.0"),
]


@pytest.mark.parametrize(("do", "policies", "target", "packet"), SENT)
def test_the_witness_is_sent_to_everybody(
    do: Callable[[Lab], None], policies: tuple[Policy, ...], target: str, packet: str
) -> None:
    @isolated
    def test() -> None:
        with two_tenants() as cloud:
            labels = {name: {"app": name} for name in ("web", "db")}
            cloud.others["acme"] = {"policy": PolicyIntent(policies=policies, labels=labels)}
            cloud.apply("acme")
            do(cloud)
            report = verify(
                cloud.fabric,
                list(cloud.tenants.values()),
                list(cloud.networks.values()),
                [each.port for each in cloud.instances.values()],
                {each.port.index: each.netns for each in cloud.instances.values()},
                intents=[cloud.intent(name) for name in cloud.tenants],
            )
            told = [
                each
                for each in report.findings
                if (each.source, each.target, each.witness) == ("acme/web", target, packet)
            ]
            assert len(told) == 1, report.findings
            [one] = told
            arrived = one.sent is not None and f"seen last at {target}, where it arrived" in one.sent
            assert arrived == (one.kind == "leak"), one

    test()
