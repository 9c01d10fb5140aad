"""Archives of images: those of other tools are read, other tools read ours, and bad ones leave nothing."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insula.image.store import ImageStore
from insula.model.errors import InsulaError, Invalid, NotFound
from insula.model.objects import Image, ImageConfig
from tests.support.images import ARCHITECTURE, OCI, Layout, digest, docker_archive, member, skopeo, tar, tree


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


LAYERS = [tar(member("a", b"1")), tar(member(".wh.a", b""), member("b", b"2", uid=5))]
PROCESS = {"Env": ["A=1"], "Cmd": ["/b"], "User": "5"}


def essence(image: Image) -> tuple[Any, ...]:
    return image.name, image.digest, image.config_digest, image.layers, image.config, image.size


# -- good archives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["oci", "docker"])
def test_a_saved_archive_can_be_loaded(store: ImageStore, tmp_path: Path, form: Literal["oci", "docker"]) -> None:
    layout = Layout()
    layout.image(LAYERS, process=PROCESS, name="one:1")
    layout.image(LAYERS[:1], name="registry.example:5000/team/two:x")
    images = store.load(layout.write(tmp_path / "layout"), tenant="acme")
    assert [image.name for image in images] == ["one:1", "registry.example:5000/team/two:x"]
    assert images[0].config == ImageConfig(env=["A=1"], cmd=["/b"], user="5")
    store.save(images, tmp_path / "saved.tar", format=form)
    store.save(images, tmp_path / "again.tar", format=form)
    assert (tmp_path / "saved.tar").read_bytes() == (tmp_path / "again.tar").read_bytes()
    other = ImageStore(tmp_path / "other")
    packers: list[Callable[[bytes], bytes]] = [bytes, gzip.compress]
    for number, pack in enumerate(packers):
        path = tmp_path / f"copy{number}"
        path.write_bytes(pack((tmp_path / "saved.tar").read_bytes()))
        assert [essence(image) for image in other.load(path, tenant="x")] == [essence(image) for image in images]
    for mine, theirs in zip(store.lower(images[0]), other.lower(images[0].layers), strict=True):
        assert tree(mine) == tree(theirs)


def test_skopeo_reads_a_saved_archive(store: ImageStore, tmp_path: Path) -> None:
    image = store.build_busybox()
    store.save([image], tmp_path / "oci.tar")
    store.save([image], tmp_path / "docker.tar", format="docker")
    found = json.loads(skopeo("inspect", f"oci-archive:{tmp_path}/oci.tar"))
    assert (found["Digest"], found["Layers"], found["Env"]) == (image.digest, found["Layers"], image.config.env)
    # through Docker's older list, not the layout
    configuration = json.loads(skopeo("inspect", "--config", f"docker-archive:{tmp_path}/docker.tar:busybox:latest"))
    assert configuration["rootfs"]["diff_ids"] == image.layers


def test_an_archive_of_skopeo_is_loaded(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    layout.image([*LAYERS, LAYERS[0]], process=PROCESS, name="ours:1")
    layout.write(tmp_path / "layout")
    wanted = store.load(tmp_path / "layout", tenant="acme")[0]
    skopeo("copy", f"oci:{tmp_path}/layout:ours:1", f"docker-archive:{tmp_path}/docker.tar:theirs:2")
    skopeo("copy", f"oci:{tmp_path}/layout:ours:1", f"oci-archive:{tmp_path}/oci.tar:theirs:3")
    [docker] = store.load(tmp_path / "docker.tar", tenant="acme")
    [oci] = store.load(tmp_path / "oci.tar", tenant="acme")
    assert (docker.name, docker.layers, docker.config) == ("theirs:2", wanted.layers, wanted.config)
    assert (oci.name, oci.digest) == ("theirs:3", wanted.digest)


def test_an_old_docker_archive(store: ImageStore, tmp_path: Path) -> None:
    """As `docker save` before version 25: layers in directories, equal ones as links, several names."""
    diff_ids = [digest(layer) for layer in (*LAYERS, LAYERS[0])]
    rootfs = {"type": "layers", "diff_ids": diff_ids}
    config = {"architecture": ARCHITECTURE, "os": "linux", "rootfs": rootfs, "config": PROCESS}
    entry = {
        "Config": "config.json",
        "RepoTags": ["old:1", "old:2"],
        "Layers": ["1/layer.tar", "2/layer.tar", "3/layer.tar"],
    }
    files = [
        member("manifest.json", json.dumps([entry]).encode()),
        member("config.json", json.dumps(config).encode()),
        *(member("1/layer.tar", LAYERS[0], uid=10**6), member("2/layer.tar", LAYERS[1])),
        member("3/layer.tar", linkname="../1/layer.tar"),
    ]
    (tmp_path / "a.tar").write_bytes(tar(*files))
    images = store.load(tmp_path / "a.tar", tenant="acme")
    assert [image.name for image in images] == ["old:1", "old:2"]
    assert images[0].layers == diff_ids


def test_of_several_architectures_this_machines_is_taken(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    other = layout.image(
        LAYERS,
        config={"architecture": "pdp11"},
        name=None,
        listed=False,
        platform={"os": "linux", "architecture": "pdp11"},
    )
    mine = layout.image(LAYERS, name=None, listed=False, platform={"os": "linux", "architecture": ARCHITECTURE})
    attestation = {**other, "platform": {"os": "unknown", "architecture": "unknown"}}
    body = {"schemaVersion": 2, "manifests": [attestation, other, mine]}
    name = {"org.opencontainers.image.ref.name": "multi:1"}
    layout.index["manifests"] = [layout.document(body, OCI + "index.v1+json", annotations=name)]
    [image] = store.load(layout.write(tmp_path / "layout"), tenant="acme")
    assert (image.name, image.digest, image.architecture) == ("multi:1", mine["digest"], ARCHITECTURE)


def test_a_name_can_be_given(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    layout.image(LAYERS, name=None)
    path = layout.write(tmp_path / "layout")
    assert store.load(path, tenant="acme", name="given")[0].name == "given:latest"
    [nameless] = store.load(path, tenant="acme")
    assert nameless.name == nameless.digest  # a name like any other: repository sha256, and the digits as tag


# -- bad archives ----------------------------------------------------------------------------------


def broken(change: Callable[[Layout], None]) -> bytes:
    layout = Layout()
    layout.image(LAYERS, process=PROCESS)
    change(layout)
    return layout.tar()


def other_image(**overrides: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.index["manifests"].clear()
        layout.image(LAYERS, **overrides)

    return change


def swap_blob(kind: str) -> Callable[[Layout], None]:
    """Other bytes behind the digest of the manifest, the configuration or a layer."""

    def change(layout: Layout) -> None:
        for name, data in layout.blobs.items():
            if {"manifest": b"schemaVersion", "config": b"rootfs"}.get(kind, b"\x1f\x8b") in data:
                layout.blobs[name] = data.replace(b"A=1", b"A=2") if kind == "config" else data + b" "

    return change


def drop_layers(layout: Layout) -> None:
    layout.blobs = {name: data for name, data in layout.blobs.items() if not data.startswith(b"\x1f\x8b")}


def nest(layout: Layout) -> None:
    for _ in range(10):
        body = {"schemaVersion": 2, "manifests": layout.index["manifests"]}
        layout.index["manifests"] = [layout.document(body, OCI + "index.v1+json")]


def only_others(layout: Layout) -> None:
    layout.index["manifests"][0]["platform"] = {"os": "linux", "architecture": "pdp11"}


BOMB = gzip.compress(tar(member("zeros", bytes(70 << 20))), 1)
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "no archive": (lambda: b"hello" * 1000, "tar archive"),
    "empty file": (lambda: b"", "empty or cut off"),
    "some other tar": (lambda: tar(member("etc/passwd", b"")), "neither an OCI layout nor"),
    "cut off": (lambda: broken(lambda _: None)[:3000], "cut off"),
    "index is no JSON": (
        lambda: tar(member("oci-layout", b"{}"), member("index.json", b"{")),
        "does not parse",
    ),
    "index is a manifest": (
        lambda: tar(member("oci-layout", b"{}"), member("index.json", b'{"schemaVersion":2,"config":1}')),
        "does not parse",
    ),
    "index is missing a blob": (
        lambda: tar(
            member("oci-layout", b"{}"),
            member("index.json", json.dumps({"schemaVersion": 2, "manifests": [{}]}).encode()),
        ),
        "does not parse",
    ),
    "index is a link": (
        lambda: tar(member("oci-layout", b"{}"), member("index.json", linkname="/etc/passwd")),
        "missing",
    ),
    "swapped manifest": (lambda: broken(swap_blob("manifest")), "damaged"),
    "swapped configuration": (lambda: broken(swap_blob("config")), "has the digest"),
    "swapped layer": (lambda: broken(swap_blob("layer")), "more than|has the digest"),
    "no layers in it": (lambda: broken(drop_layers), "missing"),
    "nested": (lambda: broken(nest), "nested too deeply"),
    "of other machines": (lambda: broken(only_others), "pdp11"),
    "configuration of other machines": (lambda: broken(other_image(config={"architecture": "pdp11"})), "pdp11"),
    "wrong DiffIDs": (
        lambda: broken(
            other_image(config={"rootfs": {"type": "layers", "diff_ids": [digest(LAYERS[1]), digest(LAYERS[0])]}})
        ),
        "has the DiffID",
    ),
    "too few DiffIDs": (
        lambda: broken(other_image(config={"rootfs": {"type": "layers", "diff_ids": [digest(LAYERS[0])]}})),
        "2 layers, and its configuration 1",
    ),
    "too many layers": (lambda: broken(lambda layout: add(layout, [tar(member("f", b""))] * 501)), "501 layers"),
    "bad environment": (lambda: broken(other_image(process={"Env": ["A=\0"]})), "NUL"),
    "bad stop signal": (lambda: broken(other_image(process={"StopSignal": "NOSUCH"})), "'NOSUCH' is not a signal"),
    "bad name": (lambda: broken(other_image(name="../../x")), "bad registry"),
    "an escaping layer": (lambda: broken(lambda layout: add(layout, [tar(member("../../x", b""))])), "path with"),
    "65 images": (lambda: broken(lambda layout: layout.index.update(manifests=layout.index["manifests"] * 65)), "65"),
    "a bomb as layer": (lambda: broken(lambda layout: add_raw(layout, BOMB)), "more than"),
    "docker: not a list": (lambda: tar(member("manifest.json", b"{}")), "does not parse"),
    "docker: empty": (lambda: docker_archive([], {}), "0 images"),
    "docker: missing layer": (
        lambda: docker_archive([{"Config": "c", "Layers": ["l"], "RepoTags": ["a"]}], {"c": configuration(LAYERS[:1])}),
        "missing",
    ),
    "docker: configuration outside": (
        lambda: docker_archive([{"Config": "../../../../etc/passwd", "Layers": []}], {}),
        "missing|does not parse",
    ),
    "docker: wrong layer": (
        lambda: docker_archive(
            [{"Config": "c", "Layers": ["l"], "RepoTags": ["a"]}], {"c": configuration(LAYERS[:1]), "l": LAYERS[1]}
        ),
        "has the DiffID",
    ),
}


def configuration(layers: list[bytes]) -> bytes:
    rootfs = {"type": "layers", "diff_ids": [digest(layer) for layer in layers]}
    return json.dumps({"architecture": ARCHITECTURE, "os": "linux", "rootfs": rootfs}).encode()


def add(layout: Layout, layers: list[bytes]) -> None:
    layout.image(layers, name="added")


def add_raw(layout: Layout, blob: bytes) -> None:
    part = layout.blob(blob, OCI + "layer.v1.tar+gzip")
    layout.image([gzip.decompress(blob)], manifest={"layers": [part]}, name="bomb")


@pytest.mark.parametrize("case", BAD)
def test_bad_archives_leave_nothing(case: str, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", max_size=64 << 20)
    (store.root / "lock").touch(mode=0o600)
    make, why = BAD[case]
    path = tmp_path / "archive.tar"
    path.write_bytes(make())
    before = tree(tmp_path)
    with pytest.raises(Invalid, match=why) as e:
        store.load(path, tenant="acme")
    assert e.value.hint
    assert "\n" not in str(e.value)
    assert tree(tmp_path) == before
    path.write_bytes(broken(lambda _: None))
    assert store.load(path, tenant="acme")  # the good one of the same make is loaded


def test_files_that_are_no_archives_are_refused(store: ImageStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    for name, kind in (("missing", NotFound), ("fifo", Invalid), ("empty", Invalid)):
        with pytest.raises(kind):
            store.load(tmp_path / name, tenant="acme")
    with pytest.raises(Invalid):
        store.load(Path("/dev/zero"), tenant="acme")


def test_a_digest_alone_gives_no_layer(store: ImageStore, tmp_path: Path) -> None:
    """The other tenant's image is in the store; an archive that only mentions its blobs is not enough."""
    secret = Layout()
    secret.image(LAYERS, name="secret")
    store.load(secret.write(tmp_path / "secret"), tenant="globex")
    stealing = Layout()
    stealing.image(LAYERS, name="stolen")
    drop_layers(stealing)
    with pytest.raises(Invalid, match="missing"):
        store.load(stealing.write(tmp_path / "stealing"), tenant="acme")
    own = tar(member("own", b"x"))  # own blobs, but the other's DiffIDs
    lying = Layout()
    lying.image([own, own], config={"rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in LAYERS]}})
    with pytest.raises(Invalid, match="has the DiffID"):
        store.load(lying.write(tmp_path / "lying"), tenant="acme")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_leaves_nothing_or_is_found(data: st.DataObject, tmp_path: Path) -> None:
    good = bytearray(broken(lambda _: None))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    store = ImageStore(tmp_path / "fuzz")
    store.collect(set())
    before = tree(store.root)
    path = tmp_path / "fuzz.tar"
    path.write_bytes(good)
    try:
        images = store.load(path, tenant="acme")
    except InsulaError as e:
        assert "\n" not in str(e)
        assert tree(store.root) == before
    else:
        for image in images:
            assert store.lower(image)
            store.release(image.digest)
        store.collect(set())


def test_saving_is_checked(store: ImageStore, tmp_path: Path) -> None:
    image = store.build_busybox()
    with pytest.raises(Invalid):
        store.save([image], tmp_path / "x", format="zip")  # type: ignore[arg-type]
    with pytest.raises(Invalid):
        store.save([], tmp_path / "x")
    store.release(image.digest)
    store.collect(set())
    with pytest.raises(NotFound):
        store.save([image], tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
