"""Published ports, floating addresses and load balancers are proven: each corruption is found, and nothing else."""

from __future__ import annotations

import socket

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl, maps
from insula.model.objects import PublishedPort
from insula.model.policies import CidrPeer, Policy, PolicyRule, PortMatch, Selector
from insula.model.publishing import parse
from insula.network.intent import BalancerIntent, BalancerListener, FloatingIntent, OutsideIntent, PolicyIntent
from insula.network.proof.prover import Prover
from tests.support.external import forward
from tests.support.lab import Lab, World, isolated, two_tenants
from tests.support.proof_lab import Corruption, nft, on_host, prove, told

FLOATING, FLOATING6, VIP = "203.0.113.77", "2001:470::77", "10.0.0.200"
PUBLISHED = ("8080:80", f"{World.HOST}:81:82", "20000-20010:20000-20010/udp", "9000-9002:90-92")
TABLE = "inet lab-outside"


def outside(cloud: Lab) -> OutsideIntent:
    web, db = (cloud.instances["acme", name].port for name in ("web", "db"))
    both = [(address, 80) for port in (web, db) for address in (port.address, port.address6) if address]
    floating = [
        FloatingIntent(address=FLOATING, target=db.address),
        FloatingIntent(address=FLOATING6, target=db.address6),
    ]
    return OutsideIntent(
        forwards=[forward(cloud, "acme", "web", PublishedPort(**parse(text))) for text in PUBLISHED],
        floating=floating,
        balancers=[
            BalancerIntent(index=7, listeners=[BalancerListener(address=None, port=443)], backends=both),
            BalancerIntent(
                index=9,
                listeners=[BalancerListener(address=None, port=8443)],
                backends=[(web.address, 8001), (db.address, 8002)],
            ),
            BalancerIntent(
                index=8,
                listeners=[BalancerListener(address=VIP, port=5432, network="net")],
                backends=[(db.address, 5432)],
                affinity=True,
            ),
        ],
    )


def inside(cloud: Lab, command: str) -> None:
    nft(cloud, "acme", command)


# -- corruptions ---------------------------------------------------------------------------------------------------


def a_port_too_many(cloud: Lab) -> None:
    inside(cloud, f"add element {TABLE} host_ports4 {{ tcp . 99 : 10.0.0.3 . 22 }}")


def a_port_at_the_host_too_many(cloud: Lab) -> None:
    on_host(cloud, f"add element {TABLE} host_ports4 {{ tcp . 99 : 100.64.0.3 }}")


def a_port_leads_to_another_port(cloud: Lab) -> None:
    inside(cloud, f"delete element {TABLE} host_ports4 {{ tcp . 8080 }}")
    inside(cloud, f"add element {TABLE} host_ports4 {{ tcp . 8080 : 10.0.0.2 . 22 }}")


def a_port_leads_to_another_instance(cloud: Lab) -> None:
    inside(cloud, f"delete element {TABLE} host_ranges4 {{ udp . 20000-20010 }}")
    inside(cloud, f"add element {TABLE} host_ranges4 {{ udp . 20000-20010 : 10.0.0.3 }}")


def a_port_is_missing(cloud: Lab) -> None:
    inside(cloud, f"delete element {TABLE} host_ports4 {{ tcp . 8080 }}")


def a_port_at_the_host_leads_to_another_tenant(cloud: Lab) -> None:
    on_host(cloud, f"delete element {TABLE} host_ports4 {{ tcp . 8080 }}")
    on_host(cloud, f"add element {TABLE} host_ports4 {{ tcp . 8080 : 100.64.0.5 }}")


def a_backend_too_many(cloud: Lab) -> None:
    inside(cloud, f"delete element {TABLE} places4 {{ 0:7 . 5 }}")
    inside(cloud, f"add element {TABLE} places4 {{ 0:7 . 5 : 10.0.0.3 . 22 }}")


def backends_change_their_ports(cloud: Lab) -> None:
    """Each port is that of a backend, and both are those of the other one."""
    places = maps.read(cloud.fabric._tenant(cloud.tenants["acme"])._nftables, "inet", "lab-outside", "places4")
    backends = {socket.inet_aton(each) for each in ("10.0.0.2", "10.0.0.3")}
    swapped = {}
    for key, value in places.items():
        port = int.from_bytes(value[4:6], "big")
        if port in (8001, 8002):
            [other] = backends - {value[:4]}
            swapped[key] = other + value[4:]
    cloud.fabric._tenant(cloud.tenants["acme"])._nftables.transact(
        *maps.change("inet", "lab-outside", "places4", {key: places[key] for key in swapped}, swapped)
    )


def a_balancer_has_no_backends(cloud: Lab) -> None:
    inside(cloud, f"flush map {TABLE} places4")


def a_floating_address_leads_elsewhere(cloud: Lab) -> None:
    inside(cloud, f"delete element {TABLE} floating4 {{ {FLOATING} }}")
    inside(cloud, f"add element {TABLE} floating4 {{ {FLOATING} : 10.0.0.2 }}")


def an_instance_takes_a_floating_address(cloud: Lab) -> None:
    inside(cloud, f"add element {TABLE} sources4 {{ 10.0.0.2 : {FLOATING} }}")


