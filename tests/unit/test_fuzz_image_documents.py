"""Any bytes as a manifest, an index, a configuration, a docker-archive, a name, or an image's /etc/passwd.

Each reader answers with what it understood, or refuses in one line. hypothesis begins with documents that are right and
puts something else in one place: another type, a huge number, a NUL, a lone surrogate, an object that nests a thousand
times.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insula.control.instances.drivers.container import users
from insula.image import archive, manifest, platform, reference
from insula.model.errors import InsulaError
from insula.model.objects import IDS_PER_TENANT
from tests.support.images import OCI

slow = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150)

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(1 << 62, 1 << 80), st.floats(), st.text(max_size=40),
    st.sampled_from(["\0", "\ud800", "a" * 5000, "sha256:" + "0" * 64, "sha256:" + "0" * 63, "linux", "../x", "NAN=1",
                     "", "=x", "SIGRTMAX-1", "SIGRTMIN+99", "v3", "v9"]),
)  # fmt: skip
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)

DIGEST = "sha256:" + "a" * 64
MANIFEST = {
    "schemaVersion": 2,
    "mediaType": OCI + "manifest.v1+json",
    "config": {"mediaType": OCI + "config.v1+json", "digest": DIGEST, "size": 5},
    "layers": [{"mediaType": OCI + "layer.v1.tar+gzip", "digest": DIGEST, "size": 7, "urls": None}],
    "annotations": {"a": "b"},
}
INDEX = {
    "schemaVersion": 2,
    "mediaType": OCI + "index.v1+json",
    "manifests": [
        {
            "mediaType": OCI + "manifest.v1+json",
            "digest": DIGEST,
            "size": 5,
            "platform": {"architecture": platform.architecture(), "os": "linux", "variant": "v8"},
            "annotations": {archive.REF_NAME: "web:latest"},
        }
    ],
}
CONFIGURATION = {
    "architecture": platform.architecture(),
    "os": "linux",
    "variant": "v1",
    "created": "2024-01-01T00:00:00Z",
    "config": {
        "User": "web",
        "ExposedPorts": {"80/tcp": {}},
        "Env": ["PATH=/bin", "ODD"],
        "Entrypoint": ["/bin/sh"],
        "Cmd": ["-c", "true"],
        "Volumes": {"/data": {}},
        "WorkingDir": "/srv",
        "Labels": {"a": "b"},
        "StopSignal": "SIGTERM",
    },
    "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
    "history": [{"created_by": "x"}],
}
DOCKER = [{"Config": "config.json", "RepoTags": ["web:latest"], "Layers": ["layer.tar"]}]


def places(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [here, *(place for key, value in inner for place in places(value, (*here, key)))]


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at one place."""
    if not place:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[place[0]] = changed(document[place[0]], place[1:], value)
    return copy


def nearly(document: Any) -> st.SearchStrategy[bytes]:
    """JSON of the document with one to three values changed, or cut off."""
    change = st.lists(st.tuples(st.sampled_from(places(document)), values), max_size=3)

    def build(changes: list[tuple[tuple[Any, ...], Any]]) -> bytes:
        made = document
        for place, value in changes:
            if place in places(made):
                made = changed(made, place, value)
        return json.dumps(made).encode()

    whole = change.map(build)
    return whole | st.builds(lambda data, cut: data[: cut % (len(data) + 1)], whole, st.integers(0, 4000))


def answered(read: Callable[[], object]) -> bool:
    """Whether it was understood; else it must have been refused as it should."""
    try:
        read()
    except InsulaError as error:
        assert error.hint and "\n" not in str(error) and "\n" not in error.hint and len(str(error)) < 1000
        str(error).encode()
        return False
    return True


@slow
@given(nearly(MANIFEST) | nearly(INDEX) | st.binary(max_size=200))
def test_manifests_and_indexes(data: bytes) -> None:
    answered(lambda: manifest.read_document(data))


@slow
@given(nearly(CONFIGURATION) | st.binary(max_size=200))
def test_configurations(data: bytes) -> None:
    """What is understood can be written again, and then says the same."""

    def read() -> None:
        found = manifest.read_configuration(data)
        manifest.check_platform(found)
        again = manifest.write_configuration(found.config, found.diff_ids, 0, "")
        assert manifest.read_configuration(again).config == found.config

    answered(read)


