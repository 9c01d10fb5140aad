"""`insula verify`: compare wanted, installed and measured reachability.

Whether A may reach B is determined in three independent ways: `reachability` computes it from the tenants' networks,
the fabric reads the installed state from the kernel, and `probe` sends packets. A difference means that isolation is
broken. Inside an instance's namespace only the list of devices is read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence

from insula.model.objects import Network, Port, Tenant
from insula.model.routers import Router
from insula.model.views import Reachability, VerifyReport
from insula.network import reachability
from insula.network.endpoints import Endpoint
from insula.network.fabric import Fabric, RouterPoints, Station
from insula.network.probe import Measurement, ProbeResult


def verify(
    fabric: Fabric,
    tenants: Sequence[Tenant],
    networks: Sequence[Network],
    ports: Sequence[Port],
    netns: Mapping[int, int],
    routers: Sequence[Router] = (),
) -> VerifyReport:
    """Make the report on all running instances. `netns` has a namespace descriptor for each port, by `Port.index`.

    Ports without one are left out. Blocks for about a second.
    """
    started = time.monotonic()
    by_name = {(network.tenant, network.name): network for network in networks}
    running = [port for port in ports if port.index in netns and (port.tenant, port.network) in by_name]
    installed = [fabric.installed(tenant) for tenant in tenants]
    host_drift = fabric.host_drift()
    drift = [f"host: {text}" for text in host_drift]
    for one in installed:
        drift += [
            f"{one.tenant}: {text}" for text in (*one.drift, *reachability.differences(one, networks, running, routers))
        ]
    drift += fabric.strange_devices(netns, running)
    wanted = reachability.WantedReachability(networks, routers)
    with contextlib.ExitStack() as stack:
        stations: list[Station] = []
        points_of: list[RouterPoints] = []
        for tenant, one in zip(tenants, installed, strict=True):
            if one.namespace:
                theirs = [network for network in networks if network.tenant == tenant.name]
                points = fabric.probe_points(tenant, theirs, [port for port in running if port.tenant == tenant.name])
                stack.callback(points.close)
                stations += points.stations
                points_of.append(points.router)
        pairs = _pairs(stations, points_of)
        taken = stack.enter_context(Measurement(stations, points_of, wanted))
        results = taken.measure(pairs, beyond=not host_drift)
    permitted = reachability.InstalledReachability(installed, running)
    matrix = [
        _cell(*pair, wanted(*pair), permitted(*pair), result) for pair, result in zip(pairs, results, strict=True)
    ]
    passed = not drift and all(cell.ok and cell.probed is not None and cell.control for cell in matrix)
    return VerifyReport(passed=passed, matrix=matrix, drift=drift, seconds=time.monotonic() - started)


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
