"""Policies across hosts: a label means the same instances wherever they are."""

from __future__ import annotations

import pytest

from insula.model.policies import InstancePeer, Policy, PolicyRule, PortMatch, Selector
from insula.network.intent import PolicyIntent
from tests.support.hosts import Cloud
from tests.support.lab import SOON, isolated

SHORT = 0.3
LABELS = {"web": {"app": "web"}, "web2": {"app": "web"}, "db": {"app": "db"}, "spy": {"app": "spy"}}
POLICY = Policy(
    tenant="acme",
    name="db",
    select=Selector(labels={"app": "db"}),
    directions=["in"],
    rules=[
        PolicyRule(
            direction="in",
            peers=[InstancePeer(select=Selector(labels={"app": "web"}))],
            ports=[PortMatch(protocol="tcp", port=80)],
        )
    ],
    created=0.0,
)


@pytest.mark.parametrize("places", [(1, 1, 1, 1), (1, 2, 2, 1), (1, 2, 3, 3)], ids=["one host", "two", "three"])
@isolated
def test_a_label_selects_instances_on_all_hosts(places: tuple[int, ...]) -> None:
    cloud = Cloud(3)
    cloud.tenant("acme")
    cloud.network("acme")
    for name, host in zip(("web", "web2", "db", "spy"), places, strict=True):
        cloud.instance("acme", name, host)
    db = cloud.instances["acme", "db"]
    for port in (80, 81):
        db.serves(f"db {port}", port)
    for policies, spies in (([], True), ([POLICY], False), ([], True)):
        cloud.apply("acme", policy=PolicyIntent(policies=policies, labels=LABELS))
        for address in (db.port.address, str(db.port.address6)):
            for name in ("web", "web2", "spy"):
                for port in (80, 81):
                    may = spies or (name != "spy" and port == 80)
                    said = cloud.instances["acme", name].connects(address, port, SOON if may else SHORT)
                    assert said == (f"db {port}" if may else ""), (name, address, port, bool(policies))
