"""The proof finds packets that pass a class of traffic control which is not their tenant's."""

from __future__ import annotations

from dataclasses import replace

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.model.guarantees import Rate, Shaping
from insula.network.findings import ProofFinding
from insula.network.linux.guarantees import overlay, program, tree
from insula.network.proof import Prover
from tests.support.hosts import Cloud, Host
from tests.support.lab import Lab, World, isolated, two_tenants

MBIT = 1_000_000
SHAPING = Shaping(link=100 * MBIT, out=Rate(floor=20 * MBIT, ceiling=50 * MBIT), in_=Rate(floor=10 * MBIT))


def prove(cloud: Lab, prover: Prover) -> list[str]:
    running = {each.port.index for each in cloud.instances.values()}
    return told(prover.prove([cloud.intent(name) for name in cloud.tenants], running).findings)


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
def test_a_network_between_hosts_that_passes_the_class_of_another_tenant_is_found() -> None:
    cloud = Cloud(2)
    for name in ("acme", "globex"):
        cloud.tenant(name)
        cloud.network(name)
        for number in (1, 2):
            cloud.instance(name, f"i{number}", number)
        cloud.apply(name, shaping=SHAPING)
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
