"""Service endpoints are proven on both sides: what leaves for the peer, and which port of an instance it comes to."""

from __future__ import annotations

import msgspec

from insula.model.policies import AnyPeer, CidrPeer, Policy, PolicyRule, PortMatch, Selector
from insula.network.intent import ConsumedService, PeeringIntent, PolicyIntent, ProvidedService
from insula.network.linux.state import addresses
from insula.network.proof.prover import Prover
from tests.support.lab import Lab, isolated
from tests.support.proof_lab import Corruption, nft, prove, told
from tests.system.network_peering.test_services import overlapping
from tests.system.network_peering.world import INDEX

TABLE = "inet lab-endpoints"
ALLOWED = [PortMatch(protocol="tcp", port=port) for port in (22, 80, 443)]


def served() -> Lab:
    """globex consumes port 80 of acme's db at .50, and port 443 of acme's web at .51."""
    cloud = overlapping()
    services = [(3, "db", 80, ["10.0.0.50", "fd00::50"]), (4, "web", 443, ["10.0.0.51", "fd00::51"])]
    targets = {name: addresses(cloud.instances["acme", name].port) for name in ("web", "db")}
    for tenant, peer in (("acme", "globex"), ("globex", "acme")):
        peering = PeeringIntent(
            index=INDEX,
            name=f"{peer}/services",
            peer=cloud.tenants[peer],
            networks=["net"],
            allow=ALLOWED if tenant == "acme" else [],
            others=[cloud.networks[peer, "net"]],
            routed=False,
            consumes=[
                ConsumedService(number=number, network="net", addresses=here, protocol="tcp", port=port)
                for number, _, port, here in services
                if tenant == "globex"
            ],
            provides=[
                ProvidedService(number=number, addresses=targets[name], protocol="tcp", port=port)
                for number, name, port, _ in services
                if tenant == "acme"
            ],
        )
        cloud.others[tenant] = {"peerings": [peering]}
    for tenant in ("acme", "globex", "acme"):
        cloud.apply(tenant)
    return cloud


def a_service_leads_to_another_instance(cloud: Lab) -> None:
    nft(cloud, "acme", f'delete element {TABLE} endpoints4 {{ "peer7" . 240.0.7.3 . tcp . 80 }}')
    nft(cloud, "acme", f'add element {TABLE} endpoints4 {{ "peer7" . 240.0.7.3 . tcp . 80 : 10.0.0.2 }}')


def a_service_leads_to_another_port(cloud: Lab) -> None:
    rule = 'iifname "peer7" ip daddr 240.0.7.3 tcp dport 80 dnat ip to 10.0.0.9:22'
    nft(cloud, "acme", f"insert rule {TABLE} prerouting {rule}")


def a_port_too_many(cloud: Lab) -> None:
    nft(
        cloud,
        "acme",
        f'add element {TABLE} endpoints6 {{ "peer7" . fd69:6e73:756c:6100:8000::703 . tcp . 22 : fd00::9 }}',
    )


def a_service_is_missing(cloud: Lab) -> None:
    nft(cloud, "acme", f'delete element {TABLE} endpoints4 {{ "peer7" . 240.0.7.4 . tcp . 443 }}')


def an_endpoint_is_another_service(cloud: Lab) -> None:
    nft(cloud, "globex", f'delete element {TABLE} endpoints4 {{ "br2" . 10.0.0.50 . tcp . 80 }}')
    nft(cloud, "globex", f'add element {TABLE} endpoints4 {{ "br2" . 10.0.0.50 . tcp . 80 : 240.0.7.4 }}')


def an_endpoint_has_a_port_too_many(cloud: Lab) -> None:
    nft(cloud, "globex", f'add element {TABLE} endpoints4 {{ "br2" . 10.0.0.50 . tcp . 22 : 240.0.7.3 }}')


def an_endpoint_is_missing(cloud: Lab) -> None:
    nft(cloud, "globex", f"flush map {TABLE} endpoints6")


