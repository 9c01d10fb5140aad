"""Archives that expand to more than they seem: small bombs, each beside a similar one that is accepted."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from insula.image import limits, worker
from insula.image.job import Job
from insula.image.limits import ExtractionLimits
from insula.image.store import ImageStore
from insula.model.errors import Failed, Invalid
from tests.support.images import ARCHITECTURE, OCI, Layout, digest, member, tar, tree

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images")
    (store.root / "lock").touch(mode=0o600)
    return store


def refused(store: ImageStore, archive: bytes, why: str) -> None:
    """The archive is refused, in one line with a hint, and leaves nothing."""
    before = tree(store.root)
    path = store.root.parent / "archive"
    path.write_bytes(archive)
    with pytest.raises(Invalid, match=why) as e:
        store.load(path, tenant="acme")
    assert e.value.hint and "\n" not in str(e.value)
    assert tree(store.root) == before


def taken(store: ImageStore, archive: bytes) -> int:
    """The number of images that are loaded of the archive."""
    path = store.root.parent / "archive"
    path.write_bytes(archive)
    images = store.load(path, tenant="acme")
    for image in images:
        store.release(image.digest)
    store.collect(set())  # what the store has is not counted again
    return len(images)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit a small archive to 4 MiB, so that the tests need no large files."""
    monkeypatch.setattr(limits, "RATIO_FLOOR", 4 * MIB)
    monkeypatch.setattr(limits, "MAX_RATIO", 2)


def layers_of_zeros(*sizes: int) -> list[bytes]:
    return [tar(member(f"zeros{number}", bytes(size))) for number, size in enumerate(sizes)]


def layout_of(*layers: bytes) -> bytes:
    layout = Layout()
    layout.image(layers)
    return layout.tar()


def images_of(*layers: bytes) -> bytes:
    """Each layer is an image of its own."""
    layout = Layout()
    for number, layer in enumerate(layers):
        layout.image([layer], name=f"image{number}:1")
    return layout.tar()


