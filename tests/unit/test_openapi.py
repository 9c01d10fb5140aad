"""The description of the API is complete: every operation has what a client, a fuzzer and a reader need.

A route that is added without its share fails here, with what is missing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.api import openapi
from insula.api.app import application
from insula.api.examples import EXAMPLES
from insula.api.openapi import TAGS, Document, describe, operations
from insula.control.allocation.quotas import check_limits, check_resources
from insula.control.instances.specs import check, check_labels
from insula.image.reference import parse
from insula.kernel.capabilities import NAMES, normalise
from insula.model import rules
from insula.model.errors import InsulaError, Invalid
from insula.model.health import plan
from insula.model.objects import Healthcheck, InstanceSpec, Limits, Resources, RestartPolicy
from insula.model.permissions import NOT_BY_TOKEN, PERMISSIONS
from insula.model.units import check_label, parse_signal
from insula.network.addresses import parse_mac
from tests.unit.stub_plane import StubPlane

Schema = dict[str, Any]
METHODS = ("get", "put", "post", "patch", "delete")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return application(StubPlane(tmp_path_factory.mktemp("plane")), None)


@pytest.fixture(scope="module")
def document(app: Any) -> Schema:
    # as it is sent
    return msgspec.json.decode(msgspec.json.encode(describe(app)))  # type: ignore[no-any-return]


def each(document: Schema) -> Iterator[tuple[str, Schema]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def test_every_route_is_described_once(app: Any, document: Schema) -> None:
    routes = {(path, method) for path, method, _ in operations(app)}
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    assert routes == described and len(routes) > 60
    names = [operation["operationId"] for _, operation in each(document)]
    assert len(set(names)) == len(names)


def test_it_is_made_once_and_not_in_the_event_loop(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[int] = []

    def made(app: Any) -> Schema:
        makers.append(threading.get_ident())
        return describe(app)

    async def main() -> list[bytes]:
        document, request = Document(), cast(Any, SimpleNamespace(app=app))
        answers = await asyncio.gather(*(document.answer(request) for _ in range(3)))
        return [answer.content for answer in answers]

    monkeypatch.setattr(openapi, "describe", made)
    first, second, third = asyncio.run(main())
    assert first == second == third == msgspec.json.encode(describe(app))
    assert len(makers) == 1 and makers[0] != threading.get_ident()


def test_every_operation_is_complete(document: Schema) -> None:
    for where, operation in each(document):
        assert operation["operationId"] and operation["summary"], where
        assert operation["tags"] and set(operation["tags"]) <= set(TAGS), where
        assert operation["x-insula-permission"] in PERMISSIONS, where
        assert operation["x-insula-permission"] in operation["description"], where
        assert operation["security"], where
        responses = operation["responses"]
        assert {"400", "401", "403", "429", "500", "503"} <= set(responses), where
        success = [status for status in responses if status.startswith("2")]
        assert len(success) == 1, where
        content = responses[success[0]].get("content")
        assert content or success == ["204"], f"{where} has no content: name what it `sends`"


def test_every_stream_is_counted(app: Any) -> None:
    """In the quota of its tenant or, if it is about none, of its sender."""
    short = {"schema", "host_metrics", "tenant_metrics"}
    pulls = {"pull", "push", "build_base"}  # so many at once: control/images.py
    streams = {
        str(handler.handler_name): handler.opt
        for _, _, handler in operations(app)
        if {"sends", "server_sent"} & set(handler.opt)
    }
    assert {"logs", "dump", "dump_on_host", "audit", "raw", "events", "apply_on_host"} <= set(streams)
    assert {name for name, opt in streams.items() if "quota" not in opt} == (short & set(streams)) | pulls


def test_security_is_that_of_the_table(document: Schema) -> None:
    for where, operation in each(document):
        by_token = {"token": []} in operation["security"]
        assert by_token == (operation["x-insula-permission"] not in NOT_BY_TOKEN), where
    assert set(document["components"]["securitySchemes"]) == {"token", "certificate"}
    whoami = document["paths"]["/v1/whoami"]["get"]
    assert whoami["security"] == [{"token": []}, {"certificate": []}, {}]
    assert document["paths"]["/v1/join"]["post"]["security"] == [{"token": []}]


def bounded(schema: Schema, document: Schema) -> Iterator[str]:
    """What is not bounded in a schema of a request: texts need a pattern, length, format or set; integers bounds."""
    if "$ref" in schema:
        yield from bounded(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
        return
    kind = schema.get("type")
    if kind == "string" and not {"pattern", "maxLength", "format", "enum", "const"} & set(schema):
        yield f"a string without pattern, maxLength, format or enum: {schema}"
    if kind == "integer" and not ({"enum", "minimum", "exclusiveMinimum"} & set(schema)):
        yield f"an integer without bounds: {schema}"
    for name, value in schema.get("properties", {}).items():
        yield from (f"{name}: {text}" for text in bounded(value, document))
    for key in ("items", "additionalProperties", "propertyNames"):
        if isinstance(schema.get(key), dict):
            yield from bounded({"type": "string", **schema[key]} if key == "propertyNames" else schema[key], document)
    for key in ("anyOf", "oneOf", "allOf"):
        for value in schema.get(key, []):
            yield from bounded(value, document)


def test_every_parameter_and_field_of_a_request_has_its_rule(document: Schema) -> None:
    for where, operation in each(document):
        for parameter in operation.get("parameters", []):
            missing = list(bounded(parameter["schema"], document))
            assert not missing, f"{where}: {parameter['name']}: {missing}"
        body = operation.get("requestBody")
        for kind, content in (body or {"content": {}})["content"].items():
            if kind == "application/json":
                missing = list(bounded(content["schema"], document))
                assert not missing, f"{where}: {missing}"
                assert "example" in content, f"{where} has no example of its body: see api/examples.py"


def test_every_json_answer_has_an_example(document: Schema) -> None:
    for where, operation in each(document):
        for response in operation["responses"].values():
            for kind, content in response.get("content", {}).items():
                if kind == "application/json":
                    assert "example" in content, f"{where}: see api/examples.py"


def test_references_lead_somewhere(document: Schema) -> None:
    def references(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(reference := value.get("$ref"), str):
                yield reference
            for each in value.values():
                yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    seen = set(references(document))
    assert len(seen) > 50
    for reference in seen:
        found: Any = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]


def test_what_only_the_host_sees_is_not_required(document: Schema) -> None:
    schemas = document["components"]["schemas"]
    assert "index" in schemas["Tenant"]["properties"] and "index" not in schemas["Tenant"]["required"]
    assert "name" in schemas["Tenant"]["required"]
    assert "vni" not in schemas["Network"]["required"]
    assert not any(name.startswith("Own") for name in schemas)


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_examples_are_of_their_type(kind: type) -> None:
    example = EXAMPLES[kind]
    assert msgspec.convert(msgspec.to_builtins(example), kind) == example


# -- the rules are those of the server -------------------------------------------------------------------------------


def accepted(value: object, check: Any) -> bool:
    try:
        check(value)
    except InsulaError:
        return False
    return True


@given(st.from_regex(rules.LABEL, fullmatch=True))
def test_labels_of_the_schema_are_taken(text: str) -> None:
    assert check_label("tenant", text) == text


@given(st.from_regex(rules.REFERENCE, fullmatch=True).filter(lambda text: len(text) <= 200))
def test_references_of_the_schema_are_taken(text: str) -> None:
    assert parse(text)


@given(st.from_regex(rules.SIGNAL, fullmatch=True))
def test_signals_of_the_schema_are_taken(text: str) -> None:
    assert parse_signal(text) > 0


@given(st.from_regex(rules.PORT_MAC, fullmatch=True))
def test_hardware_addresses_of_the_schema_are_taken(text: str) -> None:
    parse_mac(text)


@given(st.from_regex(rules.LABEL_NAME, fullmatch=True))
def test_names_of_labels_of_the_schema_are_taken(text: str) -> None:
    assert check_labels({text: "x"})


def test_capabilities_of_the_schema_are_those_of_the_kernel() -> None:
    assert [normalise(name) for name in rules.CAPABILITIES] == list(NAMES)


@pytest.mark.parametrize(
    ("check", "make", "least", "most", "step"),
    [
        (check_limits, lambda n: Limits(cpus=n), rules.MIN_CPUS, rules.MAX_CPUS, 0.001),
        (check_limits, lambda n: Limits(memory=n), rules.MIN_MEMORY, rules.MAX_BYTES, 1),
        (check_limits, lambda n: Limits(pids=n), 1, rules.MAX_PIDS, 1),
        (check_limits, lambda n: Limits(instances=n), 0, rules.MAX_INSTANCES, 1),
        (check_limits, lambda n: Limits(bandwidth=n), rules.MIN_BANDWIDTH, rules.MAX_BYTES, 1),
        (check_resources, lambda n: Resources(cpus=n), rules.MIN_CPUS, rules.MAX_CPUS, 0.001),
        (check_resources, lambda n: Resources(memory=n), rules.MIN_MEMORY, rules.MAX_BYTES, 1),
        (check_resources, lambda n: Resources(pids=n), 1, rules.MAX_PIDS, 1),
        (check, lambda n: InstanceSpec(image="x", stop_timeout=n), 0, rules.MAX_STOP_TIMEOUT, 1),
        (check, lambda n: InstanceSpec(image="x", log_size=n), rules.MIN_LOG, rules.MAX_LOG, 1),
        (check, lambda n: InstanceSpec(image="x", log_files=n), 1, rules.MAX_LOG_FILES, 1),
        (
            check,
            lambda n: InstanceSpec(image="x", restart=RestartPolicy(name="on-failure", max_retries=n)),
            0,
            rules.MAX_RESTARTS,
            1,
        ),
        (lambda h: plan(h, None), lambda n: Healthcheck(interval=n), rules.MIN_CHECK, rules.MAX_CHECK, 0.1),
        (lambda h: plan(h, None), lambda n: Healthcheck(retries=n), 1, rules.MAX_CHECK_RETRIES, 1),
    ],
)
def test_bounds_of_the_schema_are_those_of_the_server(
    check: Any, make: Any, least: float, most: float, step: float
) -> None:
    assert accepted(make(least), check) and accepted(make(most), check)
    assert not accepted(make(least - step), check) and not accepted(make(most + step), check)


def test_the_schema_has_these_bounds(document: Schema) -> None:
    schemas = document["components"]["schemas"]
    limit = schemas["Limits"]["properties"]["memory"]["anyOf"]
    assert {"type": "integer", "minimum": rules.MIN_MEMORY, "maximum": rules.MAX_BYTES} in limit
    assert schemas["TenantSpec"]["properties"]["name"]["pattern"] == f"^(?:{rules.LABEL})$"
    with pytest.raises(Invalid):
        check_label("tenant", "Acme")