CORRUPTIONS = [
    Corruption(a_service_leads_to_another_instance, "leak", "globex", "acme/web", "by translation to 10.0.0.2:80"),
    Corruption(a_service_leads_to_another_instance, "blocked", "globex", "acme/db", "by translation to 10.0.0.9:80"),
    Corruption(a_service_leads_to_another_port, "leak", "globex", "acme/db", "by translation to 10.0.0.9:22"),
    Corruption(a_service_leads_to_another_port, "blocked", "globex", "acme/db", "by translation to 10.0.0.9:80"),
    Corruption(a_port_too_many, "leak", "globex", "acme/db", "by translation to [fd00::9]:22"),
    Corruption(a_service_is_missing, "blocked", "globex", "acme/web", "by translation to 10.0.0.2:443"),
    Corruption(an_endpoint_is_another_service, "leak", "globex/app", "acme", "by translation to 240.0.7.4:80"),
    Corruption(an_endpoint_is_another_service, "blocked", "globex/app", "acme", "by translation to 240.0.7.3:80"),
    Corruption(an_endpoint_has_a_port_too_many, "leak", "globex/db", "acme", "tcp/22 from 10.0.0.9 to 10.0.0.50"),
    Corruption(an_endpoint_is_missing, "blocked", "globex/app", "acme", "tcp/443 from fd00::2 to fd00::51"),
]  # fmt: skip


@isolated
def test_each_corruption_of_an_endpoint_is_found() -> None:
    cloud, prover = served(), None
    prover = Prover(cloud.fabric)
    assert [each.text for each in prove(cloud, prover)] == [], "the positive control"
    for do in dict.fromkeys(each.do for each in CORRUPTIONS):
        do(cloud)
        found = prove(cloud, prover)
        assert all(one.witness for one in found)
        for each in CORRUPTIONS:
            assert each.do is not do or each.is_among(found), (do.__name__, told(found))
        if do is a_service_leads_to_another_port:
            nft(cloud, "acme", f"delete table {TABLE}")
        for tenant in ("acme", "globex"):
            cloud.apply(tenant)
        assert [each.text for each in prove(cloud, prover)] == [], f"repaired after {do.__name__}"


@isolated
def test_policies_judge_the_addresses_between_the_peers() -> None:
    cloud = served()
    prover = Prover(cloud.fabric)

    def policy(tenant: str, app: str, *rules: PolicyRule) -> PolicyIntent:
        directions = ["out"] if tenant == "globex" else ["in"]
        made = Policy(
            tenant=tenant,
            name=app,
            select=Selector(labels={"app": app}),
            directions=directions,  # type: ignore[arg-type]
            rules=[*rules],
            created=0.0,
        )
        return PolicyIntent(policies=[made], labels={app: {"app": app}})

    to = PolicyRule(direction="out", peers=[CidrPeer(cidr="240.0.7.3/32")], ports=[PortMatch(protocol="tcp", port=80)])
    into = PolicyRule(direction="in", peers=[AnyPeer()], ports=[PortMatch(protocol="tcp", port=443)])
    for policies in ({"globex": policy("globex", "app", to)}, {"acme": policy("acme", "db", into)}):
        before = dict(cloud.others)
        for tenant, each in policies.items():
            cloud.others[tenant] = {**before[tenant], "policy": each}
            cloud.apply(tenant)
        assert [each.text for each in prove(cloud, prover)] == []
        [(tenant, _)] = policies.items()
        without = msgspec.structs.replace(cloud.intent(tenant), policy=PolicyIntent())
        running = {instance.port.index for instance in cloud.instances.values()}
        others = [cloud.intent(name) for name in cloud.tenants if name != tenant]
        found = prover.prove([without, *others], running).findings
        assert any(each.kind == "blocked" and "by translation to" in each.text for each in found), "the control"
        cloud.others = before
        cloud.apply(tenant)
