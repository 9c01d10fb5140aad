"""The proof knows instances on other hosts: each wrong entry of VXLAN is found, with the packet that shows it."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

from insula.kernel import netlink
from insula.kernel.netlink import Request, Rtnl
from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink import messages as rt
from insula.kernel.netns import call_in
from insula.model.routers import Router
from insula.network.intent import PolicyIntent
from insula.network.linux import naming
from insula.network.proof.findings import ProofFinding
from insula.network.proof.prover import Prover
from insula.network.proof.verify import verify
from tests.support.hosts import Cloud, Host
from tests.support.lab import isolated
from tests.system.network_overlay.test_overlay import two_tenants_on_three_hosts
from tests.system.network_overlay.test_policies import POLICY

NOBODY = "00:00:00:00:00:00"


def prove(cloud: Cloud, host: Host, prover: Prover | None = None, **of_acme: object) -> list[ProofFinding]:
    running = {each.port.index for key, each in cloud.instances.items() if cloud.places[key] is host}
    intents = [cloud.intent("acme", host, **of_acme), cloud.intent("globex", host)]
    return host.do(lambda: (prover or Prover(host.fabric)).prove(intents, running)).findings


def acme_on(host: Host) -> Rtnl:
    return call_in(host.inside("acme"), Rtnl)


def mac(cloud: Cloud, name: str) -> str:
    return cloud.instances["acme", name].port.mac


def entry(cloud: Cloud, name: str, host: str, vni: int | None = None) -> Request:
    """An entry of the VXLAN device of acme's network."""
    address = NOBODY if name == "nobody" else mac(cloud, name)
    body = rt.NEIGH.pack(7, naming.vxlan_index(1), rt.NUD_PERMANENT, rt.NTF_SELF, 0)
    parts = [(rt.NDA_LLADDR, rtattr.mac(address)), (rt.NDA_DST, ip_address(host).packed)]
    body += rtattr.attributes(*parts, *([(7, rtattr.u32(vni))] if vni else []))
    return Request("entry of a test", rt.RTM_NEWNEIGH, 0xC00, body)  # NLM_F_CREATE, NLM_F_APPEND


def wrong_host(cloud: Cloud, acme: Rtnl) -> None:
    acme.execute(netlink.delete_forwarding(naming.vxlan_index(1), mac(cloud, "db"), remote=True))
    acme.execute(entry(cloud, "db", cloud.hosts[2].address))


def network_of_another_tenant(cloud: Cloud, acme: Rtnl) -> None:
    acme.execute(netlink.delete_forwarding(naming.vxlan_index(1), mac(cloud, "db"), remote=True))
    acme.execute(entry(cloud, "db", cloud.hosts[1].address, cloud.networks["globex", "net"].vni))


def flood(cloud: Cloud, acme: Rtnl) -> None:
    acme.execute(entry(cloud, "nobody", cloud.hosts[2].address))


def wrong_neighbour(cloud: Cloud, acme: Rtnl) -> None:
    acme.execute(netlink.add_neighbour(naming.bridge_index(1), "10.0.0.3", mac(cloud, "log")))


def no_neighbour(cloud: Cloud, acme: Rtnl) -> None:
    acme.execute(netlink.delete_neighbour(naming.bridge_index(1), "10.0.0.3"))


def neighbour_too_many(cloud: Cloud, acme: Rtnl) -> None:
    acme.execute(netlink.add_neighbour(naming.bridge_index(1), "10.0.0.77", mac(cloud, "log")))


def no_entry_of_the_bridge(cloud: Cloud, acme: Rtnl) -> None:
    acme.execute(netlink.delete_forwarding(naming.vxlan_index(1), mac(cloud, "db")))


CORRUPTIONS: list[tuple[Callable[[Cloud, Rtnl], None], str, str, str]] = [
    (wrong_host, "leak", "host 198.51.100.3", "for db go to host 198.51.100.3 with VNI 4097"),
    (wrong_host, "blocked", "host 198.51.100.2", "from 10.0.0.2 to 10.0.0.3"),
    (network_of_another_tenant, "leak", "host 198.51.100.2", "VNI 4098, of another network"),
    (flood, "overheard", "host 198.51.100.3", "addresses without an entry go to host 198.51.100.3"),
    (wrong_neighbour, "leak", "acme/log", "10.0.0.3 of db go to the MAC address of log: udp/9 from 10.0.0.2"),
    (no_neighbour, "blocked", "acme/db", "nobody answers in network net for 10.0.0.3 of db"),
    (neighbour_too_many, "leak", "acme/net on other hosts", "to 10.0.0.77"),
    (no_entry_of_the_bridge, "blocked", "acme/net on other hosts", "to 10.0.0.3"),
]