def the_host_drops_a_floating_address(cloud: Lab) -> None:
    on_host(cloud, "flush set inet lab floating4")


def the_host_has_no_route_to_a_floating_address(cloud: Lab) -> None:
    with Rtnl() as rtnl:
        uplink = rtnl.link(cloud.fabric.naming.uplink(cloud.tenants["acme"].index))
        assert uplink
        rtnl.execute(netlink.host_routes.delete(FLOATING, uplink.index))


CORRUPTIONS = [
    Corruption(a_port_too_many, "leak", "outside", "acme/db", "by translation to 10.0.0.3:22"),
    Corruption(a_port_at_the_host_too_many, "leak", "outside", "acme", "by translation to 100.64.0.3:99"),
    Corruption(a_port_leads_to_another_port, "leak", "outside", "acme/web", "by translation to 10.0.0.2:22"),
    Corruption(a_port_leads_to_another_port, "blocked", "outside", "acme/web", "by translation to 10.0.0.2:80"),
    Corruption(a_port_leads_to_another_instance, "leak", "outside", "acme/db", "translation to 10.0.0.3:20000-20010"),
    Corruption(a_port_is_missing, "blocked", "outside", "acme/web", "by translation to 10.0.0.2:80"),
    Corruption(a_port_is_missing, "blocked", "acme/db", "acme/web", "by translation to 10.0.0.2:80"),
    Corruption(a_port_at_the_host_leads_to_another_tenant, "leak", "outside", "globex", "to 100.64.0.5:8080"),
    Corruption(a_port_at_the_host_leads_to_another_tenant, "blocked", "outside", "acme", "to 100.64.0.3:8080"),
    Corruption(a_backend_too_many, "leak", "outside", "acme/db", "by translation to 10.0.0.3:22"),
    Corruption(backends_change_their_ports, "leak", "outside", "acme/db", "by translation to 10.0.0.3:8001"),
    Corruption(backends_change_their_ports, "leak", "outside", "acme/web", "by translation to 10.0.0.2:8002"),
    Corruption(backends_change_their_ports, "blocked", "outside", "acme/db", "by translation to 10.0.0.3:8002"),
    Corruption(a_balancer_has_no_backends, "blocked", "outside", "acme/db", "by translation to 10.0.0.3:80"),
    Corruption(a_balancer_has_no_backends, "blocked", "acme/web", "acme/db", "by translation to 10.0.0.3:5432"),
    Corruption(a_floating_address_leads_elsewhere, "leak", "outside", "acme/web", "by translation to 10.0.0.2:"),
    Corruption(a_floating_address_leads_elsewhere, "blocked", "outside", "acme/db", "by translation to 10.0.0.3:"),
    Corruption(an_instance_takes_a_floating_address, "leak", "acme/web", "outside", f"from the address {FLOATING}"),
    Corruption(the_host_drops_a_floating_address, "blocked", "outside", "acme", f"to {FLOATING}"),
    Corruption(the_host_drops_a_floating_address, "blocked", "globex", "acme", f"to {FLOATING}"),
    Corruption(the_host_has_no_route_to_a_floating_address, "blocked", "outside", "acme", f"to {FLOATING}"),
]  # fmt: skip


@isolated
def test_each_corruption_is_found() -> None:
    World()
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        cloud.instance("acme", "back", "back")
        cloud.others["acme"] = {"outside": outside(cloud)}
        cloud.apply("acme")
        prover = Prover(cloud.fabric)
        assert [each.text for each in prove(cloud, prover)] == [], "the positive control"
        for do in dict.fromkeys(each.do for each in CORRUPTIONS):
            do(cloud)
            found = prove(cloud, prover)
            for each in CORRUPTIONS:
                assert each.do is not do or each.is_among(found), (do.__name__, told(found))
            if "route" not in do.__name__ and "drops" not in do.__name__:
                drift = cloud.fabric.installed(cloud.tenants["acme"]).drift
                assert any("of what is open to the outside" in each for each in drift), (do.__name__, drift)
            cloud.apply("acme")
            assert [each.text for each in prove(cloud, prover)] == [], f"repaired after {do.__name__}"


@isolated
def test_policies_judge_what_was_translated() -> None:
    World()
    with two_tenants() as cloud:
        allowed = PolicyRule(
            direction="in", peers=[CidrPeer(cidr="203.0.113.0/25")], ports=[PortMatch(protocol="tcp", port=80)]
        )
        policies = [
            Policy(
                tenant="acme",
                name=name,
                select=Selector(labels={"app": name}),
                directions=["in"],
                rules=[allowed],
                created=0.0,
            )
            for name in ("web", "db")
        ]
        labels = {name: {"app": name} for name in ("web", "db")}
        cloud.others["acme"] = {
            "outside": outside(cloud),
            "policy": PolicyIntent(policies=policies, labels=labels),
        }
        cloud.apply("acme")
        prover = Prover(cloud.fabric)
        assert [each.text for each in prove(cloud, prover)] == []
        inside(cloud, "flush set inet lab isolated_in")
        found = {(each.kind, each.source, each.target) for each in prove(cloud, prover)}
        assert ("leak", "outside", "acme/web") in found and ("leak", "outside", "acme/db") in found
