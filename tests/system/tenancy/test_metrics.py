"""/metrics: a real scrape, what is in it for whom, and that nothing a client or a tenant does makes it grow."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from insula.client import Client
from insula.client.http import request
from insula.model.errors import Denied, NotFound
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until
from tests.system.conftest import TenantFactory
from tests.system.tenancy.conftest import Houses, People

DASHBOARD = Path(__file__).parents[3] / "packaging" / "grafana" / "insula.json"
PATHS = 2_000


def scrape(client: Client) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(client.host.metrics())}


def value(families: dict[str, Metric], name: str, **labels: str) -> float | None:
    """The sample of that name with these labels."""
    for family in families.values():
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None


def series(families: Iterable[Metric]) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples}


@pytest.fixture
def operator(daemon: Daemon) -> Client:
    return Client(str(daemon.cli.socket), timeout=60)


def test_a_scrape_has_the_host_and_its_tenants(operator: Client, cli: Cli) -> None:
    before = scrape(operator)
    cli.ok("run", "-d", "--name", "web", "--cpus", "0.5", "--memory", "64m", "busybox", "sleep", "600")
    cli.fails("run", "-d", "busybox", "/no/such/program", status=127)
    usage, after = cli.json("usage"), scrape(operator)
    tenant = str(cli.tenant)
    assert value(after, "insula_tenant_cpu_seconds_total", tenant=tenant) == usage["used"]["cpu"] / 1e9
    assert value(after, "insula_tenant_reserved_cpus", tenant=tenant) == 0.5
    assert value(after, "insula_tenant_reserved_memory_bytes", tenant=tenant) == 64 << 20
    assert value(after, "insula_tenant_running_instances", tenant=tenant) == 1
    assert value(after, "insula_tenant_limit_cpus", tenant=tenant) is None, "it has no limit"
    for name in ("insula_launch_duration_seconds_count", "insula_launch_failures_total"):
        assert (value(after, name) or 0) >= (value(before, name) or 0) + 1, name
    for controller in ("instances", "networks"):
        assert value(after, "insula_controller_reconciles_total", controller=controller)
    assert value(after, "insula_instances", state="running")
    assert value(after, "insula_drift") == 0
    route = "POST /v1/tenants/{tenant}/instances"
    assert value(after, "insula_http_request_duration_seconds_count", route=route, status="2xx")
    buckets = [s for s in after["insula_http_request_duration_seconds"].samples if s.labels.get("route") == route]
    assert {s.labels["le"] for s in buckets if "le" in s.labels} == {
        "0.001", "0.005", "0.02", "0.1", "0.5", "2.0", "10.0", "+Inf"
    }  # fmt: skip


def test_thousands_of_paths_make_no_series(daemon: Daemon, operator: Client) -> None:
    """Neither do methods and names of tenants that clients invent."""
    dice = random.Random(1)
    send(daemon, [("GET", "/x"), ("GET", "/v1/tenants/no"), ("PROPFIND", "/v1/tenants"), ("GET", "/v1/whois/1")])
    scrape(operator)
    before = series(scrape(operator).values())
    words = ["v1", "tenants", "instances", "metrics", "status", "..", "%2e", "networks"]
    methods = ["GET", "GET", "GET", "BREW", "PROPFIND"]

    def path() -> str:
        count = dice.randint(1, 5)
        return "".join("/" + dice.choice([dice.choice(words), f"{dice.getrandbits(40):x}"]) for _ in range(count))

    send(daemon, ((dice.choice(methods), path()) for _ in range(PATHS)))
    after = scrape(operator)
    new = {labels for name, labels in series(after.values()) - before}
    assert {dict(labels).get("route", "none") for labels in new} <= routes(operator), "only routes that there are"
    assert all(dict(labels)["status"] in {"2xx", "4xx"} for labels in new)
    total = sum(s.value for s in after["insula_http_request_duration_seconds"].samples if s.name.endswith("_count"))
    assert total > PATHS, "the control: all of them were counted"


def send(daemon: Daemon, requests: Iterable[tuple[str, str]]) -> None:
    """Send requests without bodies on connections that are kept."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patiently(60))
        sock.connect(str(daemon.cli.socket))
        reader = sock.makefile("rb")
        for method, path in requests:
            sock.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            length = 0
            while (line := reader.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            reader.read(length)


def routes(operator: Client) -> set[str]:
    """The routes that the description has, and `none`."""
    with request(operator.remote, "GET", "/openapi.json") as response:
        document = json.loads(b"".join(response))
    return {"none"} | {f"{m.upper()} {path}" for path, item in document["paths"].items() for m in item}


def test_a_removed_tenant_is_gone_from_the_metrics(daemon: Daemon, operator: Client) -> None:
    daemon.cli.ok("tenant", "create", "mayfly")
    assert value(scrape(operator), "insula_tenant_instances", tenant="mayfly") == 0
    daemon.cli.ok("tenant", "rm", "mayfly")
    assert not [each for each in series(scrape(operator).values()) if ("tenant", "mayfly") in each[1]]


def test_a_tenant_has_its_own_metrics_and_no_others(people: People, houses: Houses) -> None:
    acme, globex = str(houses.acme.tenant), str(houses.globex.tenant)
    ann = people.person("viewer", acme)
    text = ann.client.tenants.metrics(acme)
    found = list(text_string_to_metric_families(text))
    assert {sample.labels["tenant"] for family in found for sample in family.samples} == {acme}
    assert {s.labels["instance"] for f in found for s in f.samples if "instance" in s.labels} == {"web"}
    assert globex not in text
    with pytest.raises(Denied, match=r"metrics\.read"):
        ann.client.host.metrics()
    with pytest.raises(NotFound):
        ann.client.tenants.metrics(globex)
    auditor = people.person("auditor")
    assert value(scrape(auditor.client), "insula_tenant_instances", tenant=globex) == 1, "by a token, as Prometheus"


def test_counters_of_a_removed_instance_stay_in_those_of_its_tenant(operator: Client, cli: Cli) -> None:
    tenant = str(cli.tenant)
    cli.ok("run", "-d", "--name", "brief", "busybox", "sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
    cli.ok("wait", "brief")
    until(lambda: cli.json("usage")["used"]["cpu"] > 0, "it is settled")
    before = value(scrape(operator), "insula_tenant_cpu_seconds_total", tenant=tenant)
    assert 'instance="brief"' in operator.tenants.metrics(tenant)
    cli.ok("rm", "brief")
    assert value(scrape(operator), "insula_tenant_cpu_seconds_total", tenant=tenant) == before
    assert 'instance="brief"' not in operator.tenants.metrics(tenant)


# -- the dashboard ---------------------------------------------------------------------------------------------------

SELECTOR = re.compile(r"(insula_[a-z_]+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
MATCHER = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)")


def expressions(board: Any) -> Iterator[tuple[str, str]]:
    """Every expression of a dashboard, with the pattern of its legend."""
    if isinstance(board, dict):
        if "expr" in board:
            yield board["expr"], board.get("legendFormat", "")
        if isinstance(board.get("definition"), str):
            yield re.sub(r"label_values\((.*), *(\w+)\)", r"sum by (\2) (\1)", board["definition"]), ""
        for each in board.values():
            yield from expressions(each)
    elif isinstance(board, list):
        for each in board:
            yield from expressions(each)


def wrong(expression: str, legend: str, known: dict[str, set[str]]) -> list[str]:
    """What an expression names that is not there: metrics, and labels of these."""
    found, labels = [], set[str]()
    for name, matchers in SELECTOR.findall(expression):
        if name not in known:
            found.append(name)
        labels |= known.get(name, set())
        found += [f"{name}{{{label}}}" for label in MATCHER.findall(matchers) if label not in known.get(name, set())]
    named = {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}
    return found + sorted((named | set(re.findall(r"\{\{(\w+)\}\}", legend))) - labels)


def test_the_dashboard_names_only_what_there_is(operator: Client, tenants: TenantFactory) -> None:
    tenant = tenants("--cpus", "1", "--memory", "256m")
    tenant.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    known: dict[str, set[str]] = {}
    for family in scrape(operator).values():
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    board = json.loads(DASHBOARD.read_text())
    everything = list(expressions(board))
    assert len(everything) > 30
    assert [each for each in everything if wrong(*each, known)] == []
    used = {name for expression, _ in everything for name, _ in SELECTOR.findall(expression)}
    assert len(used) > 20, "the control: names are found"
    for bad in ("insula_no_such_total", 'insula_drift{tenant="a"}', "sum by (route) (insula_tenants)"):
        assert wrong(bad, "", known), bad
    assert wrong("insula_tenants", "{{tenant}}", known)


def test_every_metric_is_documented(operator: Client, tenants: TenantFactory) -> None:
    tenant = tenants("--cpus", "1", "--memory", "256m")
    tenant.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    text = (DASHBOARD.parents[2] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"`(insula_\w+)`", text))
    families = [*text_string_to_metric_families(operator.host.metrics())]
    families += text_string_to_metric_families(operator.tenants.metrics(str(tenant.tenant)))
    # only if insulad proves by itself:
    proofs = {f"insula_isolation_{each}" for each in ("findings", "proven_time_seconds", "proofs_total")}
    assert proofs <= documented
    assert {f"{f.name}_total" if f.type == "counter" else f.name for f in families} == documented - proofs
