"""The proof finds packets that pass a class of traffic control which is not their tenant's."""

from __future__ import annotations

from dataclasses import replace

from msgspec import structs

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.model.guarantees import PortRates, Rate, Shaping
from insula.network.linux.guarantees import overlay, program, tree
from insula.network.proof.findings import ProofFinding
from insula.network.proof.prover import Prover
from tests.support import proof_lab
from tests.support.hosts import Cloud, Host
from tests.support.lab import Lab, World, isolated, two_tenants

MBIT = 1_000_000
SHAPING = Shaping(link=100 * MBIT, out=Rate(floor=20 * MBIT, ceiling=50 * MBIT), in_=Rate(floor=10 * MBIT))


def prove(cloud: Lab, prover: Prover) -> list[str]:
    return told(proof_lab.prove(cloud, prover))


def told(found: list[ProofFinding]) -> list[str]:
    assert {each.kind for each in found} <= {"misqueued"}, found
    return [each.text for each in found]


@isolated
def test_filters_and_classes_of_another_tenant_are_found() -> None:
    World()
    with two_tenants() as cloud, Rtnl() as host:
        for name in ("acme", "globex"):
            cloud.others[name] = {"shaping": SHAPING}
            cloud.apply(name)
        prover, naming = Prover(cloud.fabric), cloud.fabric.naming
        acme, globex = (cloud.tenants[name].index for name in ("acme", "globex"))
        uplink, out = host.index(naming.uplink(acme)), host.index(cloud.fabric.shaper.device("out"))
        assert uplink is not None and out is not None
        assert prove(cloud, prover) == [], "the positive control"

        code = program.classifier(tree.rest(globex), {}, source=True)
        known = tc.filters(host, uplink, tc.INGRESS)[0].name  # the name of the right one
        with program.LoadedProgram(code) as descriptor:
            host.execute(tc.set_bpf_filter(uplink, tc.INGRESS, descriptor, known, out))
        assert any("as those of globex do" in text for text in prove(cloud, prover))
        host.execute(tc.delete_filters(uplink, tc.INGRESS))
        assert any("to the outside pass no class" in text for text in prove(cloud, prover))
        cloud.apply("acme")
        assert prove(cloud, prover) == [], "repaired"

        slow = replace(tc.classes(host, out)[tree.tenant(acme)], ceiling=MBIT, rate=MBIT)
        host.execute(tc.set_class(out, slow))
        found = prove(cloud, prover)
        assert any("floor is 1000000 bit/s and should be 20000000" in text for text in found), found
        assert any("ceiling is 1000000 bit/s and should be 50000000" in text for text in found), found
        cloud.apply("acme")
        del cloud.others["globex"]
        assert any("globex" in text and "have no guarantee" in text for text in prove(cloud, prover))


@isolated
def test_classes_of_instances_are_proven() -> None:
    World()
    with two_tenants() as cloud, Rtnl() as host:
        web, db = (cloud.instances["acme", name].port.index for name in ("web", "db"))
        ports = {
            web: PortRates(number=1, out=Rate(floor=5 * MBIT), in_=Rate(floor=4 * MBIT)),
            db: PortRates(number=2, out=Rate(floor=3 * MBIT)),
        }
        cloud.others["acme"] = {"shaping": structs.replace(SHAPING, ports=ports)}
        cloud.others["globex"] = {"shaping": SHAPING}
        for name in ("acme", "globex"):
            cloud.apply(name)
        prover, naming, shaper = Prover(cloud.fabric), cloud.fabric.naming, cloud.fabric.shaper
        acme, globex = (cloud.tenants[name].index for name in ("acme", "globex"))
        uplink, out, into = host.index(naming.uplink(acme)), *(host.index(shaper.device(d)) for d in ("out", "in"))
        assert uplink is not None and out is not None and into is not None
        assert prove(cloud, prover) == [], "the positive control"

        def lead(to: dict[str, int]) -> None:
            with program.LoadedProgram(program.classifier(tree.rest(acme), to, source=True)) as descriptor:
                known = tc.filters(host, uplink, tc.INGRESS)[0].name
                host.execute(tc.set_bpf_filter(uplink, tc.INGRESS, descriptor, known, out))

        first, second = ({a: tree.instance(n) for a in naming.guaranteed_addresses(n)} for n in (1, 2))
        lead(second)
        assert any("of web pass" in each and "as those of another instance do" in each for each in prove(cloud, prover))
        lead(first | dict.fromkeys(second, tree.instance(1)))
        assert any("of db pass" in each and "as those of another instance do" in each for each in prove(cloud, prover))
        lead(first | dict.fromkeys(second, tree.rest(globex)))
        assert any("of db pass" in each and f", not class 1:{0x10 + acme:x}" in each for each in prove(cloud, prover))
        lead(first | {next(iter(second)): tree.instance(2)})  # IPv4 alone
        assert any("of db pass" in each for each in prove(cloud, prover))
        lead(first | second)
        assert prove(cloud, prover) == []
        slow = replace(tc.classes(host, into)[tree.instance(1)], rate=MBIT)
        host.execute(tc.set_class(into, slow))
        [found] = prove(cloud, prover)
        assert "from the outside of web pass" in found and "floor is 1000000 bit/s and should be 4000000" in found
        cloud.apply("acme")
        assert prove(cloud, prover) == [], "repaired"


