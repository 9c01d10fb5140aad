"""Archives of images: the OCI layout (image-layout.md), as a directory or tar, and the docker-archive of ``docker
save``.

An OCI layout has ``oci-layout``, ``index.json`` and ``blobs/sha256/…``. A docker-archive has ``manifest.json``, a list
of configurations with the paths of their layers. An archive can be both, as those that `write` makes for Docker:
engines since version 25 read the layout, older ones the list.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

import msgspec

from insula.image import manifest, platform
from insula.image.blobs import Blobs, digest_of, hex_of, sync_directory
from insula.image.job import Job
from insula.image.limits import MAX_DEPTH, MAX_DOCUMENT, MAX_DOCUMENTS, MAX_IMAGES
from insula.image.manifest import Descriptor, Index, Manifest
from insula.image.reference import normalise_reference
from insula.kernel import syscalls
from insula.model.errors import Invalid
from insula.model.objects import Image
from insula.model.units import shorten

REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


class DockerEntry(msgspec.Struct, frozen=True, rename="pascal"):
    """One image in the manifest.json of a docker-archive."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class ArchiveTree:
    """A directory in which links can't lead outside (openat2(2) RESOLVE_IN_ROOT)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> ArchiveTree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def open(self, path: str) -> BinaryIO:
        """Open a regular file. Invalid if it is missing or not a regular file."""
        try:
            fd = syscalls.openat2(
                self._fd,
                path,
                os.O_RDONLY | os.O_NONBLOCK,
                resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS,
            )
        except (OSError, ValueError):
            raise Invalid(f"{shorten(path)} is missing in the archive", "the archive is incomplete") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Invalid(f"{shorten(path)} in the archive is not a regular file", "the archive is damaged")
        return open(fd, "rb")

    def read(self, path: str, limit: int) -> bytes:
        with self.open(path) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise Invalid(f"{shorten(path)} in the archive is too large", f"at most {limit} bytes are read")
        return data

    def has(self, path: str) -> bool:
        try:
            os.stat(path, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return False
        return True


class OciLayout:
    """An OCI layout in a tree."""

    def __init__(self, tree: ArchiveTree) -> None:
        self._tree = tree
        self._documents = 0

    def open(self, digest: str) -> BinaryIO:
        return self._tree.open(f"blobs/sha256/{hex_of(digest)}")

    def images(self) -> list[tuple[bytes, str | None]]:
        """Return the manifests for this machine with their names."""
        index = manifest.read_document(self._tree.read("index.json", MAX_DOCUMENT))
        if not isinstance(index, Index):
            raise Invalid("the archive's index.json is not an index", "the archive is damaged")
        if len(index.manifests) > MAX_IMAGES:
            raise Invalid(f"the archive has {len(index.manifests)} images", f"at most {MAX_IMAGES} are loaded at once")
        found: list[tuple[bytes, str | None]] = []
        others: set[str] = set()
        for entry in index.manifests:
            data = self._choose(entry, 0, others)
            if data is not None:
                names = entry.annotations or {}
                found.append((data, names.get(CONTAINERD_NAME) or names.get(REF_NAME)))
        if not found:
            has = f" (it has {', '.join(sorted(others)[:8])})" if others else ""
            raise Invalid(
                f"the archive has no image for linux/{platform.architecture()}{has}", "use one made for this machine"
            )
        return found

    def _choose(self, entry: Descriptor, depth: int, others: set[str]) -> bytes | None:
        """Return the manifest for this machine that `entry` refers to, directly or through indexes."""
        if depth > MAX_DEPTH:
            raise Invalid("the archive's indexes are nested too deeply", "don't use this image")
        if not manifest.matches(entry.platform):
            assert entry.platform is not None
            others.add(shorten(f"{entry.platform.os}/{entry.platform.architecture}")[1:-1])
            return None
        if entry.media_type not in manifest.INDEXES | manifest.MANIFESTS:
            raise Invalid(f"{shorten(entry.media_type)} in the archive is not an image", "use an OCI or Docker image")
        self._documents += 1
        if self._documents > MAX_DOCUMENTS:
            raise Invalid("the archive has too many manifests", f"at most {MAX_DOCUMENTS} are read")
        with self.open(entry.digest) as file:
            data = file.read(MAX_DOCUMENT + 1)
        if digest_of(data) != entry.digest or len(data) != entry.size:
            raise Invalid(f"the manifest {entry.digest[:19]}… is damaged", "fetch the archive again")
        document = manifest.read_document(data)
        if isinstance(document, Manifest):
            return data
        for part in manifest.by_preference(document.manifests):
            if (chosen := self._choose(part, depth + 1, others)) is not None:
                return chosen
        return None


def read(tree: ArchiveTree) -> OciLayout | list[DockerEntry]:
    """Read a tree as an OCI layout or a docker-archive. Invalid if it is neither."""
    if tree.has("oci-layout") and tree.has("index.json"):
        return OciLayout(tree)
    if not tree.has("manifest.json"):
        raise Invalid(
            "the archive is neither an OCI layout nor a docker-archive",
            "for the tar of a root file system use: insula image import",
        )
    data = tree.read("manifest.json", MAX_DOCUMENT)
    try:
        entries = msgspec.json.decode(data, type=list[DockerEntry])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise Invalid(f"manifest.json does not parse: {shorten(str(e), 120)}", "the archive is damaged") from None
    if not 0 < len(entries) <= MAX_IMAGES:
        raise Invalid(f"the archive has {len(entries)} images", f"from 1 to {MAX_IMAGES} are loaded at once")
    return entries


def name_of(own: str | None, digest: str = "") -> str:
    """Return the name for an image of an archive: its own, or ``sha256:…`` without one."""
    return normalise_reference(own or digest)


# -- writing ---------------------------------------------------------------------------------------


def write(blobs: Blobs, images: Sequence[Image], path: Path, job: Job, *, docker: bool) -> None:
    """Write an OCI layout as tar, reproducibly; with `docker` it has a manifest.json too."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                _write_members(blobs, images, tar, job, docker)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_directory(path.parent)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


