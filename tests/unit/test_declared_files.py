"""Files of declared state: YAML 1.2, TOML and JSON, from strangers; and what is written can be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]
from hypothesis import given
from hypothesis import strategies as st

from insula.control.declared.documents import read
from insula.control.declared.kinds.registry import KINDS, schema
from insula.control.declared.parse import parse
from insula.control.declared.yaml12 import MAX_DEPTH, MAX_NODES, resolve, write
from insula.model.declared import MAX_SIZE, DeclaredFile
from insula.model.errors import Invalid

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.*"))


def values(text: str, kind: Any = "yaml") -> list[Any]:
    return [document.value for document in parse([DeclaredFile(name="f", format=kind, text=text)])]


def refused(text: str, kind: Any = "yaml", tenant: str | None = "acme") -> str:
    """The one line of the error."""
    with pytest.raises(Invalid) as raised:
        read([DeclaredFile(name="f", format=kind, text=text)], tenant)
    assert "\n" not in str(raised.value) and raised.value.hint
    return raised.value.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("NO", "NO"),
        ("no", "no"),
        ("on", "on"),
        ("22:22", "22:22"),
        ("2026-11-28", "2026-11-28"),
        ("0644", 644),
        ("0o644", 0o644),
        ("0xff", 255),
        ("1_000", "1_000"),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("true", True),
        ("TRUE", True),
        ("yes", "yes"),
        ("~", None),
        ("", None),
        ("Null", None),
        ("<<", "<<"),
        ("=", "="),
        ("1.5.2", "1.5.2"),
    ],
)
def test_scalars_are_those_of_the_core_schema(text: str, value: Any) -> None:
    assert values(f"a: {text}") == [{"a": value}]
    assert type(values(f"a: {text}")[0]["a"]) is type(value)
    assert values(f"a: '{text}'") == [{"a": text}], "quoted, it is a string"


def test_documents_and_styles() -> None:
    text = "%YAML 1.2\n---\na: [1, {b: 'x'}]\n...\n---\n# nothing\n---\nc: |\n  two\n  lines\nd: !!str 22\n"
    assert values(text) == [{"a": [1, {"b": "x"}]}, {"c": "two\nlines\n", "d": "22"}]
    assert values("\ufeffa: 1") == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3:1", "the key 'a' is there twice"),
        ("a: {b: 1, b: 2}", "f:1:11", "the key 'b' is there twice"),
        ("a: &x 1\nb: *x\n", "f:1:4", "anchors and aliases"),
        ("b: *x\n", "f:1:4", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['id']", "f:1:4", "tags are not allowed"),
        ("a: !x 1", "f:1:4", "tags are not allowed"),
        ("a: !!binary aGVsbG8=", "f:1:4", "tags are not allowed"),
        ("1: x", "f:1:1", "the key '1' is not a string"),
        ("true: x", "f:1:1", "the key 'true' is not a string"),
        ("? [a]\n: x", "f:1:3", "a key is a collection"),
        ("a: .inf", "f:1:4", "the number '.inf' is too large"),
        ("a: .nan", "f:1:4", "too large"),
        ("a: 99999999999999999999", "f:1:4", "too large"),
        ("a: 1e999", "f:1:4", "too large"),
        ("a: [1, 2", "f:", "expected"),
        ("a: b: c", "f:1:5", "mapping values are not allowed"),
        ("a:\n\t- b", "f:2:1", "found character that cannot start any token"),
        ("a: \x00", "f", "control characters are not allowed"),
        ("- a", "f:1:1", "a document is a mapping, not ['a']"),
        ("just text", "f:1:1", "a document is a mapping"),
        ("[" * (MAX_DEPTH + 1), f"f:1:{MAX_DEPTH + 1}", "nested more than"),
    ],
)
def test_what_is_refused_is_named_with_its_place(text: str, where: str, what: str) -> None:
    message = refused(text)
    assert message.startswith(where) and what in message


def test_a_bomb_of_aliases_is_not_expanded() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
    )
    assert "anchors" in refused(bomb)


def test_a_file_has_bounds() -> None:
    assert len(values("a: [" + "1, " * (MAX_NODES - 10) + "1]")[0]["a"]) == MAX_NODES - 9
    assert "more than" in refused("a: [" + "1, " * MAX_NODES + "1]")
    assert "more than" in refused("a = [" + "1, " * MAX_NODES + "1]", "toml")
    assert "more than" in refused('{"a": [' + "1, " * MAX_NODES + "1]}", "json")
    assert values("a: " + "x" * (MAX_SIZE - 3))[0]["a"] == "x" * (MAX_SIZE - 3)
    assert "larger than 1 MiB" in refused("a: " + "x" * MAX_SIZE)


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("a = 1\na = 2\nb = 3\n", "toml", "line 2"),
        ("a = \nb = 3\n", "toml", "line 1"),
        ("a = 2026-11-28", "toml", "is a time"),
        ("a." * 120_000 + "b = 1", "toml", "a key has more than 32 parts"),
        ('"a" . ' * 40_000 + "b = 1", "toml", "a key has more than 32 parts"),
        ('"a\\"b".' + "a." * 40_000 + "b = 1", "toml", "a key has more than 32 parts"),
        ("x = 1\n[" + "''.\t" * 40_000 + "b]", "toml", "a key has more than 32 parts"),
        ("a = '" + "a" * (1 << 18) + "'", "toml", "larger than 256 KiB"),
        ("a = inf", "toml", "not a finite number"),
        ("a = " + "[" * 2000 + "]" * 2000, "toml", "nested"),
        ('{"a": 1, "a": 2}', "json", "the key 'a' is there twice"),
        ('{"a": NaN}', "json", "NaN is not a number of JSON"),
        ('{"a": }', "json", "f:1:7"),
        ('{"a": ' + "[" * 100_000, "json", "nested"),
        ('{"a": ' + "9" * 5000 + "}", "json", "too large"),
        ("3", "json", "a document is a mapping"),
        ('{"a": "\\ud800"}', "json", "half a character"),
        ('{"\\udfff": 1}', "json", "half a character"),
    ],
)
def test_toml_and_json_are_as_strict(text: str, kind: str, what: str) -> None:
    assert what in refused(text, kind)


def test_dots_in_strings_of_toml_are_no_long_keys() -> None:
    dots = ".".join(f"{n}" for n in range(30))
    text = f'a.b."c.d".e = "{dots}"\nf = ["1.2.3.4", "{dots}"]\n'
    assert values(text, "toml") == [{"a": {"b": {"c.d": {"e": dots}}}, "f": ["1.2.3.4", dots]}]


def test_several_documents_of_toml_and_json() -> None:
    assert values("[[document]]\na = 1\n[[document]]\nb = 2\n", "toml") == [{"a": 1}, {"b": 2}]
    assert values("a = 1\n", "toml") == [{"a": 1}]
    assert values('[{"a": 1}, {"b": 2}]', "json") == [{"a": 1}, {"b": 2}]
    assert values("", "json") == values("", "toml") == values("", "yaml") == []


SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        ["NO", "22:22", "1e3", "0o7", "0x1f", "~", "", "null", "- a", "a: b", "#", "1.", ".5", "=", "<<", "\x1b[2J"]
    ),
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(
    st.lists(
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), VALUE, max_size=4), max_size=3
    )
)
def test_what_is_written_reads_the_same(documents: list[dict[str, Any]]) -> None:
    text = write(documents)
    assert text.isascii() and not any(ord(c) < 32 and c != "\n" for c in text)
    assert values(text) == documents


@given(st.text(max_size=12))
def test_any_plain_scalar_is_resolved_or_refused(text: str) -> None:
    try:
        value = resolve(text)
    except ValueError:
        return
    assert value is None or isinstance(value, str | bool | int | float)
    assert not isinstance(value, float) or math.isfinite(value)


@given(st.binary(max_size=60))
def test_any_file_is_read_or_refused(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for kind in ("yaml", "toml", "json"):
        try:
            parse([DeclaredFile(name="f", format=kind, text=text)])
        except Invalid as error:
            assert error.hint


ODD: Any = st.recursive(
    st.one_of(SCALAR, st.sampled_from(["insula/v1", "Instance", "Network", "Tenant", "web", "10.0.0.0/24", "busybox"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(
            st.sampled_from(
                ["name", "labels", "tenant", "image", "options", "kind", "resources", "subnet", "role", "x"]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {"apiVersion": st.just("insula/v1"), "kind": st.sampled_from(list(KINDS)) | ODD},
        optional={"metadata": st.fixed_dictionaries({"name": st.just("a") | ODD}) | ODD, "spec": ODD, "x": ODD},
    ),
    st.sampled_from([None, "acme"]),
)
def test_any_document_is_taken_or_refused(document: dict[str, Any], tenant: str | None) -> None:
    try:
        read([DeclaredFile(text=write([document]))], tenant)
    except Invalid as error:
        assert error.hint and error.message.startswith("-")


# -- documents ---------------------------------------------------------------------------------------------------------

NETWORK = "apiVersion: insula/v1\nkind: Network\nmetadata: {name: back}\nspec: {subnet: 10.0.0.0/24}\n"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("kind: Network", "f:1:1", "missing required field `apiVersion`"),
        (NETWORK.replace("insula/v1", "v2"), "f:1:13", "invalid enum value 'v2' in apiVersion"),
        (NETWORK.replace("Network", "Netwrk"), "f:2:7", "there is no kind 'Netwrk'"),
        ("apiVersion: insula/v1", "f:1:1", "a document has no kind"),
        (NETWORK.replace("subnet:", "subnett:"), "f:4:17", "unknown field `subnett` in spec"),
        (NETWORK.replace("10.0.0.0/24", "[1]"), "f:4:16", "expected `str`, got `array` in spec.subnet"),
        (NETWORK.replace("10.0.0.0/24", "10.0.0.1/24"), "f:1:1", "subnet 10.0.0.1/24 has host bits set"),
        (NETWORK.replace("back", "Back_"), "f:1:1", "network name 'Back_' is not a DNS label"),
        (
            NETWORK.replace("{name: back}", "{name: back, tenant: globex}"),
            "f:3:32",
            "it is for tenant globex, not acme",
        ),
        (NETWORK.replace("{name: back}", "{name: back, tenant: A}"), "f:3:32", "tenant name 'A' is not a DNS label"),
        (NETWORK.replace("{name: back}", "{name: back, labels: {a: 1}}"), "f:3:32", "expected `str`, got `int`"),
        (f"{NETWORK}---\n{NETWORK}", "f:6:1", "Network/back is declared twice"),
        ("apiVersion: insula/v1\nkind: Tenant\nmetadata: {name: x}", "f:1:1", "a Tenant is not in a tenant"),
        (
            "apiVersion: insula/v1\nkind: Binding\nmetadata: {name: x}\nspec: {role: operator}",
            "f:1:1",
            "can't be bound",
        ),
    ],
)
def test_a_wrong_document_is_refused_with_its_place(text: str, where: str, what: str) -> None:
    message = refused(text)
    assert message.startswith(f"{where}: ") and what in message, message


def test_on_the_host_each_document_names_its_tenant() -> None:
    assert "its tenant is not named" in refused(NETWORK, tenant=None)
    named = NETWORK.replace("{name: back}", "{name: back, tenant: acme}")
    (found,) = read([DeclaredFile(name="f", text=named)], None)
    assert found.ref == ("Network", "acme", "back")


def test_a_document_keeps_what_it_says_in_canonical_form() -> None:
    text = """
