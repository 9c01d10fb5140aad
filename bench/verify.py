"""The proof of isolation of 50 tenants with 20 ports each (5 with --quick): from nothing, after a change, and again.

The fabric is driven directly, without insulad and without packets. A tenant's ports lead into one namespace. *After a
change* one port of one tenant gets another policy, and all are proven. The last pass finds that nothing has changed.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

from msgspec.structs import replace

from bench.lib import Bench, Table
from insula.model.policies import CidrPeer, Policy, PolicyRule, PortMatch, Selector
from insula.network.fabric import NetnsNic
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.proof.prover import Proof, Prover
from tests.support.lab import Instance, Lab
from tests.support.policies import port_of

_PORTS = 20


def measure(bench: Bench) -> list[Table]:
    tenants = 5 if bench.quick else 50
    rounds = 3 if bench.quick else 5
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.fabric.teardown)
        intents = {name: _tenant(lab, stack, name) for name in (f"t{number}" for number in range(tenants))}
        running = {port.index for intent in intents.values() for port in intent.ports}

        def timed(prover: Prover) -> tuple[float, float, Proof]:
            begin, used = time.monotonic(), time.process_time()
            proof = prover.prove(list(intents.values()), running)
            return time.monotonic() - begin, time.process_time() - used, proof

        prover = Prover(lab.fabric)
        *first, proof = timed(prover)
        again = [timed(prover)[:2] for _ in range(rounds)]
        changed = []
        for number in range(rounds):
            intents["t0"] = replace(intents["t0"], policy=_policy(4000 + number))
            lab.fabric.enforce(intents["t0"].tenant, intents["t0"].policy)
            *both, one = timed(prover)
            assert one.computed == 1, one.computed
            changed.append(both)
    assert not proof.findings, proof.findings[0].text
    table = Table(f"The proof of {tenants} tenants with {_PORTS} ports each", ["pass", "seconds", "processor seconds"])
    for name, some in (("from nothing", [first]), ("after a change", changed), ("nothing has changed", again)):
        table.rows.append([name, *(f"{statistics.median(each):.3f}" for each in zip(*some, strict=True))])
    table.notes.append(f"{proof.cells:,} classes of packets are compared")
    return [table]


def _tenant(lab: Lab, stack: ExitStack, name: str) -> TenantIntent:
    """Make a tenant with its ports, which lead into one namespace."""
    tenant = lab.tenant(name)
    network = lab.network(name, "10.0.0.0/16", "fd00::/64")
    holder = Instance()
    stack.callback(holder.remove)
    ports = []
    for number in range(_PORTS):
        port = replace(
            port_of(f"i{number}", network, 100 + number),
            tenant=name,
            index=tenant.index * 1000 + number,
            interface=f"eth{number}",
        )
        lab.fabric.plug(tenant, network, port, NetnsNic(holder.netns))
        ports.append(port)
    lab.others[name] = {"ports": ports}
    lab.apply(name)
    return lab.intent(name)


def _policy(port: int) -> PolicyIntent:
    """A policy for one instance, with one port."""
    rule = PolicyRule(
        direction="out", peers=[CidrPeer(cidr="198.51.100.0/24")], ports=[PortMatch(protocol="tcp", port=port)]
    )
    policy = Policy(
        tenant="t0",
        name="web",
        select=Selector(labels={"app": "web"}),
        directions=["out"],
        rules=[rule],
        created=0.0,
    )
    return PolicyIntent(policies=[policy], labels={"i0": {"app": "web"}})
