"""The proof finds open connections that are no longer allowed, and names them."""

from __future__ import annotations

import socket

from insula.model.policies import InstancePeer, Policy, PolicyRule, PortMatch, Selector
from insula.network.intent import PolicyIntent
from insula.network.proof.prover import Prover
from tests.support.lab import World, isolated, two_tenants
from tests.support.proof_lab import nft, prove


@isolated
def test_an_open_connection_that_is_no_longer_allowed_is_found() -> None:
    World()
    with two_tenants() as cloud:
        web, db = (cloud.instances["acme", name] for name in ("web", "db"))
        for port in (80, 81):
            db.serves("", port)
        allowed, forbidden = (web.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(2))
        for sock, port in ((allowed, 80), (forbidden, 81)):
            sock.bind((web.port.address, 40000 + port))
            sock.connect((db.port.address, port))
        before = cloud.fabric.connections(cloud.tenants["acme"], range(1 << 31, 1 << 32))
        assert {each.port for each in before} == {80, 81}, "the positive control"
        only = PolicyRule(direction="in", peers=[InstancePeer()], ports=[PortMatch(protocol="tcp", port=80)])
        policy = Policy(tenant="acme", name="db", select=Selector(), directions=["in"], rules=[only], created=0.0)
        cloud.others["acme"] = {"policy": PolicyIntent(policies=[policy])}
        prover = Prover(cloud.fabric)
        cloud.apply("acme")
        assert prove(cloud, prover) == [], "they are judged again at their next packet"
        nft(cloud, "acme", f"add element inet lab judged {{ {before[0].mark} }}")
        [found] = prove(cloud, prover)
        assert found[1:4] == ("leak", "acme/web", "acme/db")
        assert "tcp/81 from 10.0.0.2 to 10.0.0.3 (source port 40081)" in found.text
        cloud.apply("acme")
        assert prove(cloud, prover) == [], "repaired"
