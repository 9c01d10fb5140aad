"""The image store on a real file system: overlayfs shows the layers, and failures leave nothing."""

from __future__ import annotations

import concurrent.futures
import gzip
import io
import lzma
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from insula.image.store import ImageStore
from insula.kernel import syscalls
from insula.model.errors import Failed, InsulaError, Invalid, NotFound
from insula.model.objects import Image, ImageConfig
from tests.support.images import Killing, Layout, digest, member, opaque_layer, tar, tree
from tests.support.wait import patiently, until


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@contextmanager
def unchanged(store: ImageStore, why: str, kind: type[InsulaError] = Invalid) -> Iterator[None]:
    """The block must fail, in one line with a hint, and leave the store as it was."""
    (store.root / "lock").touch(mode=0o600)
    before = tree(store.root)
    with pytest.raises(kind, match=why) as e:
        yield
    assert "\n" not in str(e.value)
    assert e.value.hint
    assert tree(store.root) == before


@contextmanager
def overlay(store: ImageStore, image: Image, where: Path) -> Iterator[Path]:
    """The image's root file system."""
    where.mkdir()
    lower = ":".join(map(str, [*store.lower(image), where]))  # overlayfs wants two at least
    top = where.with_name("merged")
    top.mkdir()
    syscalls.mount("overlay", top, "overlay", syscalls.MS_RDONLY, f"lowerdir={lower}")
    try:
        yield top
    finally:
        syscalls.umount2(top)


def load(store: ImageStore, layout: Layout, tmp_path: Path) -> Image:
    path = tmp_path / "layout.tar"
    path.write_bytes(layout.tar())
    [image] = store.load(path, tenant="acme")
    return image


def a_tar(**more: Any) -> bytes:
    return tar(member("./", **more), member("file", b"content", uid=1000, gid=65535, mode=0o6755))


# -- import ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, "zstd"], ids=["tar", "gzip", "xz", "zstd"])
def test_a_root_file_system_is_imported(store: ImageStore, tmp_path: Path, pack: Any) -> None:
    data = a_tar()
    if pack == "zstd":
        packed = subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout
    else:
        packed = pack(data)
    config = ImageConfig(env=["A=b"], cmd=["/file"], labels={"x": "y"})
    image = store.import_rootfs(io.BytesIO(packed), name="my/app", tenant="acme", config=config)
    assert (image.name, image.tenant, image.config, image.layers) == ("my/app:latest", "acme", config, [digest(data)])
    with overlay(store, image, tmp_path / "o") as root:
        found = (root / "file").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1000, 65535, 0o6755)
        assert (root / "file").read_text() == "content"
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700  # setuid files of tenants: nobody else may reach them


def test_importing_again_changes_nothing(store: ImageStore) -> None:
    first = store.import_rootfs(io.BytesIO(a_tar()), name="a", tenant="acme", created=1.0)
    before = tree(store.root)
    again = store.import_rootfs(io.BytesIO(a_tar()), name="a", tenant="globex", created=1.0)
    assert (first.digest, first.layers) == (again.digest, again.layers)
    assert tree(store.root) == before


BAD_TARS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty or cut off"),
    "text": (b"hello world\n" * 100, "tar archive"),
    "cut off": (a_tar()[:1500], "cut off"),
    "no end": (tar(member("a", b""), end=False), "cut off"),
    "cut off gzip": (gzip.compress(a_tar())[:-20], "decompress"),
    "damaged gzip": (gzip.compress(os.urandom(5000))[:100] + b"x" * 5000, "decompress|tar archive"),
    "cut off xz": (lzma.compress(a_tar())[:-20], "decompress"),
    "damaged zstd": (b"\x28\xb5\x2f\xfd" + b"x" * 1000, "decompress|empty"),
    "upward": (tar(member("../x", b"")), "path with"),
    "link": (tar(member("a", linkname="/"), member("a/etc/x", b"")), "through a link"),
    "owner": (tar(member("a", b"", uid=65536)), "65536"),
    "capability": (tar(member("a", b"", pax_headers={"SCHILY.xattr.security.capability": "x"})), "capabilities"),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_bad_archives_leave_nothing(store: ImageStore, case: str) -> None:
    data, why = BAD_TARS[case]
    with unchanged(store, why):
        store.import_rootfs(io.BytesIO(data), name="a", tenant="acme")


