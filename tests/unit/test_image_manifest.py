"""Manifests, indexes and configurations: valid ones are read, others are refused in one line."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.image import manifest
from insula.image.limits import MAX_DOCUMENT
from insula.image.manifest import Index, Manifest
from insula.model.errors import Invalid
from insula.model.objects import Healthcheck, ImageConfig
from tests.support.images import ARCHITECTURE, OCI, descriptor

LAYER = descriptor(b"layer", OCI + "layer.v1.tar+gzip")
CONFIG = descriptor(b"config", OCI + "config.v1+json")
MANIFEST = {"schemaVersion": 2, "mediaType": OCI + "manifest.v1+json", "config": CONFIG, "layers": [LAYER]}
INDEX: dict[str, Any] = {"schemaVersion": 2, "manifests": [descriptor(b"m", OCI + "manifest.v1+json")]}
DOCKER = "application/vnd.docker."
DIFF = "sha256:" + "ab" * 32
CONFIGURATION: dict[str, Any] = {
    "architecture": ARCHITECTURE,
    "os": "linux",
    "config": {
        "User": "app",
        "Env": ["A=1"],
        "Cmd": ["sh"],
        "Entrypoint": None,
        "WorkingDir": "srv",
        "Volumes": {"/data": {}},
        "ExposedPorts": {"80/tcp": {}},
        "Labels": None,
        "StopSignal": "SIGINT",
        "Healthcheck": {"Test": ["x"]},
    },
    "rootfs": {"type": "layers", "diff_ids": [DIFF]},
}


def read(value: Any) -> Manifest | Index:
    return manifest.read_document(json.dumps(value).encode())


def test_good_documents_are_read() -> None:
    assert isinstance(read(MANIFEST), Manifest)
    assert isinstance(read(INDEX), Index)
    docker = {
        "schemaVersion": 2,
        "mediaType": DOCKER + "distribution.manifest.v2+json",
        "config": descriptor(b"c", DOCKER + "container.image.v1+json"),
        "layers": [descriptor(b"l", DOCKER + "image.rootfs.diff.tar.gzip")],
    }
    assert isinstance(read(docker), Manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schemaVersion": 1}, "schema version"),
        ({"schemaVersion": "2"}, "schema version"),
        ({"manifests": []}, "is also an index"),
        ({"mediaType": OCI + "index.v1+json"}, "contradicts"),
        ({"mediaType": 7}, "does not parse"),
        ({"layers": []}, "no layers"),
        ({"layers": [LAYER] * 501}, "501 layers"),
        ({"layers": {}}, "does not parse"),
        ({"layers": [{**LAYER, "digest": "sha256:12"}]}, "digest"),
        ({"layers": [{**LAYER, "digest": "../../etc/passwd"}]}, "digest"),
        ({"layers": [{**LAYER, "digest": "sha512:" + "0" * 128}]}, "not supported"),
        ({"layers": [{**LAYER, "size": -1}]}, "invalid size"),
        ({"layers": [{**LAYER, "size": 1.5}]}, "does not parse"),
        ({"layers": [{**LAYER, "size": 1 << 80}]}, "invalid size"),
        ({"layers": [{**LAYER, "urls": ["http://192.0.2.1/x"]}]}, "foreign"),
        ({"layers": [{**LAYER, "mediaType": OCI + "layer.nondistributable.v1.tar+gzip"}]}, "foreign"),
        ({"layers": [{**LAYER, "mediaType": DOCKER + "image.rootfs.foreign.diff.tar.gzip"}]}, "foreign"),
        ({"layers": [{**LAYER, "mediaType": "text/html"}]}, "not supported"),
        ({"config": {**CONFIG, "mediaType": "application/vnd.cncf.helm.config.v1+json"}}, "not an image configuration"),
        ({"config": {**CONFIG, "size": 5 << 20}}, "too large"),
        ({"config": None}, "does not parse"),
    ],
)
def test_bad_manifests_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid, match=message) as e:
        read({**MANIFEST, **change})
    assert e.value.hint
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schemaVersion":2}', b"\x1f\x8b", b'"x"', b"NaN"),
        b"[" * 100_000,
        b'{"schemaVersion":2,"layers":' + b"[" * 100_000,
        b" " * (5 << 20),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_documents_that_are_no_manifests_are_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        manifest.read_document(data)


def test_a_configuration_is_converted() -> None:
    found = manifest.read_configuration(json.dumps(CONFIGURATION).encode())
    assert found.diff_ids == [DIFF]
    assert found.config == ImageConfig(
        env=["A=1"],
        cmd=["sh"],
        user="app",
        working_dir="/srv",
        stop_signal="SIGINT",
        volumes=["/data"],
        exposed_ports=["80/tcp"],
    )


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"Env": ["A=\0"]}},
        {"config": {"Cmd": "sh"}},
        {"config": {"Cmd": ["a\0b"]}},
        {"config": {"User": "\0"}},
        {"config": {"StopSignal": "kill everything"}},
        {"config": {"StopSignal": "SIGNOSUCH"}},
        {"config": {"StopSignal": "SIGRTMAX+1"}},
        {"rootfs": {"type": "layers+base", "diff_ids": [DIFF]}},
        {"rootfs": {"type": "layers", "diff_ids": ["x"]}},
        {"rootfs": None},
        {"architecture": None},
    ],
    ids=str,
)
def test_bad_configurations_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        manifest.read_configuration(json.dumps({**CONFIGURATION, **change}).encode())


def test_an_image_for_other_machines_is_refused() -> None:
    for change in ({"architecture": "pdp11"}, {"os": "windows"}):
        found = manifest.read_configuration(json.dumps({**CONFIGURATION, **change}).encode())
        with pytest.raises(Invalid, match=f"this machine is linux/{ARCHITECTURE}"):
            manifest.check_platform(found)


def test_an_image_for_a_better_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("insula.image.platform.level", lambda: 2)
    monkeypatch.setattr(manifest, "architecture", lambda: "amd64")

    def check(variant: str) -> None:
        these = {**CONFIGURATION, "architecture": "amd64", "variant": variant}
        manifest.check_platform(manifest.read_configuration(json.dumps(these).encode()))

    for variant in ("", "v1", "v2", "odd"):
        check(variant)
    for variant in ("v3", "v9"):
        with pytest.raises(Invalid, match=f"amd64/{variant}"):
            check(variant)
    monkeypatch.setattr(manifest, "architecture", lambda: "arm64")
    these = {**CONFIGURATION, "architecture": "arm64", "variant": "v8"}
    manifest.check_platform(manifest.read_configuration(json.dumps(these).encode()))


def test_fields_that_other_engines_ignore_are_ignored_with_a_note() -> None:
    process = {"Env": ["A=1", "NOVALUE", "=x", "B="], "Entrypoint": [""], "Cmd": ["x"], "StopSignal": ""}
    found = manifest.read_configuration(json.dumps({**CONFIGURATION, "config": process}).encode())
    assert (found.config.env, found.config.entrypoint, found.config.cmd) == (["A=1", "B="], [], ["x"])
    assert found.config.stop_signal == "SIGTERM"
    assert found.notes == ["variable 'NOVALUE' without a value left out"]
    process["Entrypoint"] = ["", "y"]
    found = manifest.read_configuration(json.dumps({**CONFIGURATION, "config": process}).encode())
    assert found.config.entrypoint == ["", "y"]  # not docker's way to have none
    assert manifest.read_configuration(json.dumps(CONFIGURATION).encode()).notes == []


@pytest.mark.parametrize("given", [{}, {"interval": 5.0}, {"timeout": 1.5, "retries": 2}, {"start_period": 3.0}])
def test_a_health_check_is_written_as_it_is(given: dict[str, Any]) -> None:
    """Missing fields stay missing: they are the default of the engine that runs the image."""
    config = ImageConfig(cmd=["x"], healthcheck=Healthcheck(test=["CMD", "true"], **given))
    data = manifest.write_configuration(config, [DIFF], 0.0, "test")
    assert manifest.read_configuration(data).config == config
    names = {"interval": "Interval", "timeout": "Timeout", "retries": "Retries", "start_period": "StartPeriod"}
    assert json.loads(data)["config"]["Healthcheck"].keys() == {"Test", *(names[name] for name in given)}


def test_an_image_that_cannot_be_launched_is_not_written() -> None:
    for bad in (ImageConfig(env=["A=\0"]), ImageConfig(env=["A"]), ImageConfig(stop_signal="NOSUCH")):
        with pytest.raises(Invalid):
            manifest.write_configuration(bad, [DIFF], 0.0, "test")
    assert manifest.write_configuration(ImageConfig(env=["A="]), [DIFF], 0.0, "test")


def test_written_documents_are_read_back() -> None:
    config = ImageConfig(env=["A=b"], cmd=["x"], entrypoint=["y"], user="1:2", working_dir="/w", labels={"k": "v"})
    data = manifest.write_configuration(config, [DIFF], 0.0, "test")
    assert manifest.read_configuration(data).config == config
    assert data == manifest.write_configuration(config, [DIFF], 0.0, "test")


def test_the_most_that_a_manifest_may_say() -> None:
    most = {
        "config": {**CONFIG, "size": MAX_DOCUMENT},
        "layers": [{**LAYER, "size": size} for size in (0, (1 << 63) - 1)] * 250,
    }
    found = read({**MANIFEST, **most})
    assert isinstance(found, Manifest) and len(found.layers) == 500
    more: list[dict[str, Any]] = [
        {"config": {**CONFIG, "size": MAX_DOCUMENT + 1}},
        {"layers": [{**LAYER, "size": 1 << 63}]},
        {"layers": [LAYER, {**LAYER, "size": -1}]},
    ]
    for change in more:
        with pytest.raises(Invalid):
            read({**MANIFEST, **change})
    text = json.dumps(MANIFEST).encode()
    assert MAX_DOCUMENT == 4 << 20
    assert isinstance(manifest.read_document(text.ljust(4 << 20)), Manifest)
    with pytest.raises(Invalid, match="too large"):
        manifest.read_document(text.ljust((4 << 20) + 1))


@pytest.mark.parametrize("kind", ["", "+gzip", "+zstd", ".gzip", ".zstd"])
def test_every_kind_of_layer_that_is_read(kind: str) -> None:
    name = OCI + "layer.v1.tar" if kind[:1] != "." else DOCKER + "image.rootfs.diff.tar"
    assert isinstance(read({**MANIFEST, "layers": [{**LAYER, "mediaType": name + kind}]}), Manifest)
    with pytest.raises(Invalid, match="not supported"):
        read({**MANIFEST, "layers": [LAYER, {**LAYER, "mediaType": name + "+xz"}]})


def test_the_digests_of_an_index_are_checked() -> None:
    good = INDEX["manifests"]
    for bad in ("sha256:12", "../../etc/passwd"):
        with pytest.raises(Invalid, match="digest"):
            read({**INDEX, "manifests": [*good, {**good[0], "digest": bad}]})
    with pytest.raises(Invalid, match="contradicts"):
        read({**INDEX, "mediaType": OCI + "manifest.v1+json"})
    claims: list[dict[str, Any]] = [{"layers": []}, {"config": CONFIG}]
    for both in claims:
        with pytest.raises(Invalid, match="is also an index"):
            read({**INDEX, **both})


def test_missing_fields_are_empty() -> None:
    least = {"architecture": ARCHITECTURE, "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
    for process in (None, {}, dict.fromkeys(CONFIGURATION["config"])):
        found = manifest.read_configuration(json.dumps({**least, "config": process}).encode())
        assert found.config == ImageConfig(working_dir="/", stop_signal="SIGTERM")
        assert (found.diff_ids, found.variant, found.notes) == ([], None, [])
    with pytest.raises(Invalid, match="is not NAME=value"):
        manifest.check_config(ImageConfig(env=["=x"]))


@pytest.mark.parametrize(
    ("nanoseconds", "seconds"),
    [(0, None), (1, 1.0), (999_999_999, 1.0), (10**9, 1.0), (1_500_000_000, 1.5), (86_400 * 10**9, 86_400.0)],
)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Interval", "interval"),
        ("Timeout", "timeout"),
        ("StartPeriod", "start_period"),
        ("StartInterval", "start_interval"),
    ],
)
def test_the_times_of_a_health_check(name: str, field: str, nanoseconds: int, seconds: float | None) -> None:
    """Docker counts nanoseconds, 0 is the default; a second is the least that is done here."""
    given = {"config": {"Healthcheck": {"Test": ["CMD", "x"], name: nanoseconds}}}
    found = manifest.read_configuration(json.dumps({**CONFIGURATION, **given}).encode()).config.healthcheck
    assert found == Healthcheck(test=["CMD", "x"], **{field: seconds})  # type: ignore[arg-type]
    assert found is not None
    again = json.loads(manifest.write_configuration(ImageConfig(cmd=["x"], healthcheck=found), [DIFF], 0.0, "test"))
    assert again["config"]["Healthcheck"] == {"Test": ["CMD", "x"], **({name: int(seconds * 1e9)} if seconds else {})}


@pytest.mark.parametrize(
    "check",
    [{"Interval": -1}, {"Timeout": 86_400 * 10**9 + 1}, {"Retries": -1}, {"Retries": 1001}, {"Test": ["CMD"]}],
    ids=str,
)
def test_health_checks_out_of_range_are_refused(check: dict[str, Any]) -> None:
    given = {"config": {"Healthcheck": {"Test": ["CMD", "x"], **check}}}
    with pytest.raises(Invalid, match="health check"):
        manifest.read_configuration(json.dumps({**CONFIGURATION, **given}).encode())


@pytest.mark.parametrize("test", [None, [], ["CMD-SH", "x"], ["NONE"], ["CMD-SHELL", "x"]])
def test_kinds_of_health_checks(test: list[str] | None) -> None:
    given = {"config": {"Healthcheck": {"Test": test, "Retries": 7}}}
    found = manifest.read_configuration(json.dumps({**CONFIGURATION, **given}).encode()).config.healthcheck
    known = test is not None and test[:1] in (["NONE"], ["CMD-SHELL"])
    assert found == (Healthcheck(test=test, retries=7) if known else None)


def test_a_document_that_is_written_is_read_back_and_has_one_form() -> None:
    for value in (MANIFEST, {**MANIFEST, "annotations": {"b": "1", "a": "2"}}, INDEX):
        data = manifest.write_document(read(value))
        assert json.loads(data) == value
        assert data == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_a_configuration_to_the_last_byte() -> None:
    """Two machines must write the same bytes, since the digest is the image's name."""
    data = manifest.write_configuration(ImageConfig(cmd=["x"], working_dir="/"), [DIFF, DIFF], 86399.9, "by hand")
    entry = {"created": "1970-01-01T23:59:59Z", "created_by": "by hand"}
    assert json.loads(data) == {
        "architecture": ARCHITECTURE,
        "config": {"Cmd": ["x"]},
        "created": "1970-01-01T23:59:59Z",
        "history": [entry, entry],
        "os": "linux",
        "rootfs": {"diff_ids": [DIFF, DIFF], "type": "layers"},
    }
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    full = ImageConfig(
        env=["A=b"], cmd=["x"], entrypoint=["y"], user="u", working_dir="/w", labels={"k": "v"}, volumes=["/v"],
        exposed_ports=["80/tcp"], stop_signal="SIGINT",
    )  # fmt: skip
    assert json.loads(manifest.write_configuration(full, [DIFF], 0.0, "t"))["config"] == {
        "Cmd": ["x"], "Entrypoint": ["y"], "Env": ["A=b"], "ExposedPorts": {"80/tcp": {}}, "Labels": {"k": "v"},
        "StopSignal": "SIGINT", "User": "u", "Volumes": {"/v": {}}, "WorkingDir": "/w",
    }  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"env": ["A=\ud800"]},
        {"entrypoint": ["\0"]},
        {"cmd": ["\0"]},
        {"user": "\0"},
        {"working_dir": "/\0"},
        {"volumes": ["/\0"]},
        {"labels": {"\0": ""}},
        {"labels": {"a": "\0"}},
        {"healthcheck": Healthcheck(test=["CMD", "\0"])},
    ],
    ids=repr,
)
def test_a_broken_character_anywhere(bad: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="NUL or broken"):
        manifest.check_config(ImageConfig(**bad))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, inner in items for path in paths(inner, (*at, key)))]


@settings(max_examples=300)
@given(st.data())
def test_any_mutation_is_read_or_refused(data: st.DataObject) -> None:
    original = data.draw(st.sampled_from([MANIFEST, INDEX, CONFIGURATION]))
    document: Any = copy.deepcopy(original)
    *way, last = data.draw(st.sampled_from(paths(document)[1:]))
    place = document
    for key in way:
        place = place[key]
    place[last] = data.draw(json_values)
    text = json.dumps(document).encode()
    for reader in (manifest.read_document, manifest.read_configuration):
        try:
            reader(text)
        except Invalid as e:
            assert e.hint and "\n" not in str(e)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for reader in (manifest.read_document, manifest.read_configuration):
        with pytest.raises(Invalid):
            reader(data)
