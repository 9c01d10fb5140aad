"""`insula verify`: prove that what the kernel lets pass is what tenants want, and test that with packets.

The proof (prover.py) is about all packets: the installed rules are interpreted, and compared with the reference model.
Each finding has a packet as its witness, which is sent. Beside it, packets are sent between all instances (probe.py),
and compared with what `reachability` computes from the tenants' networks and from the installed devices. A difference
in any of these means that isolation is broken. Inside an instance's namespace only the list of devices is read.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from insula.model.objects import Network, Port, Tenant
from insula.model.routers import Router
from insula.model.views import Reachability, VerifyFinding, VerifyReport
from insula.network.endpoints import Endpoint
from insula.network.fabric import Fabric, ProbePoints, RouterPoints, Station
from insula.network.intent import TenantIntent
from insula.network.probe import Measurement, ProbeResult
from insula.network.proof import reachability, witnesses
from insula.network.proof.findings import ProofFinding
from insula.network.proof.prover import Prover

MOST_PROBED: Final = 32
"""Ports of instances between which packets are sent."""


def verify(
    fabric: Fabric,
    tenants: Sequence[Tenant],
    networks: Sequence[Network],
    ports: Sequence[Port],
    netns: Mapping[int, int],
    routers: Sequence[Router] = (),
    intents: Sequence[TenantIntent] | None = None,
    prover: Prover | None = None,
    taps: Collection[int] = (),
) -> VerifyReport:
    """Make the report on all running instances. `netns` has a namespace descriptor for each port, by `Port.index`.

    `taps` are the indices of ports that are taps of virtual machines, whose insides can't be looked at. Other ports are
    left out. `intents` are those of the tenants, by default what the other arguments say. A
    `prover` remembers the tenants that were proven before. Blocks for about a second.
    """
    started = time.monotonic()
    by_name = {(network.tenant, network.name): network for network in networks}
    there = {*netns, *taps}
    running = [port for port in ports if port.index in there and (port.tenant, port.network) in by_name]
    installed = [fabric.installed(tenant) for tenant in tenants]
    host_drift = fabric.host_drift()
    drift = [f"host: {text}" for text in host_drift]
    for one in installed:
        drift += [
            f"{one.tenant}: {text}" for text in (*one.drift, *reachability.differences(one, networks, running, routers))
        ]
    drift += fabric.strange_devices(netns, [port for port in running if port.index in netns])
    if intents is None:
        intents = [_intent(tenant, networks, ports, routers) for tenant in tenants]
    present = {one.tenant for one in installed if one.namespace}
    proof = (prover or Prover(fabric)).prove([each for each in intents if each.tenant.name in present], there)
    may, by_policies = reachability.WantedReachability(networks, routers), reachability.PolicyReachability(intents)

    def wanted(source: Endpoint, target: Endpoint) -> bool:
        return may(source, target) and by_policies(source, target)

    with contextlib.ExitStack() as stack:
        points: list[ProbePoints] = []
        for tenant in tenants:
            if tenant.name in present:
                theirs = [network for network in networks if network.tenant == tenant.name]
                mine = [port for port in running if port.tenant == tenant.name]
                points.append(fabric.probe_points(tenant, theirs, mine))
                stack.callback(points[-1].close)
        sent = witnesses.send(proof.findings, points)
        every = [station for one in points for station in one.stations]
        stations, others = _sample(every)
        used = {station.endpoints[0].tenant for station in stations}
        points_of = [one.router for one in points if one.router.tenant in used]
        pairs = _pairs(stations, points_of)
        taken = stack.enter_context(Measurement(stations, points_of, wanted, others))
        results = [
            result if by_policies(*pair) else _beside_policies(*pair, may(*pair), result)
            for pair, result in zip(pairs, taken.measure(pairs, beyond=not host_drift), strict=True)
        ]
    permitted = reachability.InstalledReachability(installed, running)
    matrix = [
        _cell(*pair, wanted(*pair), permitted(*pair) and by_policies(*pair), result)
        for pair, result in zip(pairs, results, strict=True)
    ]
    agreed = all(cell.ok and cell.probed is not None and cell.control for cell in matrix)
    return VerifyReport(
        passed=not drift and not proof.findings and agreed,
        matrix=matrix,
        drift=drift,
        seconds=time.monotonic() - started,
        findings=[finding_view(each, sent.get(number)) for number, each in enumerate(proof.findings)],
        classes=proof.cells,
        ports=len(every),
        probed_ports=len(stations),
    )


def _beside_policies(source: Endpoint, target: Endpoint, has_path: bool, result: ProbeResult) -> ProbeResult:
    """Return what a result says about a pair that policies forbid.

    They are not about broadcasts in a network. Connections are refused by resets, which have the address of the target.
    """
    meaningless = [["answer"]] if target.kind == "host" else [["broadcast"]] if has_path else []
    if result.reached and result.protocols in meaningless:
        return ProbeResult(False, result.control, result.detail)
    return result


def finding_view(finding: ProofFinding, sent: str | None = None) -> VerifyFinding:
    """Return a finding for people. `sent` tells where its witness was seen."""
    return VerifyFinding(
        kind=finding.kind,
        tenant=finding.tenant,
        source=finding.source,
        target=finding.target,
        text=finding.text,
        classes=finding.classes,
        witness=finding.witness.text if finding.witness else None,
        sent=sent,
    )


def _intent(
    tenant: Tenant, networks: Sequence[Network], ports: Sequence[Port], routers: Sequence[Router]
) -> TenantIntent:
    return TenantIntent(
        tenant=tenant,
        networks=[each for each in networks if each.tenant == tenant.name],
        ports=[each for each in ports if each.tenant == tenant.name],
        routers=[each for each in routers if each.tenant == tenant.name],
    )


def _sample(stations: Sequence[Station]) -> tuple[list[Station], list[Station]]:
    """Divide probe points into those that packets are sent between, at random if there are many, and all others.

    The proof is about all; packets test the proof, and another sample the next time.
    """
    mixed = random.sample(stations, len(stations))
    chosen = {station.key for station in mixed[:MOST_PROBED]}
    return [s for s in stations if s.key in chosen], [s for s in stations if s.key not in chosen]


def _pairs(stations: Sequence[Station], routers: Sequence[RouterPoints]) -> list[tuple[Endpoint, Endpoint]]:
    endpoints = [endpoint for station in stations for endpoint in station.endpoints]
    for router in routers:
        endpoints += [*router.gateways, *router.hosts, *router.outsides]
    routed = {router.tenant for router in routers}
    return [(source, target) for source, target in reachability.pairs(endpoints) if source.tenant in routed]


def _cell(source: Endpoint, target: Endpoint, expected: bool, installed: bool, result: ProbeResult) -> Reachability:
    detail = result.detail
    if result.reached and not expected:
        detail = f"arrived by {', '.join(result.protocols)}"
    return Reachability(
        source=source.label,
        target=target.label,
        address=target.address,
        expected=expected,
        installed=installed,
        probed=result.reached,
        control=result.control,
        detail=detail,
    )