def on_two_hosts() -> Cloud:
    """Two tenants with guarantees, each with an instance on each of two hosts."""
    cloud = Cloud(2)
    for name in ("acme", "globex"):
        cloud.tenant(name)
        cloud.network(name)
        for number in (1, 2):
            cloud.instance(name, f"i{number}", number)
        cloud.apply(name, shaping=SHAPING)
    return cloud


@isolated
def test_a_destination_below_the_class_of_another_tenant_is_found() -> None:
    """Ceilings of single hosts come and go; wherever they are, they are below the class of their tenant."""
    cloud = on_two_hosts()
    host, prover = cloud.hosts[0], Prover(cloud.hosts[0].fabric)
    receiver = cloud.hosts[1].address
    acme, globex = (cloud.tenants[name].index for name in ("acme", "globex"))
    with host.do(Rtnl) as rtnl:
        host.do(lambda: host.fabric.shaper.limit_senders(rtnl, receiver, {acme: 5 * MBIT}))
        assert network_findings(cloud, host, prover) == [], "the positive control"
        out = rtnl.index(host.fabric.shaper.device("out"))
        assert out is not None
        limited = next(number for number in tc.classes(rtnl, out) if tree.is_destination(number))
        vnis = [cloud.networks[name, "net"].vni for name in ("acme", "globex")]
        overlay.classify(rtnl, out, limited, vnis, version=4, port=4789, destination=receiver)
        [found] = network_findings(cloud, host, prover)
        assert found.startswith("globex: packets to the outside of network net between hosts pass class")
        assert f"not class 1:{0x10 + globex:x}" in found
        host.do(lambda: host.fabric.shaper.limit_senders(rtnl, receiver, {}))
    assert network_findings(cloud, host, prover) == []


@isolated
def test_a_network_between_hosts_that_passes_the_class_of_another_tenant_is_found() -> None:
    cloud = on_two_hosts()
    host, prover = cloud.hosts[0], Prover(cloud.hosts[0].fabric)
    assert network_findings(cloud, host, prover) == [], "the positive control"
    with host.do(Rtnl) as rtnl:
        out = rtnl.index(host.fabric.shaper.device("out"))
        assert out is not None
        acme, globex = (tree.rest(cloud.tenants[name].index) for name in ("acme", "globex"))
        both = [cloud.networks[name, "net"].vni for name in ("globex", "acme")]
        none: list[int] = []
        for to, vnis in ((acme, none), (globex, both)):
            overlay.classify(rtnl, out, to, vnis, version=4, port=4789)
    [found] = network_findings(cloud, host, prover)
    assert found.startswith("acme: packets to the outside of network net between hosts pass class")
    cloud.apply("acme", shaping=SHAPING)
    cloud.apply("globex", shaping=SHAPING)
    assert network_findings(cloud, host, prover) == [], "repaired"


def network_findings(cloud: Cloud, host: Host, prover: Prover) -> list[str]:
    running = {each.port.index for key, each in cloud.instances.items() if cloud.places[key] is host}
    intents = [cloud.intent(name, host, shaping=SHAPING) for name in cloud.tenants]
    return told(host.do(lambda: prover.prove(intents, running)).findings)