class _Checked(io.RawIOBase):
    """A file whose reads raise Cancelled when the job is cancelled."""

    def __init__(self, file: BinaryIO, job: Job) -> None:
        self._file, self._job = file, job

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._job.check()
        return self._file.read(size)


def _write_members(blobs: Blobs, images: Sequence[Image], tar: tarfile.TarFile, job: Job, docker: bool) -> None:
    descriptors: list[Descriptor] = []
    entries: dict[str, DockerEntry] = {}
    needed: set[str] = set()
    for image in images:
        data = blobs.read(image.digest, MAX_DOCUMENT)
        document = manifest.read_document(data)
        assert isinstance(document, Manifest)
        needed |= {image.digest, document.config.digest, *(layer.digest for layer in document.layers)}
        descriptors.append(
            Descriptor(
                media_type=document.media_type or manifest.OCI_MANIFEST,
                digest=image.digest,
                size=len(data),
                annotations={CONTAINERD_NAME: image.name, REF_NAME: image.name},
            )
        )
        before = entries.get(image.digest)
        entries[image.digest] = DockerEntry(
            config=_blob_path(document.config.digest),
            layers=[_blob_path(layer.digest) for layer in document.layers],
            repo_tags=[*((before.repo_tags or []) if before else []), image.name],
        )
    _add(tar, "oci-layout", LAYOUT)
    index = Index(schema_version=2, media_type=manifest.OCI_INDEX, manifests=descriptors)
    _add(tar, "index.json", manifest.write_document(index))
    if docker:
        _add(tar, "manifest.json", msgspec.json.encode(list(entries.values())))
    for digest in sorted(needed):
        with blobs.open(digest) as blob:
            _add_file(tar, _blob_path(digest), _Checked(blob, job), os.fstat(blob.fileno()).st_size)


def _blob_path(digest: str) -> str:
    return f"blobs/sha256/{hex_of(digest)}"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    _add_file(tar, name, io.BytesIO(data), len(data))


def _add_file(tar: tarfile.TarFile, name: str, source: IO[bytes] | _Checked, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    if size >= 1 << 33:  # beyond ustar's octal digits
        tar.format = tarfile.GNU_FORMAT
    tar.addfile(member, source)