def docker_of(layers: list[bytes], names: list[str], extra: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A docker-archive whose layers are the files `names`; `extra` are its members beside the two documents."""
    rootfs = {"type": "layers", "diff_ids": [digest(layer) for layer in layers]}
    config = {"architecture": ARCHITECTURE, "os": "linux", "rootfs": rootfs}
    entry = {"Config": "config", "RepoTags": ["a:1"], "Layers": names}
    documents = [member("manifest.json", json.dumps([entry]).encode()), member("config", json.dumps(config).encode())]
    return tar(*documents, *extra)


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("make", [layout_of, images_of], ids=["layers of one image", "images of one archive"])
def test_the_limit_is_for_all_layers_together(store: ImageStore, make: Callable[..., bytes]) -> None:
    assert taken(store, make(*layers_of_zeros(3 * MIB))) == 1
    refused(store, make(*layers_of_zeros(3 * MIB, 2 * MIB)), "more than|expands to")
    assert taken(store, make(*layers_of_zeros(MIB, 2 * MIB))) > 0


@pytest.mark.usefixtures("small_limits")
def test_the_limit_is_in_proportion_to_the_received_size(store: ImageStore) -> None:
    assert taken(store, layout_of(*layers_of_zeros(5 * MIB), tar(member("random", os.urandom(6 * MIB))))) == 1
    refused(store, layout_of(*layers_of_zeros(5 * MIB), tar(member("random", os.urandom(10_000)))), "more than|expands")


def sparse(name: str, size: int) -> tuple[tarfile.TarInfo, bytes]:
    """A file that is one hole, in 1,024 bytes of archive."""
    return member(name, b"", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(size)})


@pytest.mark.usefixtures("small_limits")
def test_holes_count_as_zeros(store: ImageStore) -> None:
    refused(store, docker_of([], ["l"], [sparse("l", 5 * MIB)]), "makes more than")
    refused(store, docker_of([], ["l", "m"], [sparse("l", 3 * MIB), sparse("m", 3 * MIB)]), "makes more than")
    refused(store, docker_of([b""], ["l"], [sparse("l", 3 * MIB)]), "empty or cut off|DiffID")  # read, and no layer
    assert taken(store, docker_of([tar(member("f", b""))], ["l"], [member("l", tar(member("f", b"")))])) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 48 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def test_a_layer_with_many_names_is_packed_once(small_disk: Path) -> None:
    """Four megabytes as forty layers, each a link to the same file: packing each would exceed the disk."""
    store = ImageStore(small_disk / "images")
    layer = tar(member("random", os.urandom(4 * MIB)))
    names = [f"{number}/layer.tar" for number in range(40)]
    links = [member(name, linkname="../0/layer.tar") for name in names[1:20]]
    hard = [member(name, kind=tarfile.LNKTYPE, linkname="0/layer.tar") for name in names[20:]]
    archive = docker_of([layer] * 40, names, [member(names[0], layer), *links, *hard])
    path = small_disk / "archive"
    path.write_bytes(archive)
    [image] = store.load(path, tenant="acme")
    assert image.layers == [digest(layer)] * 40
    assert len(list(store.blobs.directory.iterdir())) == 3  # of the layer, the configuration, the manifest
    different = [tar(member("random", os.urandom(4 * MIB))) for _ in range(6)]  # the control: these don't fit
    path.write_bytes(docker_of(different, names[:6], [member(n, d) for n, d in zip(names, different, strict=False)]))
    with pytest.raises(Failed, match="the disk is full"):
        store.load(path, tenant="acme")


def test_some_of_the_disk_is_left_free(small_disk: Path) -> None:
    store = ImageStore(small_disk / "images")
    before = tree(small_disk)
    with pytest.raises(Failed, match="the disk is full"):
        store.import_rootfs(io.BytesIO(tar(member("f", os.urandom(23 * MIB)))), name="a", tenant="acme")
    assert tree(small_disk).keys() - {"images/lock"} == before.keys()
    store.import_rootfs(io.BytesIO(tar(member("f", os.urandom(12 * MIB)))), name="a", tenant="acme")
    found = os.statvfs(small_disk)
    assert found.f_bavail * limits.RESERVE_PART >= found.f_blocks


# -- entries, documents ------------------------------------------------------------------------------


def test_entries_count_together(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", max_entries=100)
    (store.root / "lock").touch(mode=0o600)

    def layers(*counts: int) -> list[bytes]:
        return [tar(*(member(f"{which}-{n}", b"") for n in range(count))) for which, count in enumerate(counts)]

    refused(store, layout_of(*layers(60, 60)), "entries")
    refused(store, images_of(*layers(60, 60)), "entries")
    assert taken(store, images_of(*layers(40, 40))) == 2


def nested(width: int) -> bytes:
    """Indexes in which the image for this machine is looked for in vain: `width` in each, three levels deep."""
    layout, kind = Layout(), OCI + "index.v1+json"
    other = layout.image([], listed=False, platform={"os": "plan9", "architecture": "pdp11"})
    entry = layout.document({"schemaVersion": 2, "manifests": [other]}, kind)
    for _ in range(2):
        entry = layout.document({"schemaVersion": 2, "manifests": [entry] * width}, kind)
    layout.index["manifests"] = [entry]
    return layout.tar()


def test_documents_are_counted(store: ImageStore) -> None:
    """A few kilobytes of indexes that all list the same one are read width to the power of their depth times."""
    refused(store, nested(3), "no image for linux")
    refused(store, nested(30), "too many manifests")


# -- time ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some kilobytes of zstd that are 64 GiB of zeros behind a good archive."""
    path = tmp_path_factory.mktemp("endless") / "archive.zst"
    frame = subprocess.run("head -c 256M /dev/zero | zstd -c", shell=True, capture_output=True, check=True).stdout
    head = subprocess.run(["zstd", "-c"], input=tar(member("f", b"1")), capture_output=True, check=True).stdout
    path.write_bytes(head + frame * 256)
    return path


def extract(archive: Path, target: Path, job: Job, **more: Any) -> worker.ExtractionResult:
    target.mkdir()
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with open(archive, "rb") as file:
            return worker.run(file, fd, ExtractionLimits(tar=1 << 40, **more), job)
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "archive"
    path.write_bytes(gzip.compress(tar(member("f", b"1"))))
    return path


def test_processor_time_is_limited(endless: Path, short: Path, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="too much processor time"):
        extract(endless, tmp_path / "1", Job(), cpu=1)
    result = extract(short, tmp_path / "2", Job(), cpu=5)
    assert 0 < result.cpu < 5


def test_time_is_limited(endless: Path, short: Path, tmp_path: Path) -> None:
    job = Job()
    job.limit(1)
    with pytest.raises(Failed, match="more than 1 seconds"):
        extract(endless, tmp_path / "1", job)
    job.limit(300)
    assert extract(short, tmp_path / "2", job).entries == 1


def test_an_import_has_processor_time_for_all_its_layers_together(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [tar(member(f"f{number}", b"")) for number in range(3)]
    monkeypatch.setattr(limits, "CPU_FLOOR", 1)  # each takes less, as only a start of Python takes some of it
    monkeypatch.setattr(limits.Budget, "spend", lambda self, **spent: setattr(self, "_cpu", self._cpu + 0.6))
    refused(store, layout_of(*layers), "more than 1 seconds of processor time")
    monkeypatch.setattr(limits, "CPU_FLOOR", 300)
    assert taken(store, layout_of(*layers)) == 1
