"""/metrics of the host, and of one tenant: the text format of Prometheus (version 0.0.4).

Nothing is registered: all metrics are made at the scrape from numbers that exist anyway, so those of a removed tenant
are gone with it. Labels are names of routes, states and controllers, which are few, and of tenants: at most a thousand
of them, the oldest; all others together are the tenant `_other`. Of one's own metrics, the same holds for instances.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from litestar import Request, Response, get

from insula import __version__
from insula.api.parameters import Plane, TenantName
from insula.api.request_times import RequestTimes
from insula.control.accounting.usage import TenantFigures
from insula.control.plane import ControlPlane
from insula.control.telemetry import ControllerWork, Histogram
from insula.model.accounting import UsedTotals
from insula.model.errors import InsulaError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

TEXT: Final = "text/plain; version=0.0.4"  # the framework adds the charset
MOST: Final = 1000
"""The number of tenants, or instances of one tenant, that have metrics of their own."""
OTHERS: Final = "_other"
"""The label of all others; no tenant and no instance can have this name."""


class Series(NamedTuple):
    """A metric of tenants or of instances. `value` returns None where there is none. A `counter` only grows."""

    name: str
    help: str
    value: Callable[[Any], float | None]
    counter: bool = True


TENANT: Final = (
    Series("cpu_seconds", "Processor time of the tenant's instances", lambda f: f.totals.used.cpu / 1e9),
    Series("group_cpu_seconds", "Processor time of the tenant's control group", lambda f: f.totals.group / 1e9),
    Series("network_receive_bytes", "Bytes of IP packets to the instances", lambda f: f.totals.used.received),
    Series("network_receive_packets", "IP packets to the instances", lambda f: f.totals.used.received_packets),
    Series("network_transmit_bytes", "Bytes of IP packets from the instances", lambda f: f.totals.used.sent),
    Series("network_transmit_packets", "IP packets from the instances", lambda f: f.totals.used.sent_packets),
    Series("image_receive_bytes", "Bytes of IP packets to pulls and pushes", lambda f: f.totals.images.received),
    Series("image_receive_packets", "IP packets to pulls and pushes", lambda f: f.totals.images.received_packets),
    Series("image_transmit_bytes", "Bytes of IP packets from pulls and pushes", lambda f: f.totals.images.sent),
    Series("image_transmit_packets", "IP packets from pulls and pushes", lambda f: f.totals.images.sent_packets),
    Series("memory_byte_seconds", "Memory times time, sampled", lambda f: f.totals.used.memory),
    Series("reserved_cpu_seconds", "Reserved CPUs times time", lambda f: f.totals.reserved.cpus),
    Series("reserved_memory_byte_seconds", "Reserved memory times time", lambda f: f.totals.reserved.memory),
    Series("reserved_instance_seconds", "How long instances existed", lambda f: f.totals.reserved.instances),
    Series("memory_bytes", "Memory that the instances use", lambda f: f.memory, False),
    Series("reserved_cpus", "CPUs that the instances reserve", lambda f: f.reserved.cpus, False),
    Series("reserved_memory_bytes", "Memory that the instances reserve", lambda f: f.reserved.memory, False),
    Series("limit_cpus", "The tenant's limit of CPUs", lambda f: f.tenant.limits.cpus, False),
    Series("limit_memory_bytes", "The tenant's limit of memory", lambda f: f.tenant.limits.memory, False),
    Series("instances", "Instances of the tenant, running or not", lambda f: f.reserved.instances, False),
    Series("running_instances", "Instances that run", lambda f: f.running, False),
)
"""What `tenant_families` makes of each `TenantFigures`, with the prefix ``insula_tenant_``."""
INSTANCE: Final = (
    Series("cpu_seconds", "Processor time of the instance", lambda used: used.cpu / 1e9),
    Series("network_receive_bytes", "Bytes of IP packets to the instance", lambda used: used.received),
    Series("network_transmit_bytes", "Bytes of IP packets from the instance", lambda used: used.sent),
    Series("memory_byte_seconds", "Memory times time, sampled", lambda used: used.memory),
)
"""The same for each `UsedTotals`, with the prefix ``insula_instance_``."""


@get(
    "/metrics",
    tags=["host"],
    summary="Metrics of the host and of all tenants, as Prometheus reads them",
    permission="metrics.read",
    sends="text/plain",
)
async def host_metrics(plane: Plane, request: Request[Any, Any, Any]) -> Response[bytes]:
    times: RequestTimes = request.app.state.times
    figures = await plane.accounting.figures()
    drift = await asyncio.to_thread(_drift, plane)
    return await _answer(lambda: [*_host_families(plane, times, len(figures), drift), *tenant_families(figures)])


@get(
    "/tenants/{tenant:str}/metrics",
    tags=["tenants"],
    summary="Metrics of a tenant and of its instances, as Prometheus reads them",
    permission="usage.read",
    sends="text/plain",
)
async def tenant_metrics(plane: Plane, tenant: TenantName) -> Response[bytes]:
    figures = await plane.accounting.figures(tenant)
    return await _answer(lambda: [*tenant_families(figures), *instance_families(tenant, figures[0].used)])


async def _answer(families: Callable[[], Sequence[Metric]]) -> Response[bytes]:
    """Write metrics in a thread: there may be thousands, and the library takes long to import."""

    def text() -> bytes:
        from prometheus_client.exposition import generate_latest

        made: bytes = generate_latest(_Scrape(families()))
        return made

    return Response(await asyncio.to_thread(text), media_type=TEXT)


class _Scrape:
    """The metrics of one scrape, in the place of a registry."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _drift(plane: ControlPlane) -> int | None:
    """How many differences the host's own network settings have from the wanted ones. Blocks."""
    try:
        return len(plane.context.fabric.host_drift())
    except InsulaError:  # everything is being taken down
        return None


