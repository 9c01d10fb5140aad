"""Import of an image into a staging directory: verify every blob, and extract every layer.

The manifest has the digests of the configuration and of the blobs, and the configuration has the DiffIDs; all are
checked, the DiffIDs on the extracted content. An import must contain all blobs of the image. So a tenant can't get
content of another tenant's image through a digest that it knows.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from insula.image import archive, manifest, worker
from insula.image.blobs import copy, digest_of, hex_of, write
from insula.image.disk import worker as disk_worker
from insula.image.disk.convert import DiskFormat
from insula.image.job import Job
from insula.image.limits import EXTRACTIONS, MAX_DOCUMENT, MAX_LAYERS, PATIENCE, Budget
from insula.image.manifest import Descriptor, Manifest
from insula.image.platform import architecture
from insula.image.staging import remove
from insula.model.disk_images import DevicesKind, DiskRoot, Firmware, Media
from insula.model.errors import Failed, Invalid
from insula.model.objects import Image, ImageConfig

Fetch = Callable[[str], BinaryIO]  # opens the blob of a digest at the source of the image
_extractions = threading.BoundedSemaphore(EXTRACTIONS)
_POLL = 0.2  # seconds between two looks whether the job was cancelled


class Diff(msgspec.Struct, frozen=True):
    """The verified properties of a layer blob: digest and size of its tar. `notes` list what was left out of it."""

    diff_id: str
    size: int
    notes: list[str] = []


class ImageImport:
    """A running import. Its results so far are in `blobs`, `layers` (by DiffID), `diffs` (by blob) and `disks`.

    `known` returns the properties of a layer blob that the store has verified before, and protects that layer from
    garbage collection. `discreet`: its time must not tell what the store has.
    """

    def __init__(
        self,
        directory: Path,
        budget: Budget,
        job: Job,
        known: Callable[[str], Diff | None],
        *,
        discreet: bool = False,
    ) -> None:
        self.directory, self._budget, self._job, self._known = directory, budget, job, known
        self.discreet = discreet
        self.blobs: dict[str, Path] = {}
        self.layers: dict[str, Path] = {}
        self.diffs: dict[str, Diff] = {}
        self.disks: dict[str, Path] = {}
        self._packed: dict[tuple[int, int], Descriptor] = {}  # by device and inode

    def receive(self, size: int, *, sparse: bool = False) -> None:
        """Record that `size` bytes were received: the limits of extracted bytes and of time depend on it."""
        self._budget.receive(size, sparse=sparse)
        self._job.limit(PATIENCE * self._budget.seconds)

    # -- whole images ----------------------------------------------------------------------

    def load(self, tree: archive.ArchiveTree, tenant: str, name: str | None) -> list[Image]:
        """Import the images of an unpacked archive; `name` is for an archive of one. The default is its digest."""
        found = archive.read(tree)
        if isinstance(found, archive.OciLayout):
            entries = found.images()
            _check_single(name, len(entries))
            return [
                self.admit(data, found.open, name or archive.name_of(own, digest_of(data)), tenant)
                for data, own in entries
            ]
        _check_single(name, len(found))
        return [image for entry in found for image in self._load_docker(tree, entry, tenant, name)]

    def _load_docker(
        self, tree: archive.ArchiveTree, entry: archive.DockerEntry, tenant: str, name: str | None
    ) -> list[Image]:
        config = tree.read(entry.config, MAX_DOCUMENT)
        manifest.check_platform(manifest.read_configuration(config))
        if len(entry.layers) > MAX_LAYERS:
            raise Invalid(f"the image has {len(entry.layers)} layers", f"at most {MAX_LAYERS} are possible: squash it")
        own: list[str | None] = list(entry.repo_tags or []) if name is None else [name]
        names = [archive.name_of(each) for each in own] or [archive.name_of(None, digest_of(config))]
        layers = []
        for path in entry.layers:
            with tree.open(path) as file:
                layers.append(self._pack_once(file))
        return [self.describe(config, layers, each, tenant) for each in dict.fromkeys(names)]

    def _pack_once(self, file: BinaryIO) -> Descriptor:
        """Do `pack` once for a file that has several names or is a layer of several images."""
        found = os.fstat(file.fileno())
        key = (found.st_dev, found.st_ino)
        if key not in self._packed:
            self._packed[key] = self.pack(file)
        return self._packed[key]

    def admit(self, data: bytes, fetch: Fetch, name: str, tenant: str) -> Image:
        """Import the image with the manifest `data`; its blobs come from `fetch`. Invalid."""
        document = manifest.read_document(data)
        if not isinstance(document, Manifest):
            raise Invalid("the image is an index where a manifest was expected", "this is not an image")
        if document.is_disk:
            raise Invalid("the image is a disk of a virtual machine", "import the disk: `insula image import --vm`")
        parts = (document.config, *document.layers)
        if (size := sum({part.digest: part.size for part in parts}.values())) > self._budget.max_size:
            raise Invalid(f"the image is {size} bytes large", self._budget.hint)
        for part in parts:
            self._take_blob(part, fetch)
        configuration = manifest.read_configuration(self.blobs[document.config.digest].read_bytes())
        manifest.check_platform(configuration)
        if len(configuration.diff_ids) != len(document.layers):
            raise Invalid(
                f"the image has {len(document.layers)} layers, and its configuration {len(configuration.diff_ids)}",
                "the image is damaged",
            )
        size, content = 0, {part.digest: part.size for part in parts}
        notes: dict[str, None] = {}
        for layer, diff_id in zip(document.layers, configuration.diff_ids, strict=True):
            diff = self._take_layer(layer, diff_id)
            size += diff.size
            content[extracted(diff_id)] = diff.size
            notes.update(dict.fromkeys(diff.notes))
        return Image(
            tenant=tenant,
            name=name,
            digest=self._add_document(data),
            config_digest=document.config.digest,
            layers=configuration.diff_ids,
            size=size,
            config=configuration.config,
            architecture=configuration.architecture,
            created=time.time(),
            notes=[*notes, *configuration.notes],
            content={digest_of(data): len(data), **content},
        )

    def describe(self, config: bytes, layers: list[Descriptor], name: str, tenant: str) -> Image:
        """Write a manifest for a configuration and packed layers, and import it."""
        document = Manifest(
            schema_version=2,
            media_type=manifest.OCI_MANIFEST,
            config=Descriptor(media_type=manifest.OCI_CONFIG, digest=self._add_document(config), size=len(config)),
            layers=layers,
        )
        return self.admit(manifest.write_document(document), _no_more_blobs, name, tenant)

    def take_disk(
        self, file: BinaryIO, kind: DiskFormat, firmware: Firmware | None, devices: DevicesKind, name: str, tenant: str
    ) -> Image:
        """Import a disk image of a virtual machine, which is received now. Its manifest has one layer, the disk, and
        equal disks have equal manifests. Without `firmware` it is guessed from the disk. Invalid."""
        self.receive(os.fstat(file.fileno()).st_size, sparse=True)
        path, empty = self.directory / "disk", self.directory / "empty"
        empty.mkdir()
        fd = os.open(empty, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with open(path, "x+b") as target, self._extracting():
                os.fchmod(target.fileno(), 0o400)
                made = disk_worker.run(file, target, fd, kind, self._budget.limits(), self._job)
        finally:
            os.close(fd)
        self._budget.spend(tar=made.stored, files=made.stored, entries=1, cpu=made.cpu)
        self.disks[made.digest] = path
        firmware = firmware or made.firmware
        media: Media = "cdrom" if kind == "iso" else "disk"
        config = self._add_document(manifest.write_configuration(ImageConfig(), [made.digest], 0.0, "a disk image"))
        document = Manifest(
            schema_version=2,
            media_type=manifest.OCI_MANIFEST,
            config=Descriptor(media_type=manifest.OCI_CONFIG, digest=config, size=self.blobs[config].stat().st_size),
            layers=[Descriptor(media_type=manifest.DISK_LAYER, digest=made.digest, size=made.stored)],
            annotations={"insula.firmware": firmware, "insula.devices": devices, "insula.media": media},
        )
        data = manifest.write_document(document)
        content = {config: document.config.size, digest_of(data): len(data), made.digest: made.stored}
        return Image(
            tenant=tenant,
            name=name,
            digest=self._add_document(data),
            config_digest=config,
            layers=[],
            size=made.size,
            config=ImageConfig(),
            architecture=architecture(),
            created=time.time(),
            content=content,
            disk=DiskRoot(digest=made.digest, size=made.size, firmware=firmware, devices=devices, media=media),
        )

    # -- parts -----------------------------------------------------------------------------

    def pack(self, source: BinaryIO, *, received: bool = False) -> Descriptor:
        """Import a layer's tar without digest: unchanged with gzip or zstd, else compressed with gzip.

        `received`: it comes from outside, and was not counted before.
        """
        place = Path(tempfile.mkdtemp(dir=self.directory))
        spool, packed, target = place / "spool", place / "packed", place / "tree"
        digest, size = copy(source, spool, limit=self._budget.blobs, job=self._job)
        if received:
            self.receive(size)
        path = spool
        with open(spool, "rb") as file:
            kind = worker.compression(file.read(6))
            if kind in ("gzip", "zstd"):
                result = self.extract(file, target, whole=True)
            else:
                kind, path = "gzip", packed
                with open(packed, "xb") as out:
                    result = self.extract(file, target, whole=True, repack=out)
                spool.unlink()
                digest, size = result.blob_digest or "", result.blob_size
        self._keep_blob(digest, path, size)
        self._keep_layer(result.diff_id, target)
        self.diffs[digest] = Diff(result.diff_id, result.size, result.notes)
        return Descriptor(media_type=f"{manifest.OCI_LAYER}+{kind}", digest=digest, size=size)

    def extract(
        self, file: BinaryIO, target: Path, *, plain: bool = False, whole: bool = False, repack: BinaryIO | None = None
    ) -> worker.ExtractionResult:
        """Extract an archive into the new directory `target`, in a child process; see `worker.run`."""
        target.mkdir()
        target.chmod(0o755)
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            limits = self._budget.limits()
            with self._extracting():
                result = worker.run(file, fd, limits, self._job, plain=plain, whole=whole, repack=repack)
        finally:
            os.close(fd)
        if plain:  # the images in it are counted separately
            self._budget.spend(tar=0, files=0, entries=result.entries, cpu=result.cpu)
        else:
            self._budget.spend(tar=result.size, files=result.files, entries=result.entries, cpu=result.cpu)
        return result

    @contextmanager
    def _extracting(self) -> Iterator[None]:
        """Wait while too many archives are being extracted."""
        while not _extractions.acquire(timeout=_POLL):
            self._job.check()
        try:
            yield
        finally:
            _extractions.release()

    def _take_blob(self, part: Descriptor, fetch: Fetch) -> None:
        if part.digest not in self.blobs:
            path = self.directory / f"blob-{hex_of(part.digest)}"
            with fetch(part.digest) as source:
                copy(source, path, limit=part.size, digest=part.digest, job=self._job)
            self._keep_blob(part.digest, path, part.size)
        if (size := self.blobs[part.digest].stat().st_size) != part.size:
            raise Invalid(f"blob {part.digest[:19]}… has {size} bytes, not {part.size}", "the image is damaged")

    def _take_layer(self, layer: Descriptor, diff_id: str) -> Diff:
        """Extract the layer unless it is known, and check its DiffID."""
        diff = self.diffs.get(layer.digest) or self._known(layer.digest)
        if diff is None:
            target = self.directory / f"layer-{hex_of(layer.digest)}"
            with open(self.blobs[layer.digest], "rb") as file:
                result = self.extract(file, target)
            diff = Diff(result.diff_id, result.size, result.notes)
            self._keep_layer(diff.diff_id, target)
        if diff.diff_id != diff_id:
            raise Invalid(
                f"layer {layer.digest[:19]}… has the DiffID {diff.diff_id[:19]}…, not what the configuration says",
                "the image is damaged, or was tampered with",
            )
        self.diffs[layer.digest] = diff
        return diff

    def _keep_blob(self, digest: str, path: Path, size: int) -> None:
        if digest in self.blobs:
            path.unlink()
        else:
            self._budget.keep(size)
            self.blobs[digest] = path

    def _keep_layer(self, diff_id: str, target: Path) -> None:
        if diff_id in self.layers:
            remove(target)
        else:
            self.layers[diff_id] = target

    def _add_document(self, data: bytes) -> str:
        digest = digest_of(data)
        if digest not in self.blobs:
            path = self.directory / f"blob-{hex_of(digest)}"
            write(path, data)
            self._keep_blob(digest, path, len(data))
        return digest


def extracted(diff_id: str) -> str:
    """Return the key of an extracted layer in `Image.content`: an uncompressed blob has the same digest."""
    return f"layer/{diff_id}"


def _check_single(name: str | None, count: int) -> None:
    if name is not None and count != 1:
        raise Invalid(f"the archive has {count} images, which can't all be {name}", "load it without a name")


def _no_more_blobs(digest: str) -> BinaryIO:
    raise Failed(f"blob {digest[:19]}… was not staged", "this is a mistake in Insula: please report it")
