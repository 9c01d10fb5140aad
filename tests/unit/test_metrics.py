"""Metrics without a daemon: the bound on tenants and instances, histograms, and the labels of requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.api.metrics import MOST, OTHERS, TENANT, instance_families, tenant_families
from insula.api.request_times import NONE, RequestTimes
from insula.control.accounting.usage import TenantFigures
from insula.control.telemetry import BOUNDS, ControllerWork, Histogram
from insula.model.accounting import UsageSnapshot, UsedTotals
from insula.model.errors import Invalid
from insula.model.objects import Limits, Tenant
from insula.model.units import check_label
from insula.model.views import Usage


def figures(number: int) -> TenantFigures:
    limits = Limits(cpus=2.0 if number % 2 else None)
    tenant = Tenant(name=f"t{number}", index=number, id_base=number << 16, limits=limits, created=float(number))
    totals = UsageSnapshot(at=0.0, used=UsedTotals(cpu=10**9), group=2 * 10**9)
    return TenantFigures(tenant, Usage(instances=1, cpus=0.5), totals, {}, 100, 1)


def test_at_most_a_thousand_tenants_have_metrics_of_their_own() -> None:
    families = {each.name: each for each in tenant_families([figures(number) for number in range(MOST + 7)])}
    assert len(families) == len(TENANT)
    cpu = {sample.labels["tenant"]: sample.value for sample in families["insula_tenant_cpu_seconds"].samples}
    assert len(cpu) == MOST + 1 and cpu[OTHERS] == 7.0 and cpu["t0"] == 1.0 and f"t{MOST}" not in cpu
    limits = {sample.labels["tenant"]: sample.value for sample in families["insula_tenant_limit_cpus"].samples}
    assert len(limits) == MOST // 2 + 1 and limits[OTHERS] == 6.0
    few = {sample.labels["tenant"] for each in tenant_families([figures(0)]) for sample in each.samples}
    assert few == {"t0"}


def test_no_tenant_can_have_the_name_of_the_others() -> None:
    assert check_label("tenant", "other")
    with pytest.raises(Invalid):
        check_label("tenant", OTHERS)


def test_at_most_a_thousand_instances_have_metrics_of_their_own() -> None:
    used = {f"i{number}": UsedTotals(sent=1) for number in range(MOST + 3)}
    families = {each.name: each for each in instance_families("acme", used)}
    sent = families["insula_instance_network_transmit_bytes"].samples
    assert len(sent) == MOST + 1
    assert {sample.labels["tenant"] for sample in sent} == {"acme"}
    assert [sample.value for sample in sent if sample.labels["instance"] == OTHERS] == [3.0]


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_counts_each_once(times: list[float]) -> None:
    histogram = Histogram()
    for each in times:
        histogram.observe(each)
    buckets = dict(histogram.buckets())
    assert buckets["+Inf"] == len(times)
    for bound in BOUNDS:
        assert buckets[str(bound)] == sum(each <= bound for each in times)


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8), st.integers(200, 599))))
def test_nothing_that_clients_choose_is_a_label(requests: list[tuple[str, str, int]]) -> None:
    times = RequestTimes()
    for method, path, status in requests:
        times.observe({"method": method, "path": path}, status, 0.1)
        times.observe({"method": method, "path": path, "path_template": "/v1/x"}, status, 0.1)
    for route, status_class in times.by_labels():
        assert route == NONE or route.endswith(" /v1/x")
        assert status_class in {"2xx", "3xx", "4xx", "5xx"}


def test_routes_have_no_types_of_parameters() -> None:
    times = RequestTimes()
    times.observe({"method": "GET", "path_template": "/v1/a/{tenant:str}/b/{pid:int}/{name:path}"}, 204, 0.1)
    assert [*times.by_labels()] == [("GET /v1/a/{tenant}/b/{pid}/{name}", "2xx")]


def test_a_pass_that_fails_is_counted_and_one_that_ends_as_expected_is_no_failure() -> None:
    work = ControllerWork()
    with work.one():
        pass
    with pytest.raises(KeyError), work.one():
        raise KeyError
    with pytest.raises(KeyError), work.one(KeyError):
        raise KeyError
    assert (work.passes, work.failures) == (3, 1) and work.seconds >= 0