@isolated
def test_wrong_entries_of_the_overlay_are_found() -> None:
    cloud = two_tenants_on_three_hosts()
    host = cloud.hosts[0]
    assert prove(cloud, host) == [], "the positive control"
    prover = Prover(host.fabric)
    for do in dict.fromkeys(each[0] for each in CORRUPTIONS):
        with acme_on(host) as acme:
            do(cloud, acme)
        found = prove(cloud, host, prover)
        for kind, target, says in [each[1:] for each in CORRUPTIONS if each[0] is do]:
            assert any(
                (each.kind, each.source, each.target) == (kind, "acme/web", target) and says in each.text
                for each in found
            ), (do.__name__, [each.text for each in found])
        with acme_on(host) as acme:  # what is too much in a network that is unchanged is removed by hand
            acme.execute(netlink.delete_forwarding(naming.vxlan_index(1), NOBODY, remote=True))
            acme.execute(netlink.delete_neighbour(naming.bridge_index(1), "10.0.0.77"))
            acme.execute(netlink.delete_forwarding(naming.vxlan_index(1), mac(cloud, "db"), remote=True))
        cloud.apply("acme")
        assert prove(cloud, host, prover) == [], f"repaired after {do.__name__}"


@isolated
def test_routed_networks_and_policies_on_several_hosts_are_proven() -> None:
    cloud = two_tenants_on_three_hosts()
    cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
    for number in (1, 2):
        cloud.instance("acme", f"back{number}", number, "back")
    cloud.routers.append(Router(tenant="acme", name="core", networks=["net", "back"], created=0.0))
    labels = {name: {"app": name} for name in ("web", "web2", "db", "log", "back1", "back2")}
    policy = PolicyIntent(policies=[POLICY], labels=labels)
    cloud.apply("acme", policy=policy)
    for host in cloud.hosts:
        assert prove(cloud, host, policy=policy) == []
        assert prove(cloud, host) != [], "the policy is missing in the intent: this is another one"


@isolated
def test_the_witness_of_a_wrong_entry_is_sent() -> None:
    cloud = two_tenants_on_three_hosts()
    host = cloud.hosts[0]
    with acme_on(host) as acme:
        wrong_neighbour(cloud, acme)
    mine = {k: each for k, each in cloud.instances.items() if cloud.places[k] is host}
    intents = [cloud.intent(name, host) for name in cloud.tenants]
    report = host.do(
        lambda: verify(
            host.fabric,
            list(cloud.tenants.values()),
            list(cloud.networks.values()),
            [each.port for each in mine.values()],
            {each.port.index: each.netns for each in mine.values()},
            intents=intents,
        )
    )
    assert not report.passed
    shown = next(each for each in report.findings if "go to the MAC address of log" in each.text)
    assert shown.witness == "udp/9 from 10.0.0.2 to 10.0.0.3" and shown.sent


ACCEPTED = [
    ('bridge lab ipv4 {{ "vx1" . {db} . 10.0.0.77 }}', "packets with address 10.0.0.77, which"),
    ('bridge lab ipv4 {{ "vx1" . {db} . 10.0.0.2 }}', "ARP messages with address 10.0.0.2, which"),
    ('bridge lab ipv6 {{ "vx1" . {db} . fd00::77 }}', "packets with address fd00::77, which"),
    (
        'bridge lab ndp {{ "vx1" . {db} . 0xfd000000000000000000000000000002 }}',
        "neighbor advertisements with address fd00::2",
    ),
    ('bridge lab macs {{ "vx1" . 02:00:00:00:00:99 }}', "ARP messages with address 0.0.0.0 and another MAC address"),
]
"""Elements too many, and what frames from other hosts may have by them."""


@isolated
def test_what_is_accepted_from_other_hosts_is_proven() -> None:
    cloud = two_tenants_on_three_hosts()
    host = cloud.hosts[0]
    prover = Prover(host.fabric)
    assert prove(cloud, host, prover) == [], "the positive control"
    for element, says in ACCEPTED:
        nft = host.fabric._tenant(cloud.tenants["acme"]).nft
        command = element.format(db=mac(cloud, "db")).replace(" lab ", f" {host.fabric.naming.prefix} ")
        nft.run(f"add element {command}")
        found = prove(cloud, host, prover)
        assert any(
            (each.kind, each.source) == ("forged", "acme/net on other hosts") and says in each.text and each.witness
            for each in found
        ), (element, [each.text for each in found])
        nft.run(f"delete element {command}")
        assert prove(cloud, host, prover) == []
