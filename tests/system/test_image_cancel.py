"""Work on images ends with its client: no process goes on, nothing is left, and insulad can end."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from insula.image import confine
from insula.image.job import Cancelled, Job
from insula.image.store import ImageStore
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.images import Layout, member, tar, tree
from tests.support.machine import Namespaces
from tests.support.processes import find
from tests.support.wait import patiently, until

WORKER = f"{sys.executable} -s -P -m insula.image.worker"
SKOPEO = "skopeo"


@pytest.fixture(scope="module")
def long_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system that takes a while: one small file, half a million times."""
    entry = tar(member("f", b""), end=False)
    path = tmp_path_factory.mktemp("long") / "rootfs.tar.gz"
    path.write_bytes(gzip.compress(entry * 500_000 + bytes(1024), 1))
    return path


@pytest.fixture(scope="module")
def long_image(tmp_path_factory: pytest.TempPathFactory, long_archive: Path) -> Path:
    """The archive as the layer of an image."""
    layout = Layout()
    layout.image([gzip.decompress(long_archive.read_bytes())])
    path = tmp_path_factory.mktemp("long") / "image.tar"
    path.write_bytes(layout.tar())
    return path


@pytest.fixture
def registry() -> Iterator[subprocess.Popen[str]]:
    yield from slow_registry([])


def slow_registry(wrapper: list[str]) -> Iterator[subprocess.Popen[str]]:
    command = [*wrapper, sys.executable, "-m", "tests.support.slow_registry"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# -- the store -------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images")
    (store.root / "lock").touch(mode=0o600)
    return store


def cancelled(work: Callable[[Job], object], when: Callable[[], object]) -> None:
    """The work is cancelled when it is under way, and ends."""
    job, ended = Job(), threading.Event()

    def run() -> None:
        with pytest.raises(Cancelled):
            work(job)
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(when, "it is under way", 30)
    finally:
        job.cancel()
        thread.join()
    assert ended.is_set()


@pytest.mark.parametrize("what", ["load", "import"])
def test_an_extraction_is_cancelled(store: ImageStore, long_archive: Path, long_image: Path, what: str) -> None:
    before = tree(store.root)
    if what == "load":
        cancelled(lambda job: store.load(long_image, tenant="acme", job=job), lambda: find(WORKER))
    else:
        cancelled(lambda job: store.import_rootfs(long_archive, name="a", tenant="acme", job=job), lambda: find(WORKER))
    assert not find(WORKER)
    assert tree(store.root) == before


def test_a_pull_is_cancelled_and_skopeo_is_a_user_who_owns_nothing(
    store: ImageStore, registry: subprocess.Popen[str]
) -> None:
    before = tree(store.root)
    reference = f"127.0.0.1:{line(registry)}/app:1"

    def under_way() -> bool:
        assert line(registry) == "layer"
        [pid] = find(SKOPEO)
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        found = {name: value.split() for name, _, value in (text.partition(":") for text in lines)}
        assert found["Uid"] == found["Gid"] == [str(confine.USER)] * 4
        assert (found["Groups"], found["NoNewPrivs"]) == ([], ["1"])
        assert int(found["CapEff"][0], 16) == int(found["CapBnd"][0], 16) == 0
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == f"{confine.OOM}\n"
        assert os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
        return True

    cancelled(lambda job: store.pull(reference, tenant="acme", insecure=True, job=job), under_way)
    assert not find(SKOPEO)
    assert tree(store.root) == before


def test_a_push_is_cancelled(store: ImageStore, registry: subprocess.Popen[str]) -> None:
    image = store.build_busybox()
    before = tree(store.root)
    reference = f"127.0.0.1:{line(registry)}/app:1"
    cancelled(lambda job: store.push(image, reference, insecure=True, job=job), lambda: line(registry) == "upload")
    assert not find(SKOPEO)
    assert {name: each for name, each in tree(store.root).items() if "blobs" not in name} == {
        name: each for name, each in before.items() if "blobs" not in name
    }


class Impatient(Job):
    """A job that is cancelled when it asks for the third time: in the middle of its work."""

    asked = 0

    def check(self) -> None:
        self.asked += 1
        if self.asked == 3:
            self.cancel()
        super().check()


def test_a_save_is_cancelled(store: ImageStore, tmp_path: Path) -> None:
    image = store.build_busybox()
    job, patient = Impatient(), Job()
    with pytest.raises(Cancelled):
        store.save([image], tmp_path / "saved.tar", job=job)
    assert job.asked == 3
    assert {path.name for path in tmp_path.iterdir()} == {"images"}
    store.save([image], tmp_path / "saved.tar", job=patient)  # the control
    assert (tmp_path / "saved.tar").stat().st_size > image.size // 4


def test_work_that_was_cancelled_before_it_began(store: ImageStore, tmp_path: Path) -> None:
    image = store.build_busybox()
    before = tree(tmp_path)
    for work in (
        lambda job: store.save([image], tmp_path / "saved.tar", job=job),
        lambda job: store.import_rootfs(tmp_path / "saved.tar", name="a", tenant="acme", job=job),
    ):
        job = Job()
        job.cancel()
        with pytest.raises(Cancelled):
            work(job)
        assert tree(tmp_path) == before
        store.save([image], tmp_path / "saved.tar", job=Job())  # the control
        before = tree(tmp_path)


# -- the daemon ------------------------------------------------------------------------------------


def staged(daemon: Daemon) -> list[Path]:
    return [*(daemon.root / "images" / "tmp").iterdir(), *daemon.root.glob("save-*")]


@pytest.fixture
def there(daemon: Daemon) -> Iterator[subprocess.Popen[str]]:
    """The slow registry on the daemon's own loopback device."""
    yield from slow_registry(Namespaces.wrap(daemon.namespaces.host))


@pytest.mark.parametrize("verb", ["load", "import"])
def test_ctrl_c_ends_an_extraction(
    daemon: Daemon, tenant: Cli, long_archive: Path, long_image: Path, verb: str
) -> None:
    arguments: list[str | Path] = ["load", long_image] if verb == "load" else ["import", long_archive, "long"]
    before = tenant.json("image", "ls")
    client = tenant.start("image", *arguments)
    until(lambda: find(WORKER), "it extracts", 30)
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=patiently(30))
    until(lambda: not find(WORKER), "the extraction ends")
    until(lambda: not staged(daemon), "what it made is removed")
    assert tenant.json("image", "ls") == before
    assert tenant.ok("status")