def test_bombs_are_stopped_early(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", max_size=64 << 20, max_entries=1000)
    zeros = tar(member("zeros", bytes(65 << 20)))
    entries = tar(*(member(f"f{n}", b"") for n in range(1001)))
    hole = tar(member("h", b"", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 50)}))
    tail = a_tar() + bytes(300 << 20)
    for data, why in ((zeros, "more than"), (entries, "1000 entries"), (hole, "more than"), (tail, "expands to")):
        for pack in (lambda d: d, lambda d: gzip.compress(d, 1), lambda d: lzma.compress(d, preset=0)):
            packed = pack(data)
            with unchanged(store, why if packed is not data else "more than"):
                store.import_rootfs(io.BytesIO(packed), name="a", tenant="acme")


def test_an_implausible_compression_ratio_is_refused(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    bomb = subprocess.run(
        "(cat; head -c 700000000 /dev/zero) | zstd -c", shell=True, input=a_tar(), capture_output=True, check=True
    ).stdout
    assert len(bomb) < 1 << 20
    with unchanged(store, "expands to more than"):
        store.import_rootfs(io.BytesIO(bomb), name="a", tenant="acme")


def test_file_capabilities_are_kept(store: ImageStore) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep, revision 2
    record = b"SCHILY.xattr.security.capability=" + capability + b"\n"
    record = b"%d " % (len(record) + 3) + record
    archive = tar(member("h", record, kind=tarfile.XHDTYPE), end=False, format=0) + tar(member("ping", b"x"))
    image = store.import_rootfs(io.BytesIO(archive), name="a", tenant="acme")
    assert os.getxattr(store.lower(image)[0] / "ping", "security.capability") == capability


# -- layers ----------------------------------------------------------------------------------------


def test_overlayfs_shows_the_layers(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    below = [
        *(member(f"{d}/{f}", f"{d}{f}".encode()) for d in ("keep", "hide", "anew", "implied") for f in "xy"),
        *(member("gone", b"1"), member("gone-dir/f", b"1"), member("shared", b"old")),
    ]
    above = [
        *(member("keep/.wh.x", b""), member("keep/z", b"new")),
        *(member("hide/z", b"new"), member("hide/.wh..wh..opq", b"")),
        *(member(".wh.anew", b""), member("anew"), member("anew/z", b"new")),
        *(member(".wh.implied", b""), member("implied/z", b"new")),
        *(member(".wh.gone", b""), member(".wh.gone-dir", b""), member("shared", b"new")),
    ]
    layout.image([tar(*below), tar(*above)])
    image = load(store, layout, tmp_path)
    with overlay(store, image, tmp_path / "o") as root:
        files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        assert files == {"keep/y", "keep/z", "hide/z", "anew/z", "implied/z", "shared"}
        assert (root / "shared").read_text() == "new"


def test_a_hard_link_into_a_lower_layer(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    layout.image([tar(member("bin/tool", b"1")), tar(member("bin/same", kind=tarfile.LNKTYPE, linkname="bin/tool"))])
    image = load(store, layout, tmp_path)
    assert image.notes == ["hard link 'bin/same' into a lower layer made a symbolic link"]
    with overlay(store, image, tmp_path / "o") as root:
        assert os.readlink(root / "bin/same") == "/bin/tool"
        assert (root / "bin/tool").read_bytes() == b"1"


def test_odd_layers_by_the_confined_process(store: ImageStore, tmp_path: Path) -> None:
    """Layers that need more than creating files: removing trees, and leftovers of aufs."""
    layout = Layout()
    odd = [
        *(member("/a/b/c", b"1"), member("a", b"2")),
        *(member(".wh..wh.plnk"), member(".wh..wh.plnk/1.2", b"3"), member("d/e", kind=tarfile.LNKTYPE)),
        *(member(".wh.f", b""), member("f/g", b"4"), member("h", kind=tarfile.FIFOTYPE, uid=7, mode=0o600)),
    ]
    odd[4][0].linkname = ".wh..wh.plnk/1.2"
    layout.image([tar(member("f/below", b"0"), member("a/below", b"0")), tar(*odd)])
    image = load(store, layout, tmp_path)
    with overlay(store, image, tmp_path / "o") as root:
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert files == {"a": b"2", "d/e": b"3", "f/g": b"4"}
        assert (root / "h").stat().st_uid == 7


def test_notes_are_repeated_for_a_known_layer(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    layout.image(
        [tar(member("dev/console", kind=tarfile.CHRTYPE, devmajor=5, devminor=1), member("f", b"1"))],
        process={"Env": ["A=1", "NOVALUE"], "Entrypoint": [""], "Cmd": ["/f"], "StopSignal": "sigrtmin+3"},
    )
    for _ in range(2):
        image = load(store, layout, tmp_path)
        assert image.notes == [
            "device node 'dev/console' left out: instances have their own devices",
            "variable 'NOVALUE' without a value left out",
        ]
        assert (image.config.env, image.config.entrypoint, image.config.cmd) == (["A=1"], [], ["/f"])
        assert sorted(path.name for path in (store.lower(image)[0]).rglob("*")) == ["dev", "f"]


def test_layers_of_others_are_extracted_again(store: ImageStore, tmp_path: Path) -> None:
    """Seen by a limit of files, which counts what is extracted. In the store they are once."""
    layout = Layout()
    layout.image([tar(*(member(f"{number}", b"x") for number in range(5)))])
    path = layout.write(tmp_path / "layout")
    [image] = store.load(path, tenant="acme")
    before = tree(store.root / "layers")
    small = ImageStore(store.root, max_entries=3)
    with pytest.raises(Invalid, match="more than 3"):
        small.load(path, tenant="globex", own=[])
    [known] = small.load(path, tenant="acme", own=[image.digest])
    [again] = store.load(path, tenant="globex", own=[])
    assert known.digest == again.digest == image.digest
    until(lambda: not list((store.root / "tmp").iterdir()), "what is double is removed")
    assert tree(store.root / "layers") == before


def test_a_layer_can_hide_all_below_it(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    layout.image([tar(member("a", b"1")), tar(member(".wh..wh..opq", b""), member("b", b"2")), tar(member("c", b"3"))])
    image = load(store, layout, tmp_path)
    with overlay(store, image, tmp_path / "o") as root:
        assert sorted(path.name for path in root.iterdir()) == ["b", "c"]


def test_the_same_layer_twice(store: ImageStore, tmp_path: Path) -> None:
    first, second = tar(member("a", b"1")), tar(member(".wh.a", b""))
    layout = Layout()
    layout.image([first, second, first])
    image = load(store, layout, tmp_path)
    assert len(image.layers) == 3
    with overlay(store, image, tmp_path / "o") as root:
        assert (root / "a").read_text() == "1"


def test_many_layers(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    layout.image([tar(member(f"f{n}", b"")) for n in range(30)])
    image = load(store, layout, tmp_path)
    assert [next(path.iterdir()).name for path in store.lower(image)] == [f"f{n}" for n in reversed(range(30))]


def test_unknown_layers_are_not_found(store: ImageStore) -> None:
    with pytest.raises(NotFound):
        store.lower([digest(b"")])
    with pytest.raises(Invalid):
        store.lower(["../../etc"])


# -- garbage ---------------------------------------------------------------------------------------


def test_collect_removes_unused_content(store: ImageStore, tmp_path: Path) -> None:
    shared, own = tar(member("s", b"s" * 100_000)), tar(member("o", os.urandom(200_000)))
    layout = Layout()
    layout.image([shared], name="one")
    layout.image([shared, own], name="two")
    path = tmp_path / "a.tar"
    path.write_bytes(layout.tar())
    one, two = store.load(path, tenant="acme")
    everything = tree(store.root)
    assert store.collect(set()) == 0  # nobody has recorded them yet
    assert tree(store.root) == everything
    for image in (one, two):
        store.release(image.digest)
    assert store.collect({one.digest, two.digest}) == 0
    assert tree(store.root) == everything
    assert store.collect({one.digest}) >= 2 * 200_000  # as blob and extracted
    assert store.lower(one)
    with pytest.raises(NotFound):
        store.lower(two)
    assert store.collect(set()) > 0
    assert {str(p.relative_to(store.root)) for p in store.root.rglob("*") if not p.is_dir()} == {"lock"}
    assert list((store.root / "layers").iterdir()) == []
    assert store.load(path, tenant="acme")[1].digest == two.digest  # and all comes back


def test_collect_and_import_at_the_same_time(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout()
    layout.image([tar(member(f"f{n}", b"x" * 1000)) for n in range(3)])
    path = tmp_path / "a.tar"
    path.write_bytes(layout.tar())
    stop = threading.Event()
    collected: list[int] = []

    def collecting() -> None:
        while not stop.is_set():
            collected.append(store.collect(set()))

    def importing() -> None:
        for _ in range(4):
            [image] = store.load(path, tenant="acme")
            for lower in store.lower(image):
                assert len(list(lower.iterdir())) == 1
            store.save([image], tmp_path / f"{threading.get_ident()}.tar")
            store.release(image.digest)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        collector = pool.submit(collecting)
        imports = [pool.submit(importing) for _ in range(3)]
        try:
            for future in imports:
                future.result(timeout=patiently(120))
            until(lambda: sum(collected) > 0, "who collects has found something")
        finally:
            stop.set()
        collector.result()
    store.collect(set())
    assert list(store.blobs.directory.iterdir()) == []


# -- crashes and full disks ------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from insula.image.store import ImageStore
store = ImageStore(Path(sys.argv[1]))
print("ready", flush=True)
for path in sys.argv[2:]:
    store.import_rootfs(Path(path), name="a", tenant="acme", created=1.0)
print("done", flush=True)
"""


def swept(store: ImageStore) -> bool:
    store.sweep()
    return not any((store.root / "tmp").iterdir())


def test_kill_at_any_moment_leaves_only_complete_content(tmp_path: Path) -> None:
    source = tmp_path / "rootfs.tar"
    source.write_bytes(tar(*(member(f"d{n}/f", os.urandom(20_000)) for n in range(200))))
    root = tmp_path / "images"
    reference = ImageStore(tmp_path / "reference")
    image = reference.import_rootfs(source, name="a", tenant="acme", created=1.0)
    for step in range(12):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, root, source], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.04 * step)
        process.kill()
        process.wait()
        process.stdout.close()
        store = ImageStore(root)
        until(partial(swept, store), "nothing of it is left: its child dies with it, a moment later")
        for layer in (root / "layers").iterdir():
            assert tree(layer) == tree(reference.lower(image)[0])
        for blob in store.blobs.directory.iterdir():
            assert digest(blob.read_bytes()) == f"sha256:{blob.name}"
        store.collect(set())
        assert list((root / "layers").iterdir()) == []


@pytest.mark.parametrize("outer", [False, True], ids=["the one that extracts", "the one around it"])
def test_the_extracting_process_may_die(store: ImageStore, outer: bool) -> None:
    data, job = opaque_layer(4000), Killing(store.root, outer=outer)
    with unchanged(store, "the process that extracts layers was killed", Failed):
        store.import_rootfs(io.BytesIO(data), name="a", tenant="acme", job=job)
    assert job.killed
    image = store.import_rootfs(io.BytesIO(data), name="a", tenant="acme")  # the control
    assert len(list(store.lower(image)[0].iterdir())) == 4000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 24 MiB."""
    image, where = tmp_path / "disk", tmp_path / "small"
    subprocess.run(["truncate", "-s", "24M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-N", "2000", image], check=True)
    where.mkdir()
    subprocess.run(["mount", "-o", "loop", image, where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("what", ["blob", "content", "inodes"])
def test_a_full_disk_leaves_nothing(small_disk: Path, what: str) -> None:
    store = ImageStore(small_disk / "images")
    data = {
        "blob": tar(member("f", os.urandom(30 << 20))),
        "content": gzip.compress(tar(member("f", b"x" * (30 << 20)))),
        "inodes": gzip.compress(tar(*(member(f"f{n}", b"") for n in range(3000)))),
    }[what]
    with unchanged(store, "disk is full", Failed):
        store.import_rootfs(io.BytesIO(data), name="a", tenant="acme")
    assert store.import_rootfs(io.BytesIO(a_tar()), name="a", tenant="acme").layers  # there is room again


def test_saving_to_a_full_disk_leaves_nothing(store: ImageStore, small_disk: Path) -> None:
    image = store.import_rootfs(io.BytesIO(tar(member("f", os.urandom(30 << 20)))), name="a", tenant="acme")
    before = tree(small_disk)
    with pytest.raises(Failed, match="disk is full"):
        store.save([image], small_disk / "saved.tar")
    assert tree(small_disk) == before


# -- busybox ---------------------------------------------------------------------------------------


def test_busybox_is_reproducible_and_runs(store: ImageStore, tmp_path: Path) -> None:
    image = store.build_busybox()
    assert (image.name, image.tenant, image.config.cmd) == ("busybox:latest", "", ["sh"])
    other = ImageStore(tmp_path / "other").build_busybox()
    assert (other.digest, other.layers) == (image.digest, image.layers)
    with overlay(store, image, tmp_path / "o") as root:
        command = "id -un; whoami; cat /etc/passwd | wc -l; ls -ld /tmp | cut -c1-10; which ip nc ping"
        done = subprocess.run(["chroot", root, "sh", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["root", "root", "3", "drwxrwxrwt", "/sbin/ip", "/usr/bin/nc", "/bin/ping"]


# -- Debian ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "release", "kind", "why"),
    [
        ("fedora", None, Invalid, "fedora"),
        ("debian", "../../etc", Invalid, "does not parse"),
        ("debian", "--foo", Invalid, "does not parse"),
        ("debian", "nosuchrelease", Failed, "nosuchrelease"),
        ("debian", "bookworm", Failed, "bookworm"),  # tests have no network: the mirror is out of reach
    ],
)
def test_base_images_that_can_not_be_built(
    store: ImageStore, distribution: str, release: str | None, kind: type[InsulaError], why: str
) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    lines: list[str] = []
    with unchanged(store, why, kind):
        store.build_base(distribution, release, lines.append)
    assert bool(lines) == (kind is Failed)
    assert Path("/proc/self/mountinfo").read_text() == mounts