def test_the_documents_are_right_before_they_are_changed() -> None:
    """The control."""
    for document in (MANIFEST, INDEX):
        data = json.dumps(document).encode()
        assert answered(lambda data=data: manifest.read_document(data))  # type: ignore[misc]
    assert answered(lambda: manifest.read_configuration(json.dumps(CONFIGURATION).encode()))


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"config":', '{"schemaVersion":2,"manifests":['])
def test_documents_that_nest_too_deep(opening: str) -> None:
    """A parser that calls itself for each level ends with the stack: RecursionError here, a crash elsewhere."""
    data = (opening * 100_000).encode()
    assert not answered(lambda: manifest.read_document(data))
    assert not answered(lambda: manifest.read_configuration(data))


@slow
@given(nearly(INDEX), nearly(MANIFEST), nearly(DOCKER), st.booleans())
def test_archives(index: bytes, image: bytes, docker: bytes, oci: bool) -> None:
    """A layout or docker-archive on the disk whose blobs, or paths to them, are something else."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "secret").write_text("{}")
        top = Path(scratch) / "archive"
        blobs = top / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        if oci:
            (top / "oci-layout").write_text("{}")
            (top / "index.json").write_bytes(index)
            (blobs / ("a" * 64)).write_bytes(image)
        else:
            (top / "manifest.json").write_bytes(docker)
        with archive.ArchiveTree(top) as tree:

            def read() -> None:
                found = archive.read(tree)
                if isinstance(found, archive.OciLayout):
                    found.images()
                else:
                    for entry in found:
                        for path in (entry.config, *entry.layers):
                            answered(lambda path=path: tree.open(path).close())  # type: ignore[misc]

            answered(read)


@slow
@given(
    st.text(max_size=60)
    | st.from_regex(r"[a-z./:@\-_0-9\[\]]{0,60}", fullmatch=True)
    | st.text("a.:/@-_", max_size=300)
)
def test_names(text: str) -> None:
    """What is understood is understood the same way again: two readers of one name see one image."""

    def read() -> None:
        found = reference.parse(text)
        assert reference.parse(found.familiar) == found or found.digest
        assert reference.normalise_reference(found.familiar) == found.familiar
        assert not any(character.isspace() for character in found.locator)

    answered(read)


LINES = st.sampled_from(
    [b"root:x:0:0::/root:/bin/sh", b"web:x:7:8::/srv:/bin/sh", b"web:x:99999:0::/:", b"::::::", b"web:x:-1:0::/:",
     b"web:x:4294967296:0::/:", b"#", b"+::::::", b"web", b"\xff:x:1:1::/:", b"web:x:7:8::\0:"]
)  # fmt: skip
files = st.lists(LINES | st.binary(max_size=80), max_size=6).map(b"\n".join)
shapes = st.sampled_from(["file", "directory", "link", "loop", "up", "fifo", "nothing"])


@slow
@given(
    st.text(max_size=12) | st.sampled_from(["web", "0", "7:8", "web:web", "root", "65536", ":", "web:", "9" * 30]),
    st.lists(st.tuples(shapes, shapes, files, files), min_size=1, max_size=3),
)
def test_users(user: str, layers: list[tuple[str, str, bytes, bytes]]) -> None:
    """/etc/passwd and /etc/group in layers over each other, as files, links, directories and pipes."""
    with tempfile.TemporaryDirectory() as scratch:
        secret = Path(scratch, "secret")
        secret.write_text("web:x:1234:1234::/stolen:\n")
        made = []
        for number, (etc, kind, passwd, group) in enumerate(layers):
            layer = Path(scratch, str(number))
            layer.mkdir()
            made.append(layer)
            if _shape(layer / "etc", etc, b"", secret):
                for name, data in (("passwd", passwd), ("group", group)):
                    _shape(layer / "etc" / name, kind, data, secret)

        def read() -> None:
            found = users.resolve(user, made)
            assert all(0 <= number < IDS_PER_TENANT for number in (found.uid, found.gid, *found.groups))
            assert found.uid != 1234 or "1234" in user, "the host's file was read"
            assert found.home.startswith("/") and "\0" not in found.home

        answered(read)


def _shape(path: Path, kind: str, data: bytes, secret: Path) -> bool:
    """Makes it; whether it is a directory that can be filled."""
    if kind == "file" and path.name != "etc":
        path.write_bytes(data)
    elif kind in ("directory", "file"):
        path.mkdir()
        return path.name == "etc"
    elif kind == "link":
        path.symlink_to(secret)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "up":
        path.symlink_to(f"../../../../../../..{secret}")
    elif kind == "fifo":
        os.mkfifo(path)
    return False


def test_the_secret_would_be_read() -> None:
    """The control: the same file inside of the layer is what the user is taken from."""
    with tempfile.TemporaryDirectory() as scratch:
        etc = Path(scratch, "etc")
        etc.mkdir()
        (etc / "passwd").write_text("web:x:1234:1234::/stolen:\n")
        assert users.resolve("web", [scratch]).uid == 1234
