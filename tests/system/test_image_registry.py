"""Pull and push against Debian's docker-registry, a real one on loopback, with and without a login."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from insula.image.job import Cancelled, Job
from insula.image.platform import level
from insula.image.store import Auth, ImageStore
from insula.model.errors import Denied, InsulaError, Invalid, NotFound, Unavailable
from insula.model.objects import Image
from tests.support.images import ARCHITECTURE, OCI, Layout, member, skopeo, tar, tree
from tests.support.wait import patiently, until

PASSWORD = "correct horse"
LOGIN = Auth(username="ada", password=PASSWORD)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def bcrypt(password: str) -> str:
    """crypt(3) of Debian's libcrypt1: what htpasswd -B would write."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    answer: bytes = crypt(password.encode(), b"$2y$05$abcdefghijklmnopqrstuu")
    return answer.decode()


@contextmanager
def registry(directory: Path, *, login: bool) -> Iterator[str]:
    """A running registry's host:port."""
    directory.mkdir()
    port = free_port()
    auth = ""
    if login:
        (directory / "htpasswd").write_text(f"ada:{bcrypt(PASSWORD)}\n")
        auth = f"auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}"
    (directory / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}, delete: {{enabled: true}}}}\n{auth}\n"
    )
    command = ["docker-registry", "serve", str(directory / "config.yml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(port) or process.poll() is not None, "docker-registry answers", 20, interval=0.02)
        assert process.poll() is None, "docker-registry ended"
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=patiently(5)).close()
    except urllib.error.HTTPError:
        return True  # it wants a login
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry(tmp_path_factory.mktemp("plain") / "registry", login=False) as host:
        yield host


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry(tmp_path_factory.mktemp("locked") / "registry", login=True) as host:
        yield host


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images")
    (store.root / "lock").touch(mode=0o600)
    return store


def two_layers(store: ImageStore, tmp_path: Path) -> Image:
    layout = Layout()
    layout.image([tar(member("a", os.urandom(100_000))), tar(member("b", b"2"))], name="app:1", process={"Cmd": ["x"]})
    [image] = store.load(layout.write(tmp_path / "layout"), tenant="acme")
    return image


def refused(store: ImageStore, kind: type[InsulaError], why: str, reference: str, auth: Auth | None = None) -> None:
    before = tree(store.root)
    with pytest.raises(kind, match=why) as e:
        store.pull(reference, tenant="acme", insecure=True, auth=auth)
    assert e.value.hint
    assert "\n" not in str(e.value)
    assert PASSWORD not in str(e.value)
    assert tree(store.root) == before


def test_a_pushed_image_can_be_pulled(store: ImageStore, plain: str, tmp_path: Path) -> None:
    image, lines = two_layers(store, tmp_path), list[str]()
    store.push(image, f"{plain}/team/app:1", insecure=True, progress=lines.append)
    assert any("Copying blob" in line for line in lines)
    other = ImageStore(tmp_path / "other")
    lines.clear()
    pulled = other.pull(f"{plain}/team/app:1", tenant="globex", insecure=True, progress=lines.append)
    assert any("Copying blob" in line for line in lines)
    assert pulled.name == f"{plain}/team/app:1"
    assert (pulled.digest, pulled.layers, pulled.config) == (image.digest, image.layers, image.config)
    assert [tree(path) for path in other.lower(pulled)] == [tree(path) for path in store.lower(image)]
    by_digest = other.pull(f"{plain}/team/app@{image.digest}", tenant="x", name="mine", insecure=True)
    assert (by_digest.name, by_digest.digest) == ("mine:latest", image.digest)


def test_busybox_goes_round(store: ImageStore, plain: str) -> None:
    image = store.build_busybox()
    store.push(image, f"{plain}/busybox", insecure=True)
    assert store.pull(f"{plain}/busybox", tenant="a", insecure=True).digest == image.digest


def test_a_docker_image_keeps_its_digest(store: ImageStore, plain: str, tmp_path: Path) -> None:
    image = two_layers(store, tmp_path)
    store.push(image, f"{plain}/oci:1", insecure=True)
    source, target = f"docker://{plain}/oci:1", f"docker://{plain}/docker:1"
    skopeo("copy", "--format=v2s2", "--src-tls-verify=false", "--dest-tls-verify=false", source, target)
    pulled = store.pull(f"{plain}/docker:1", tenant="acme", insecure=True)
    assert pulled.digest != image.digest
    assert pulled.layers == image.layers
    request = urllib.request.Request(f"http://{plain}/v2/docker/manifests/1", method="HEAD")
    request.add_header("Accept", "application/vnd.docker.distribution.manifest.v2+json")
    with urllib.request.urlopen(request, timeout=patiently(5)) as answer:
        assert answer.headers["Docker-Content-Digest"] == pulled.digest
    store.push(pulled, f"{plain}/docker:2", insecure=True)
    assert store.pull(f"{plain}/docker:2", tenant="acme", insecure=True).digest == pulled.digest


def test_of_several_architectures_this_machines_is_pulled(store: ImageStore, plain: str, tmp_path: Path) -> None:
    layout = Layout()
    mine = layout.image([tar(member("a", b""))], listed=False, platform={"os": "linux", "architecture": ARCHITECTURE})
    other = layout.image(
        [tar(member("b", b""))],
        config={"architecture": "arm"},
        listed=False,
        platform={"os": "linux", "architecture": "arm"},
    )
    body = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": [other, mine]}
    name = {"org.opencontainers.image.ref.name": "multi"}
    layout.index["manifests"] = [layout.document(body, OCI + "index.v1+json", annotations=name)]
    layout.write(tmp_path / "layout")
    source, target = f"oci:{tmp_path}/layout:multi", f"docker://{plain}/multi:1"
    skopeo("copy", "--all", "--dest-tls-verify=false", source, target)
    assert store.pull(f"{plain}/multi:1", tenant="acme", insecure=True).digest == mine["digest"]


def test_the_processors_level_is_pulled(store: ImageStore, plain: str, tmp_path: Path) -> None:
    """The variants of amd64: the best that the processor can run, none that it can't; elsewhere they mean nothing."""

    def push(tag: str, *variants: str) -> dict[str, str]:
        layout, entries = Layout(), {}
        for variant in variants:
            these = {"architecture": "amd64", **({"variant": variant} if variant else {})}
            layer = tar(member("level", variant.encode()))
            entries[variant] = layout.image([layer], config=these, listed=False, platform={"os": "linux", **these})
        body = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": list(entries.values())}
        name = {"org.opencontainers.image.ref.name": "levels"}
        layout.index["manifests"] = [layout.document(body, OCI + "index.v1+json", annotations=name)]
        layout.write(tmp_path / tag)
        source, target = f"oci:{tmp_path}/{tag}:levels", f"docker://{plain}/levels:{tag}"
        skopeo("copy", "--all", "--dest-tls-verify=false", source, target)
        return {variant: entry["digest"] for variant, entry in entries.items()}

    if ARCHITECTURE != "amd64":
        pytest.skip("this machine is no amd64")
    found = push("all", "", "v2", "v3", "v4", "v9")
    best = f"v{level()}" if level() > 1 else ""
    assert store.pull(f"{plain}/levels:all", tenant="acme", insecure=True).digest == found[best]
    found = push("base", "", "v9")
    assert store.pull(f"{plain}/levels:base", tenant="acme", insecure=True).digest == found[""]
    push("none", "v9")
    refused(store, Invalid, "not made for this machine", f"{plain}/levels:none")


def test_a_login(store: ImageStore, locked: str, tmp_path: Path) -> None:
    image = two_layers(store, tmp_path)
    wrong = Auth(username="ada", password="wrong")
    for auth in (None, wrong):
        with pytest.raises(Denied):
            store.push(image, f"{locked}/app:1", insecure=True, auth=auth)
        refused(store, Denied, "denies access", f"{locked}/app:1", auth)
    store.push(image, f"{locked}/app:1", insecure=True, auth=LOGIN)
    assert store.pull(f"{locked}/app:1", tenant="acme", insecure=True, auth=LOGIN).digest == image.digest
    assert PASSWORD not in f"{LOGIN!r} {LOGIN!s} {LOGIN}"


def test_a_password_is_on_no_command_line_and_left_nowhere(store: ImageStore, locked: str, tmp_path: Path) -> None:
    """Looked at while skopeo waits for the answer to an upload, which never comes."""
    image, seen, job = two_layers(store, tmp_path), list[bytes](), Job()

    def look() -> None:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            except OSError:
                continue
            if b"skopeo\0" in text:
                seen.append(text)

    command = [sys.executable, "-m", "tests.support.slow_registry"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as silent, ThreadPoolExecutor(1) as pool:
        assert silent.stdout
        target = f"127.0.0.1:{silent.stdout.readline().strip()}/secret:1"
        pushing = pool.submit(store.push, image, target, insecure=True, auth=LOGIN, job=job)
        try:
            assert silent.stdout.readline() == "upload\n"
            look()
        finally:
            job.cancel()
            silent.kill()
        with pytest.raises(Cancelled):
            pushing.result(patiently(20))
    store.push(image, f"{locked}/secret:1", insecure=True, auth=LOGIN)  # the control: it is what lets in
    assert seen
    assert not any(PASSWORD.encode() in text for text in seen)
    assert list((store.root / "tmp").iterdir()) == []


def test_a_missing_image(store: ImageStore, plain: str, tmp_path: Path) -> None:
    store.push(two_layers(store, tmp_path), f"{plain}/known:1", insecure=True)
    refused(store, NotFound, "has no image", f"{plain}/known:2")
    refused(store, NotFound, "has no image", f"{plain}/unknown")
    refused(store, NotFound, "has no image", f"{plain}/known@sha256:{'0' * 64}")


def test_a_registry_that_is_down(store: ImageStore) -> None:
    refused(store, Unavailable, "does not respond", f"127.0.0.1:{free_port()}/app")


def test_plain_http_needs_an_option(store: ImageStore, plain: str) -> None:
    with pytest.raises(Unavailable) as e:
        store.pull(f"{plain}/known:1", tenant="acme")
    assert "--insecure" in str(e.value)


def test_a_too_large_image_is_refused(store: ImageStore, plain: str, tmp_path: Path) -> None:
    store.push(two_layers(store, tmp_path), f"{plain}/large", insecure=True)
    refused(ImageStore(store.root, max_size=50_000), Invalid, "large", f"{plain}/large")


def test_an_artifact_that_is_no_image_is_refused(store: ImageStore, plain: str, tmp_path: Path) -> None:
    layout = Layout()
    config = layout.blob(b"{}", "application/vnd.cncf.helm.config.v1+json")
    layout.image([tar(member("a", b""))], manifest={"config": config}, name="chart")
    layout.write(tmp_path / "chart")
    source, target = f"oci:{tmp_path}/chart:chart", f"docker://{plain}/chart:1"
    skopeo("copy", "--dest-tls-verify=false", source, target)
    refused(store, Invalid, "not an image configuration", f"{plain}/chart:1")


def test_a_push_to_a_digest_is_refused(store: ImageStore, plain: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="pushed to a digest"):
        store.push(two_layers(store, tmp_path), f"{plain}/a@sha256:{'0' * 64}", insecure=True)


def test_nothing_is_left_in_the_hosts_caches(store: ImageStore, plain: str, tmp_path: Path) -> None:
    """Others may write there meanwhile; of this image nothing is there."""
    image = two_layers(store, tmp_path)
    store.push(image, f"{plain}/cache", insecure=True)
    ImageStore(tmp_path / "o").pull(f"{plain}/cache", tenant="acme", insecure=True)
    digests = [blob.name.encode() for blob in store.blobs.directory.iterdir()]
    assert len(digests) >= 4, "the control: two layers, the configuration and the manifest"
    cached = [path.read_bytes() for path in Path("/var/lib/containers/cache").rglob("*") if path.is_file()]
    assert not [digest for digest in digests for data in cached if digest in data]
