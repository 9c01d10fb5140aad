"""The description of the API, as others check it: by the schema of OpenAPI 3.1, and its examples by its own schemas."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped, unused-ignore]
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from tests.unit.test_openapi import Schema, app, document, each

__all__ = ["app", "document"]  # fixtures


def test_it_is_openapi_3_1(document: Schema) -> None:
    """By the schema of the OpenAPI Initiative, which schemathesis has. The controls are documents that it refuses."""
    assert document["openapi"].startswith("3.1.")
    assert [error.message for error in _errors(document)] == []
    for damage in ("info", "openapi"):
        assert _errors({name: value for name, value in document.items() if name != damage})
    wrong = copy.deepcopy(document)
    wrong["paths"]["/v1/tenants"]["get"]["parameters"] = [{"name": "x", "in": "nowhere"}]
    assert _errors(wrong)


def _errors(document: Schema) -> list[Any]:
    try:
        OPENAPI_31_VALIDATOR.validate(document)
    except Exception as error:
        return [error]
    return []


def examples(document: Schema) -> Iterator[tuple[str, Schema, Any]]:
    """Yield (where, schema, example) of each body, answer and parameter that has one."""
    for where, operation in each(document):
        for name, content in operation.get("requestBody", {}).get("content", {}).items():
            if "example" in content:
                yield f"{where} takes {name}", content["schema"], content["example"]
        for status, response in operation["responses"].items():
            for name, content in response.get("content", {}).items():
                if "example" in content:
                    yield f"{where} answers {status} {name}", content["schema"], content["example"]
        for parameter in operation.get("parameters", []):
            if "example" in parameter:
                yield f"{where} ?{parameter['name']}", parameter["schema"], parameter["example"]


def test_every_example_fits_its_schema(document: Schema) -> None:
    found = [*examples(document)]
    assert len(found) > 70
    wrong = [
        f"{where}: {complaint}" for where, schema, example in found for complaint in _misfits(document, schema, example)
    ]
    assert wrong == []


def test_every_schema_is_one(document: Schema) -> None:
    for name, schema in document["components"]["schemas"].items():
        try:
            Draft202012Validator.check_schema(schema)
        except Exception as error:
            pytest.fail(f"{name}: {error}")


def _misfits(document: Schema, schema: Schema, value: Any) -> list[str]:
    whole = {"components": document["components"], **schema}
    return [error.message[:200] for error in Draft202012Validator(whole).iter_errors(value)]


def test_a_misfit_is_found(document: Schema) -> None:
    (body,) = document["paths"]["/v1/tenants"]["post"]["requestBody"]["content"].values()
    assert _misfits(document, body["schema"], body["example"]) == []
    assert _misfits(document, body["schema"], {**body["example"], "name": 5})
    assert _misfits(document, body["schema"], {})