def test_ctrl_c_ends_a_pull(daemon: Daemon, tenant: Cli, there: subprocess.Popen[str]) -> None:
    client = tenant.start("image", "pull", "--insecure", f"127.0.0.1:{line(there)}/app:1")
    assert line(there) == "layer"
    assert find(SKOPEO)
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=patiently(30))
    until(lambda: not find(SKOPEO), "the download ends")
    until(lambda: not staged(daemon), "what it made is removed")


def test_ctrl_c_ends_a_push(daemon: Daemon, tenant: Cli, there: subprocess.Popen[str]) -> None:
    client = tenant.start("image", "push", "--insecure", "busybox", f"127.0.0.1:{line(there)}/app:1")
    assert line(there) == "upload"
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=patiently(30))
    until(lambda: not find(SKOPEO), "the upload ends")
    until(lambda: not staged(daemon), "what it made is removed")


def test_insulad_ends_while_it_extracts_and_pulls(fresh: Daemon, long_image: Path) -> None:
    registries = slow_registry(Namespaces.wrap(fresh.namespaces.host))
    registry = next(registries)
    clients = [fresh.cli.start("image", "pull", "--insecure", f"127.0.0.1:{line(registry)}/app:1")]
    try:
        assert line(registry) == "layer"
        clients.append(fresh.cli.start("image", "load", long_image))
        until(lambda: find(WORKER), "it extracts", 30)
        fresh.stop()  # SIGTERM, and its end with status 0
        assert not find(WORKER) and not find(SKOPEO)
        assert staged(fresh) == []
        for client in clients:
            _, err = client.communicate(timeout=patiently(30))
            assert client.returncode == 1 and "error: " in err
        fresh.start()
        assert [image["name"] for image in fresh.cli.json("image", "ls")] == ["busybox:latest"]
    finally:
        registries.close()  # type: ignore[attr-defined]
        for client in clients:
            client.kill()
            client.communicate()


def test_a_client_that_waits_gets_its_image(tenant: Cli, tmp_path: Path) -> None:
    """The control: an import is not cancelled because its client sends nothing more."""
    path = tmp_path / "rootfs.tar"
    path.write_bytes(tar(member("f", b"")))
    assert tenant.ok("image", "import", path, "short") == "short:latest"
    assert tenant.ok("image", "save", "-o", tmp_path / "saved.tar", "short") == ""
    assert tenant.ok("image", "load", "--name", "again", tmp_path / "saved.tar") == "again:latest"