# -- the host --------------------------------------------------------------------------------------------------------


def _host_families(plane: ControlPlane, times: RequestTimes, tenants: int, drift: int | None) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    context, telemetry = plane.context, plane.context.telemetry
    info = GaugeMetricFamily("insula_build_info", "The version of insulad", labels=["version"])
    info.add_metric([__version__], 1)
    yield info
    yield GaugeMetricFamily("insula_start_time_seconds", "When insulad has started", plane.host.started)
    yield GaugeMetricFamily("insula_tenants", "Tenants", tenants)
    states = GaugeMetricFamily("insula_instances", "Instances of this host by state", labels=["state"])
    for state, count in sorted(Counter(each.status.state for each in plane.managed.all()).items()):
        states.add_metric([state], count)
    yield states
    yield GaugeMetricFamily("insula_problems", "What `insula status` reports as a problem", len(context.problems))
    if drift is not None:
        yield GaugeMetricFamily("insula_drift", "Differences of the host's network from what is installed", drift)
    if plane.isolation.findings is not None:
        found = sum(map(len, plane.isolation.findings.values()))
        yield GaugeMetricFamily("insula_isolation_findings", "What the last proof of isolation found", found)
        last = plane.isolation.last
        yield GaugeMetricFamily("insula_isolation_proven_time_seconds", "When the last proof of isolation ended", last)
        yield _proofs(plane.isolation.proofs)
    queues = {
        "instances": sum(each.busy for each in plane.managed.all()),
        "networks": plane.network_controller.queue,
    }
    yield from _controllers({"instances": telemetry.instances, "networks": telemetry.networks}, queues)
    yield _histogram("insula_launch_duration_seconds", "Starts of instances", {(): telemetry.launches})
    failures = CounterMetricFamily("insula_launch_failures", "Starts of instances that have failed")
    failures.add_metric([], telemetry.failed_launches)
    yield failures
    duration = "Seconds until the response to a request has begun"
    yield _histogram("insula_http_request_duration_seconds", duration, times.by_labels(), ["route", "status"])
    yield GaugeMetricFamily("insula_scrape_time_seconds", "The time of this host's clock", time.time())


def _proofs(proofs: Mapping[str | None, int]) -> Metric:
    """Proofs of isolation by tenant; those of the host have no tenant."""
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(
        "insula_isolation_proofs", "Proofs of isolation of the host, or of a tenant", labels=["tenant"]
    )
    own = [(tenant or "", count) for tenant, count in proofs.items()]
    for tenant, count in own[:MOST]:
        family.add_metric([tenant], count)
    if rest := own[MOST:]:
        family.add_metric([OTHERS], sum(count for _, count in rest))
    return family


def _controllers(work: Mapping[str, ControllerWork], queues: Mapping[str, int]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    passes = CounterMetricFamily("insula_controller_reconciles", "Passes over one object", labels=["controller"])
    failures = CounterMetricFamily("insula_controller_failures", "Passes that have failed", labels=["controller"])
    seconds = CounterMetricFamily("insula_controller_seconds", "Seconds that passes took", labels=["controller"])
    for controller, each in work.items():
        passes.add_metric([controller], each.passes)
        failures.add_metric([controller], each.failures)
        seconds.add_metric([controller], each.seconds)
    yield from (passes, failures, seconds)
    queue = GaugeMetricFamily("insula_controller_queue", "Objects that are being reconciled", labels=["controller"])
    for controller, length in queues.items():
        queue.add_metric([controller], length)
    yield queue


def _histogram(
    name: str, help_: str, histograms: Mapping[tuple[str, ...], Histogram], labels: Sequence[str] = ()
) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, help_, labels=labels)
    for values, histogram in sorted(histograms.items()):
        family.add_metric(values, list(histogram.buckets()), histogram.sum)
    return family


# -- tenants ---------------------------------------------------------------------------------------------------------


def tenant_families(figures: Sequence[TenantFigures]) -> Iterator[Metric]:
    own = [((each.tenant.name,), each) for each in figures]
    yield from _families("insula_tenant", TENANT, ["tenant"], own[:MOST], (OTHERS,), [each for _, each in own[MOST:]])


def instance_families(tenant: str, used: Mapping[str, UsedTotals]) -> Iterator[Metric]:
    own = [((tenant, name), each) for name, each in used.items()]
    others = [each for _, each in own[MOST:]]
    yield from _families("insula_instance", INSTANCE, ["tenant", "instance"], own[:MOST], (tenant, OTHERS), others)


def _families(
    prefix: str,
    table: Sequence[Series],
    labels: Sequence[str],
    own: Sequence[tuple[Sequence[str], Any]],
    others_label: Sequence[str],
    others: Sequence[Any],
) -> Iterator[Metric]:
    """Make one family for each series of a table, with a line for each object and one for the sum of the others."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for series in table:
        kind = CounterMetricFamily if series.counter else GaugeMetricFamily
        family = kind(f"{prefix}_{series.name}", series.help, labels=labels)
        for values, each in own:
            if (value := series.value(each)) is not None:
                family.add_metric(values, value)
        rest = [value for each in others if (value := series.value(each)) is not None]
        if rest:
            family.add_metric(others_label, sum(rest))
        yield family
