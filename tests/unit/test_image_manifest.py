"""Manifests, indexes and configurations: what is read, and what is refused in one line."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.image import manifest
from insula.image.manifest import Index, Manifest
from insula.model.errors import Invalid
from insula.model.objects import Healthcheck, ImageConfig
from tests.support.images import ARCHITECTURE, OCI, descriptor

LAYER = descriptor(b"layer", OCI + "layer.v1.tar+gzip")
CONFIG = descriptor(b"config", OCI + "config.v1+json")
MANIFEST = {"schemaVersion": 2, "mediaType": OCI + "manifest.v1+json", "config": CONFIG, "layers": [LAYER]}
INDEX = {"schemaVersion": 2, "manifests": [descriptor(b"m", OCI + "manifest.v1+json")]}
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
        ({"manifests": []}, "claims to be an index"),
        ({"mediaType": OCI + "index.v1+json"}, "does not fit"),
        ({"mediaType": 7}, "does not parse"),
        ({"layers": []}, "no layers"),
        ({"layers": [LAYER] * 501}, "501 layers"),
        ({"layers": {}}, "does not parse"),
        ({"layers": [{**LAYER, "digest": "sha256:12"}]}, "digest"),
        ({"layers": [{**LAYER, "digest": "../../etc/passwd"}]}, "digest"),
        ({"layers": [{**LAYER, "digest": "sha512:" + "0" * 128}]}, "not supported"),
        ({"layers": [{**LAYER, "size": -1}]}, "impossible size"),
        ({"layers": [{**LAYER, "size": 1.5}]}, "does not parse"),
        ({"layers": [{**LAYER, "size": 1 << 80}]}, "impossible size"),
        ({"layers": [{**LAYER, "urls": ["http://192.0.2.1/x"]}]}, "foreign"),
        ({"layers": [{**LAYER, "mediaType": OCI + "layer.nondistributable.v1.tar+gzip"}]}, "foreign"),
        ({"layers": [{**LAYER, "mediaType": DOCKER + "image.rootfs.foreign.diff.tar.gzip"}]}, "foreign"),
        ({"layers": [{**LAYER, "mediaType": "text/html"}]}, "not supported"),
        ({"config": {**CONFIG, "mediaType": "application/vnd.cncf.helm.config.v1+json"}}, "not the configuration"),
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
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        manifest.read_document(data)


def test_a_configuration_becomes_ours() -> None:
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


def test_what_other_engines_pass_over_is_passed_over_with_a_note() -> None:
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
    """What was not said stays unsaid: it is the default of whoever runs the image."""
    config = ImageConfig(cmd=["x"], healthcheck=Healthcheck(test=["CMD", "true"], **given))
    data = manifest.write_configuration(config, [DIFF], 0.0, "test")
    assert manifest.read_configuration(data).config == config
    names = {"interval": "Interval", "timeout": "Timeout", "retries": "Retries", "start_period": "StartPeriod"}
    assert json.loads(data)["config"]["Healthcheck"].keys() == {"Test", *(names[name] for name in given)}


def test_what_could_not_be_launched_is_not_written() -> None:
    for bad in (ImageConfig(env=["A=\0"]), ImageConfig(env=["A"]), ImageConfig(stop_signal="NOSUCH")):
        with pytest.raises(Invalid):
            manifest.write_configuration(bad, [DIFF], 0.0, "test")
    assert manifest.write_configuration(ImageConfig(env=["A="]), [DIFF], 0.0, "test")


def test_what_is_written_is_read_back() -> None:
    config = ImageConfig(env=["A=b"], cmd=["x"], entrypoint=["y"], user="1:2", working_dir="/w", labels={"k": "v"})
    data = manifest.write_configuration(config, [DIFF], 0.0, "test")
    assert manifest.read_configuration(data).config == config
    assert data == manifest.write_configuration(config, [DIFF], 0.0, "test")


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
