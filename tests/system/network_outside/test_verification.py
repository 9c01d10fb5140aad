"""`insula verify` knows published ports, and finds what is open beside them."""

from __future__ import annotations

from insula.model.objects import PublishedPort
from insula.model.publishing import parse
from insula.model.views import VerifyReport
from insula.network.intent import OutsideIntent
from insula.network.proof.verify import verify
from tests.support.external import forward
from tests.support.lab import Lab, World, isolated, two_tenants

PUBLISHED = ("8080:80", "127.0.0.1:8443:80", "[::1]:8444:80", "20000-20100:20000-20100/udp", f"{World.HOST}:81:81")


def report(lab: Lab, outside: OutsideIntent) -> VerifyReport:
    instances = list(lab.instances.values())
    return verify(
        lab.fabric,
        list(lab.tenants.values()),
        list(lab.networks.values()),
        [instance.port for instance in instances],
        {instance.port.index: instance.netns for instance in instances},
        intents=[lab.intent("acme", outside=outside), lab.intent("globex")],
    )


@isolated
def test_published_ports_are_expected_and_others_are_found() -> None:
    World()
    with two_tenants() as lab:
        forwards = [forward(lab, "acme", "web", PublishedPort(**parse(text))) for text in PUBLISHED]
        outside = OutsideIntent(forwards=forwards)
        lab.apply("acme", outside=outside)
        found = report(lab, outside)
        assert found.passed, "\n".join([each.text for each in found.findings] + found.drift)
        found = report(lab, OutsideIntent(forwards=forwards[1:]))
        assert not found.passed
        assert any("outside can reach acme" in each.text and "8080" in each.text for each in found.findings)
        lab.fabric._tenant(lab.tenants["acme"]).nft.run(
            "add element inet lab-outside host_ports4 { tcp . 99 : 10.0.0.3 . 99 }"
        )
        assert any("99" in each.text and "acme/db" in each.text for each in report(lab, outside).findings)
