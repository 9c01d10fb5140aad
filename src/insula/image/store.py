"""The image store, content-addressed: every object is complete or absent.

    root/blobs/sha256/<hex>    manifests, configurations and layers as distributed
    root/layers/<hex>/         layers by DiffID, extracted for overlayfs
    root/erofs/<hex>           all layers of the manifest <hex> in one file, for virtual machines; made when needed
    root/disks/<hex>           disk images of virtual machines, sparse, by the digest of `disk.convert`
    root/diffs/<hex>           JSON: the verified DiffID and size of the layer blob <hex>
    root/tmp/                  staging: incomplete objects, and objects being removed
    root/lock                  held by publishing and by garbage collection

Work is done in a staging directory, and then everything is renamed to its name, the manifest last. So an object with a
name is complete, also after a crash. Objects without references are removed by `collect`. Layers are shared between
tenants, because equal digests mean equal content.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from insula.image import archive, builtin, erofs, manifest, registry
from insula.image.blobs import Blobs, disk_errors, hex_of, sync_directory, write
from insula.image.disk.convert import DiskFormat
from insula.image.egress import Egress
from insula.image.image_import import Diff, ImageImport, extracted
from insula.image.job import Job
from insula.image.layer import XATTR_OPAQUE
from insula.image.limits import MAX_DOCUMENT, MAX_ENTRIES, MAX_SIZE, Budget
from insula.image.manifest import Manifest
from insula.image.reference import check_digest, normalise_reference, parse
from insula.image.registry import Auth, Progress
from insula.image.staging import disk_usage, remove_later, staging, sweep
from insula.model.disk_images import DevicesKind, Firmware
from insula.model.errors import Failed, Invalid, NotFound
from insula.model.objects import Image, ImageConfig

__all__ = ["Auth", "ImageStore", "normalise_reference"]

GRACE = 600.0  # seconds for the caller to record an image


def _silent(_line: str) -> None:
    pass


class ImageStore:
    """The images below the directory `root`. All methods block, and may be called from any thread.

    `max_size` limits the sums of one import's blobs, tars and files, `max_entries` the number of its files. Methods
    that take long have a `Job`, by which they can be cancelled. A method that fails leaves nothing behind.
    """

    def __init__(self, root: Path, *, max_size: int = MAX_SIZE, max_entries: int = MAX_ENTRIES) -> None:
        self.root, self.max_size, self.max_entries = root, max_size, max_entries
        self.blobs = Blobs(root / "blobs" / "sha256")
        self._layers, self._diffs, self._tmp = root / "layers", root / "diffs", root / "tmp"
        self._erofs, self._disks = root / "erofs", root / "disks"
        self._mutex = threading.Lock()  # for the two below
        self._held: Counter[str] = Counter()  # digests that running work uses
        self._recent: dict[str, list[float]] = {}  # manifests that callers have not recorded yet, with times
        with disk_errors("preparing the image store"):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for directory in (self.blobs.directory, self._layers, self._erofs, self._disks, self._diffs, self._tmp):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Remove the remains of interrupted work. This may take long."""
        sweep(self._tmp)

    # -- images come in --------------------------------------------------------------------

    def import_rootfs(
        self,
        tar: BinaryIO | Path,
        *,
        name: str,
        tenant: str,
        config: ImageConfig | None = None,
        created: float | None = None,
        comment: str = "insula image import",
        own: Collection[str] | None = None,
        job: Job | None = None,
    ) -> Image:
        """Import the tar of a root file system, plain or with gzip, xz or zstd, as an image of one layer; `own` is as
        for `load`."""
        name = normalise_reference(name)
        config = config or ImageConfig()
        manifest.check_config(config)
        with self._start_import("importing an image", job or Job(), own) as importing, ExitStack() as stack:
            file = stack.enter_context(_open_file(tar)) if isinstance(tar, Path) else tar
            layer = importing.pack(file, received=True)
            diff_ids = [importing.diffs[layer.digest].diff_id]
            when = time.time() if created is None else created
            document = manifest.write_configuration(config, diff_ids, when, comment)
            image = importing.describe(document, [layer], name, tenant)
            self._publish(importing, [image])
            return image

    def import_disk(
        self,
        disk: BinaryIO | Path,
        *,
        name: str,
        tenant: str,
        kind: DiskFormat,
        firmware: Firmware | None = None,
        devices: DevicesKind = "para",
        job: Job | None = None,
    ) -> Image:
        """Import a disk image of a virtual machine. `devices` are those that its instances have by default; without
        `firmware` it is guessed."""
        name, own = normalise_reference(name), ()  # so that its time does not tell whether others have the disk
        with self._start_import("importing a disk image", job or Job(), own) as importing, ExitStack() as stack:
            file = stack.enter_context(_open_file(disk)) if isinstance(disk, Path) else disk
            image = importing.take_disk(file, kind, firmware, devices, name, tenant)
            self._publish(importing, [image])
            return image

    def load(
        self,
        path: Path,
        *,
        tenant: str,
        name: str | None = None,
        own: Collection[str] | None = None,
        job: Job | None = None,
    ) -> list[Image]:
        """Import all images for this machine in an OCI layout (directory or tar) or a docker-archive.

        They keep their names; `name` is for an archive of one image, and the default is its digest. `own` are the
        digests of images whose layers need not be extracted again; None means every image. NotFound if there is no such
        file.
        """
        name = normalise_reference(name) if name is not None else None
        with self._start_import("loading an image", job or Job(), own) as importing, ExitStack() as stack:
            if path.is_dir():
                importing.receive(_tree_size(path))
            else:
                file = stack.enter_context(_open_file(path))
                importing.receive(os.fstat(file.fileno()).st_size)
                path = importing.directory / "archive"
                importing.extract(file, path, plain=True, whole=True)
            tree = stack.enter_context(archive.ArchiveTree(path))
            images = importing.load(tree, tenant, name)
            self._publish(importing, images)
            return images

    def pull(
        self,
        reference: str,
        *,
        tenant: str,
        name: str | None = None,
        auth: Auth | None = None,
        insecure: bool = False,
        progress: Progress | None = None,
        egress: Egress | None = None,
        own: Collection[str] | None = None,
        job: Job | None = None,
    ) -> Image:
        """Pull the image `reference` from its registry, and store it as `name` or under its own name.

        `insecure` accepts plain HTTP and any certificate, `egress` is the network (None is the host's), and `own` is as
        for `load`. NotFound, Denied, Unavailable.
        """
        wanted = parse(reference)
        name = normalise_reference(name) if name is not None else wanted.familiar
        job = job or Job()
        with self._start_import("pulling an image", job, own) as importing:
            directory = importing.directory / "pull"
            access = registry.Access(auth, insecure, progress or _silent, job, egress)
            registry.pull(wanted, directory, self._most(job), access)
            importing.receive(_tree_size(directory))
            (progress or _silent)("Extracting layers")
            with archive.ArchiveTree(directory) as tree:
                data = tree.read("manifest.json", MAX_DOCUMENT)
                image = importing.admit(data, lambda digest: tree.open(hex_of(digest)), name, tenant)
            self._publish(importing, [image])
            return image

    def build_busybox(self) -> Image:
        """Build ``busybox:latest``, shared by all tenants, from Debian's busybox-static, reproducibly."""
        with disk_errors("building busybox"), staging(self._tmp) as directory:
            builtin.write_busybox(directory / "rootfs.tar")
            return self.import_rootfs(
                directory / "rootfs.tar",
                name="busybox:latest",
                tenant="",
                config=builtin.BUSYBOX_CONFIG,
                created=0.0,
                comment="insula: busybox-static",
            )

    def build_base(
        self,
        distribution: str,
        release: str | None = None,
        progress: Progress | None = None,
        job: Job | None = None,
    ) -> Image:
        """Build ``debian:RELEASE``, shared by all tenants, with debootstrap(8) from the host's mirror."""
        with disk_errors("building a base image"), staging(self._tmp) as directory:
            job = job or Job()
            tar, name = builtin.write_base(directory, distribution, release, progress or _silent, job)
            (progress or _silent)("Importing the image")
            return self.import_rootfs(
                tar, name=name, tenant="", config=builtin.DEBIAN_CONFIG, comment=f"insula: debootstrap {name}", job=job
            )

    # -- images go out ---------------------------------------------------------------------

    def save(
        self,
        images: Sequence[Image],
        path: Path,
        *,
        format: Literal["oci", "docker"] = "oci",  # noqa: A002
        job: Job | None = None,
    ) -> None:
        """Write images to a tar at `path`: "oci" is an OCI layout; "docker" one that any `docker load` can read too."""
        if format not in ("oci", "docker"):
            raise Invalid(f"archives of the format {format!r} are not written", "use oci or docker")
        if not images:
            raise Invalid("there is no image to save", "name at least one")
        _refuse_disks(images)
        with disk_errors("saving an image"), self._holding(images):
            archive.write(self.blobs, images, path, job or Job(), docker=format == "docker")

    def push(
        self,
        image: Image,
        reference: str,
        *,
        auth: Auth | None = None,
        insecure: bool = False,
        progress: Progress | None = None,
        egress: Egress | None = None,
        job: Job | None = None,
    ) -> None:
        """Push the image unchanged to `reference` in its registry, through a network as for `pull`. Denied,
        Unavailable."""
        _refuse_disks([image])
        target = parse(reference)
        if target.digest:
            raise Invalid("an image can't be pushed to a digest", "push it to a tag")
        with disk_errors("pushing an image"), self._holding([image]), staging(self._tmp) as work:
            directory = work / "push"
            directory.mkdir()
            os.link(self.blobs.path(image.digest), directory / "manifest.json")
            parts = self._read_manifest(image.digest)
            for digest in {parts.config.digest, *(layer.digest for layer in parts.layers)}:
                os.link(self.blobs.path(digest), directory / hex_of(digest))
            access = registry.Access(auth, insecure, progress or _silent, job or Job(), egress)
            registry.push(directory, target, access)

    def lower(self, image: Image | Sequence[str]) -> list[Path]:
        """Return the directories of the layers, topmost first, for overlayfs's lowerdir. NotFound.

        An opaque layer ends the list. Of equal layers only the topmost is used: overlayfs refuses the same directory
        twice, and the lower one would be hidden.
        """
        found: list[Path] = []
        for diff_id in reversed(image.layers if isinstance(image, Image) else image):
            path = self._layers / hex_of(check_digest(diff_id))
            if path in found:
                continue
            if not path.is_dir():
                raise NotFound(f"layer {diff_id[:19]}… is not in the store", "pull or load the image again")
            found.append(path)
            if XATTR_OPAQUE in os.listxattr(path):
                break
        return found

    def machine_root(self, digest: str, layers: Sequence[str], job: Job | None = None) -> Path:
        """Return the file with the root file system of an image for virtual machines (erofs.py), and make it if it is
        not there. `digest` is its manifest's. NotFound, Unavailable, Failed."""
        path = self._erofs / hex_of(check_digest(digest))
        if path.exists():
            return path
        held = {digest, *layers}
        self._hold(held)
        try:
            with disk_errors("making the root of a machine"), staging(self._tmp) as directory:
                made = directory / "root"
                erofs.make(self.lower(layers), made, directory, job or Job())
                made.rename(path)
                sync_directory(self._erofs)
        finally:
            self._let_go(held)
        return path

    def disk(self, digest: str) -> Path:
        """Return the file of a disk image, sparse, which never changes. NotFound."""
        path = self._disks / hex_of(check_digest(digest))
        if not path.exists():
            raise NotFound(f"disk {digest[:19]}… is not in the store", "import it again")
        return path

    def content(self, digest: str) -> dict[str, int]:
        """Return what is stored for the image with the manifest `digest`, as in `Image.content`. NotFound."""
        parts, found = self._read_manifest(digest), {digest: self.blobs.path(digest).stat().st_size}
        for part in (parts.config, *parts.layers):
            found[part.digest] = part.size
            with suppress(FileNotFoundError):  # of the configuration, or of a layer that was removed by hand
                diff = msgspec.json.decode((self._diffs / hex_of(part.digest)).read_bytes(), type=Diff)
                found[extracted(diff.diff_id)] = diff.size
        return found

    # -- garbage ---------------------------------------------------------------------------

    def release(self, digest: str) -> None:
        """End the protection of a new image from `collect`: the caller has recorded `digest`, or doesn't use it."""
        with self._mutex:
            if times := self._recent.get(digest):
                times.pop()

    def collect(self, live: set[str]) -> int:
        """Remove everything that the manifests `live` don't refer to; returns the bytes freed on the disk.

        Running imports are protected, and images that were returned in the last ten minutes and not released.
        """
        with disk_errors("collecting garbage"), staging(self._tmp) as trash:
            empty = disk_usage(trash)
            with self._exclusive():
                needed = self._needed(live)
                for directory in (self.blobs.directory, self._diffs, self._layers, self._erofs, self._disks):
                    for path in [p for p in directory.iterdir() if f"sha256:{p.name}" not in needed]:
                        path.rename(trash / f"{directory.name}-{path.name}")
            return max(disk_usage(trash) - empty, 0)

    def _needed(self, live: set[str]) -> set[str]:
        now = time.monotonic()
        with self._mutex:
            fresh = {digest: [t for t in times if now - t < GRACE] for digest, times in self._recent.items()}
            self._recent = {digest: times for digest, times in fresh.items() if times}
            return set(self._held) | self._reachable(live | set(self._recent))

    def _reachable(self, manifests: set[str]) -> set[str]:
        found = set(manifests)
        for digest in manifests:
            try:
                parts = self._read_manifest(digest)
                found.update(part.digest for part in (parts.config, *parts.layers))
                data = self.blobs.read(parts.config.digest, MAX_DOCUMENT)
                found.update(manifest.read_configuration(data).diff_ids)
            except NotFound:
                continue  # of an image that was removed by hand
        return found

    # -- holding and publishing ------------------------------------------------------------

    def _most(self, job: Job) -> int:
        """The most bytes of an import."""
        return self.max_size if job.space is None else min(self.max_size, job.space)

    @contextmanager
    def _start_import(self, doing: str, job: Job, own: Collection[str] | None = None) -> Iterator[ImageImport]:
        """Make an import with a staging directory. Layers that it finds in the store are protected while it runs.

        It finds those of the images `own` only: how long an import takes must not tell what others have.
        """
        held: set[str] = set()
        visible = None if own is None else self._layers_of(own)

        def known(blob: str) -> Diff | None:
            if visible is not None and blob not in visible:
                return None
            with self._exclusive():
                try:
                    diff = msgspec.json.decode((self._diffs / hex_of(blob)).read_bytes(), type=Diff)
                except FileNotFoundError:
                    return None
                if not (self._layers / hex_of(diff.diff_id)).is_dir():
                    return None
                self._hold({diff.diff_id} - held)
                held.add(diff.diff_id)
                return diff

        with disk_errors(doing), staging(self._tmp) as directory:
            try:
                budget = Budget(self._most(job), self.max_entries)
                yield ImageImport(directory, budget, job, known, discreet=own is not None)
                job.check()
            finally:
                self._let_go(held)

    def _layers_of(self, manifests: Collection[str]) -> set[str]:
        """Return the digests of the layers of these images."""
        found: set[str] = set()
        for digest in manifests:
            with suppress(NotFound):  # of an image that is being removed
                found.update(layer.digest for layer in self._read_manifest(digest).layers)
        return found

    @contextmanager
    def _holding(self, images: Sequence[Image]) -> Iterator[None]:
        """Protect images while they are saved or pushed. NotFound."""
        with self._exclusive():
            for image in images:
                self._read_manifest(image.digest)
            held = self._reachable({image.digest for image in images})
            self._hold(held)
        try:
            yield
        finally:
            self._let_go(held)

    def _hold(self, digests: set[str]) -> None:
        with self._mutex:
            self._held.update(digests)

    def _let_go(self, digests: set[str]) -> None:
        with self._mutex:
            self._held.subtract(digests)
            self._held = +self._held

    def _publish(self, importing: ImageImport, images: Sequence[Image]) -> None:
        """Rename everything to its name, manifests last. On failure the renames are undone."""
        manifests = {image.digest for image in images}
        moves = [(path, self._layers / hex_of(diff_id)) for diff_id, path in importing.layers.items()]
        moves += [(path, self._disks / hex_of(digest)) for digest, path in importing.disks.items()]
        moves += [
            (path, self.blobs.path(digest)) for digest, path in importing.blobs.items() if digest not in manifests
        ]
        for digest, diff in importing.diffs.items():
            path = importing.directory / f"diff-{hex_of(digest)}"
            write(path, msgspec.json.encode(diff))
            moves.append((path, self._diffs / hex_of(digest)))
        moves += [(importing.blobs[digest], self.blobs.path(digest)) for digest in manifests]
        surplus = []
        with self._exclusive(), ExitStack() as undo:
            for source, target in moves:
                if target.exists():
                    surplus.append(source)
                else:
                    source.rename(target)
                    undo.callback(target.rename, source)
            for directory in (self._layers, self._disks, self._diffs, self.blobs.directory):
                sync_directory(directory)
            with self._mutex:
                for image in images:
                    self._recent.setdefault(image.digest, []).append(time.monotonic())
            undo.pop_all()
        if surplus and importing.discreet:  # the time of the answer must not tell that the store had them
            remove_later(self._tmp, surplus)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the store's lock; flock(2) also excludes other threads, because each opens the file itself."""
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _read_manifest(self, digest: str) -> Manifest:
        document = manifest.read_document(self.blobs.read(check_digest(digest), MAX_DOCUMENT))
        if not isinstance(document, Manifest):
            raise Failed(f"{digest[:19]}… is not the manifest of an image", "remove the image, and pull it again")
        return document


def _refuse_disks(images: Sequence[Image]) -> None:
    """Raise Invalid for disk images: they are not written to archives or registries."""
    if found := next((image.name for image in images if image.disk), None):
        raise Invalid(f"{found} is a disk image, which is not saved or pushed", "keep the file that it was made of")


def _tree_size(path: Path) -> int:
    """Return the sum of the sizes of all files below `path`, holes included."""
    return sum(entry.lstat().st_size for entry in path.rglob("*"))


def _open_file(path: Path) -> BinaryIO:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # don't block on a FIFO
    except (OSError, ValueError) as e:
        raise NotFound(f"{str(path)!r} can't be read: {e}", "give the path of an archive") from None
    if not os.path.isfile(f"/proc/self/fd/{fd}"):
        os.close(fd)
        raise Invalid(f"{str(path)!r} is not a regular file", "give the path of an archive")
    return open(fd, "rb")
