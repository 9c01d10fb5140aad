"""The SDK is whole: it has every route of the API, its two halves are one source, and its signatures are typed."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import insula.sdk
from insula.api.app import application
from insula.api.idempotency import takes_key
from insula.api.openapi import operations
from insula.model.disks import FurtherDisk
from insula.model.migration import MigrationTarget
from insula.model.objects import Resources
from insula.model.policies import Selector
from insula.sdk import (
    ApplySpec,
    AsyncInsula,
    AttachedProcess,
    Exchange,
    HTTPRequest,
    InstanceSpec,
    Insula,
    Items,
    NetworkAttachment,
    ResourceOptions,
)
from insula.sdk._async import network as for_tasks
from insula.sdk._sync import network as for_threads
from tests.unit.stub_plane import StubPlane

REPOSITORY = Path(__file__).parents[2]
GROUPS = (
    "tenants",
    "networks",
    "routers",
    "policies",
    "address_groups",
    "operator_policies",
    "peerings",
    "endpoints",
    "floating_ips",
    "load_balancers",
    "guarantees",
    "images",
    "instances",
    "snapshots",
    "identities",
    "host",
    "audit",
    "declared",
)
GIVEN: dict[str, object] = {
    "tenant": "acme",
    "name": "web",
    "network": "net",
    "router": "core",
    "policy": "db",
    "group": "office",
    "select": Selector(),
    "directions": ["in"],
    "rules": [],
    "cidrs": ["10.0.0.0/8"],
    "peer": "globex",
    "peering": "peering",
    "endpoint": "db",
    "floating_ip": "web",
    "snapshot": "snap1",
    "load_balancer": "shop",
    "listen": [],
    "on": [],
    "to_port": 5432,
    "networks": ["default"],
    "instance": "web",
    "outbound": "none",
    "to": "other",
    "subnet": "10.0.0.0/24",
    "reference": "localhost/web",
    "source": "web",
    "target": "db",
    "names": ["web"],
    "archive": [b"tar"],
    "rootfs": [b"tar"],
    "disk": [b"disk"],
    "format": "raw",
    "command": ["sh"],
    "path": "/etc",
    "user": "ann",
    "role": "member",
    "token_id": "0" * 16,
    "serial": "1f",
    "kind": "server",
    "pid": 1,
    "attachment": NetworkAttachment(network="back"),
    "migration": MigrationTarget(addresses=["192.0.2.7:7443"], authority="", secret="x"),
    "port": "eth1",
    "further": FurtherDisk(name="data", size=1 << 30),
    "disk_name": "data",
}
SPECS: dict[str, object] = {"InstanceSpec": InstanceSpec(image="web"), "ApplySpec": ApplySpec()}


class Sent(Exception):
    """A request has reached the transport."""


class Recording:
    """A transport that notes requests and sends none."""

    def __init__(self) -> None:
        self.requests: list[HTTPRequest] = []

    def open(self, request: HTTPRequest) -> Exchange:
        self.requests.append(request)
        raise Sent

    def close(self) -> None:
        pass


def methods(owner: type) -> Iterator[tuple[str, Callable[..., object]]]:
    for name, member in vars(owner).items():
        if not name.startswith("_") and inspect.isfunction(member):
            yield name, member


def call(method: Callable[..., Any], **more: object) -> None:
    """Call a method with the arguments that it must have, and have its request sent."""
    arguments = dict(more)
    for name, parameter in inspect.signature(method).parameters.items():
        if name == "spec":
            arguments[name] = SPECS[parameter.annotation]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments.setdefault(name, GIVEN[name])
    with pytest.raises(Sent):
        found = method(**arguments)
        if isinstance(found, Items | AttachedProcess):
            found.__enter__()
        else:
            next(found)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return application(StubPlane(tmp_path_factory.mktemp("plane")), None)


def every_call(**more: object) -> Iterator[tuple[str, HTTPRequest]]:
    """Each method of the SDK, with the request that it sends; one that takes a tenant or None is called with both."""
    transport = Recording()
    cloud = Insula(transport)
    for group in GROUPS:
        operations_of = getattr(cloud, group)
        for name, function in methods(type(operations_of)):
            parameters = inspect.signature(function).parameters
            extra = {each: value for each, value in more.items() if each in parameters}
            tenants: list[dict[str, object]] = [{"tenant": "acme"}, {"tenant": None}]
            optional = "tenant" in parameters and "None" in str(parameters["tenant"].annotation) and group != "audit"
            for tenant in tenants if optional else [{}]:
                call(getattr(operations_of, name), **extra, **tenant)
                yield f"{group}.{name}", transport.requests[-1]


def route_of(app: Any, request: HTTPRequest) -> tuple[str, str]:
    """The route that a request reaches: of those that fit, the one with the fewest parameters."""
    where = request.target.partition("?")[0]
    if where == "/metrics":
        return "GET", where
    fitting = [
        path
        for path, method, _ in operations(app)
        if method == request.method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), where)
    ]
    assert fitting, f"no route for {request}"
    return request.method, min(fitting, key=lambda path: path.count("{"))


def test_the_sdk_has_every_route(app: Any) -> None:
    routes = {(method, path) for path, method, _ in operations(app)} | {("GET", "/metrics")}
    covered = {route_of(app, request) for _, request in every_call()}
    between_hosts = {("POST", "/v1/migrations"), ("POST", "/v1/migrations/outcome")}
    assert covered == routes - between_hosts and between_hosts < routes and len(routes) > 60


def test_that_test_sees_a_route_that_is_missing(app: Any) -> None:
    del_status = {route_of(app, request) for name, request in every_call() if name != "host.status"}
    assert ("GET", "/v1/status") not in del_status


def test_every_change_takes_an_idempotency_key_where_its_route_does(app: Any) -> None:
    taking = {(method, path) for path, method, handler in operations(app) if takes_key(handler, method)}
    keyed = {
        route_of(app, request)
        for _, request in every_call(idempotency_key="once")
        if request.field("idempotency-key") == "once"
    }
    assert keyed == taking and len(taking) > 20


def test_the_code_for_threads_is_made_of_that_for_tasks() -> None:
    made = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts/unasync"), "--check"], capture_output=True, text=True
    )
    assert (made.returncode, made.stdout) == (0, ""), "run scripts/unasync"


def test_what_is_written_by_hand_has_the_same_names() -> None:
    def names(module: Any) -> set[str]:
        return {
            name.removeprefix("Async")
            for name, member in vars(module).items()
            if not name.startswith("_") and getattr(member, "__module__", "").startswith("insula.sdk._")
        }

    assert names(for_tasks) == names(for_threads) >= {"Socket", "Background", "pause"}


def test_both_clients_have_the_same_methods() -> None:
    tasks, threads = AsyncInsula(Recording()), Insula(Recording())  # type: ignore[arg-type]
    for group in GROUPS:
        of_tasks = dict(methods(type(getattr(tasks, group))))
        of_threads = dict(methods(type(getattr(threads, group))))
        assert list(of_tasks) == list(of_threads)
        for name, method in of_tasks.items():
            assert list(inspect.signature(method).parameters) == list(inspect.signature(of_threads[name]).parameters)


def untyped(hint: Any) -> bool:
    """Whether an annotation has Any in it, or a dict that is no map of labels or such."""
    if hint is Any or hint is dict or hint is list:
        return True
    if typing.get_origin(hint) is dict and typing.get_args(hint)[1] not in (str, object):
        return True
    return any(untyped(each) for each in typing.get_args(hint) if not isinstance(each, list))


def public() -> Iterator[type]:
    cloud, tasks = Insula(Recording()), AsyncInsula(Recording())  # type: ignore[arg-type]
    yield from (type(getattr(client, group)) for client in (cloud, tasks) for group in GROUPS)
    for name in insula.sdk.__all__:
        member = getattr(insula.sdk, name)
        if isinstance(member, type) and member.__module__.startswith("insula.sdk"):
            yield member


@pytest.mark.parametrize("owner", [*public()], ids=lambda owner: owner.__name__)
def test_signatures_are_typed(owner: type) -> None:
    assert not {name for name, hint in get_type_hints(owner).items() if untyped(hint)}
    for name, method in methods(owner):
        hints = get_type_hints(method)
        assert "return" in hints and not {each for each, hint in hints.items() if untyped(hint)}, name


def test_that_test_sees_what_is_untyped() -> None:
    assert untyped(dict[str, Any]) and untyped(list[dict[str, int]] | None) and untyped(Any)
    assert not untyped(dict[str, str]) and not untyped(list[InstanceSpec])


def test_limits_of_instances_are_those_of_the_model() -> None:
    assert list(ResourceOptions.__annotations__) == list(Resources.__struct_fields__)