apiVersion: insula/v1
kind: Instance
metadata: {name: web, labels: {app: web}}
spec: {image: busybox, stop_signal: term, dns: ["fd00:0::1"], resources: {cpus: 1}, healthcheck: {}}
"""
    (found,) = read([DeclaredFile(name="f", text=text)], "acme")
    assert found.form == {
        "labels": {"app": "web"},
        "spec": {
            "image": "busybox:latest",
            "stop_signal": "SIGTERM",
            "dns": ["fd00::1"],
            "resources": {"cpus": 1.0},
            "healthcheck": None,
        },
    }
    assert found.full["spec"]["resources"]["pids"] == 4096 and found.full["spec"]["wanted"] == "running"


def test_what_others_need_comes_first_whatever_the_order() -> None:
    def instance(name: str, **options: str) -> str:
        spec = json.dumps({"image": "busybox", "networks": [{"network": "back"}], "options": options})
        return f"apiVersion: insula/v1\nkind: Instance\nmetadata: {{name: {name}}}\nspec: {spec}\n"

    text = "---\n".join([instance("c", pid_of="b"), instance("b", pid_of="a"), instance("a"), NETWORK])
    assert [each.ref.name for each in read([DeclaredFile(text=text)], "acme")] == ["back", "a", "b", "c"]
    circle = "---\n".join([instance("a", pid_of="b"), instance("b", pid_of="a")])
    assert "depend on each other" in refused(circle)


# -- the published schema ----------------------------------------------------------------------------------------------


def test_the_schema_is_a_valid_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    """By the schema and by the server; with an unknown field added by neither."""
    kind: Any = {"yaml": "yaml", "toml": "toml", "json": "json"}[path.suffix[1:]]
    file = DeclaredFile(name=path.name, format=kind, text=path.read_text())
    check = jsonschema.Draft202012Validator(schema())
    raw = parse([file])
    assert raw
    for document in raw:
        check.validate(document.value)
        with pytest.raises(jsonschema.ValidationError):
            check.validate({**document.value, "spec": {**document.value.get("spec", {}), "nonsense": 1}})
    hosts = any(document.value["kind"] in ("Tenant", "User") for document in raw)
    assert len(read([file], None if hosts else "acme")) == len(raw)


def test_every_kind_has_an_example() -> None:
    shown = {doc["kind"] for path in EXAMPLES if path.suffix == ".yaml" for doc in yaml.safe_load_all(path.read_text())}
    assert shown == set(KINDS)
