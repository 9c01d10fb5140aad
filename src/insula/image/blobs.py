"""Files named by the sha256 of their content, as in an OCI layout: ``blobs/sha256/<hex>``.

A blob is written under a temporary name while it is hashed, synced, and renamed. So a file with that name has the whole
content, also after a power failure. Blobs never change, so readers need no lock.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from insula.image.job import Job
from insula.image.limits import check_room
from insula.model.errors import Failed, InsulaError, Invalid, NotFound

CHUNK = 1 << 20


def digest_of(data: bytes) -> str:
    """Return the digest of `data` in the notation of the image-spec."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def hex_of(digest: str) -> str:
    """Return the file name of a digest that was checked before."""
    return digest.removeprefix("sha256:")


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Convert an OSError in the block to `Failed`; a full disk has a message of its own."""
    try:
        yield
    except InsulaError:
        raise
    except OSError as e:
        raise failure(e, doing) from e


def failure(e: OSError, doing: str) -> Failed:
    """Return the `Failed` for an OSError that occurred while `doing`."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed(f"the disk is full while {doing}", "free some space, for example with: insula image rm")
    return Failed(f"{doing} failed: {os.strerror(e.errno or 0)}", "see the log of insulad")


def copy(source: BinaryIO, target: Path, *, limit: int, digest: str | None = None, job: Job) -> tuple[str, int]:
    """Copy `source` to the new file `target`, and sync it; returns its digest and size.

    Invalid if there are more than `limit` bytes or if the digest is not `digest`; Cancelled with the job.
    """
    hasher, size = hashlib.sha256(), 0
    with open(target, "xb", buffering=0) as out:
        while chunk := source.read(CHUNK):
            job.check()
            check_room(out.fileno(), "copying an image")
            size += len(chunk)
            if size > limit:
                raise Invalid(f"more than {limit} bytes", "use a smaller image")
            hasher.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[out.write(view) :]
        os.fsync(out.fileno())
    found = f"sha256:{hasher.hexdigest()}"
    if digest is not None and found != digest:
        raise Invalid(f"blob {digest[:19]}… has the digest {found[:19]}…", "the image is damaged, or was tampered with")
    return found, size


def write(target: Path, data: bytes) -> None:
    """Write a small new file, and sync it."""
    with open(target, "xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync_directory(directory: Path) -> None:
    """Sync a directory (fsync(2)), which makes renames into it durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Blobs:
    """The blobs in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, digest: str) -> Path:
        return self.directory / hex_of(digest)

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).exists()

    def open(self, digest: str) -> BinaryIO:
        """Open a blob. NotFound."""
        try:
            return open(self.path(digest), "rb")
        except FileNotFoundError:
            raise NotFound(f"blob {digest[:19]}… is not in the store", "pull or load the image again") from None

    def read(self, digest: str, limit: int) -> bytes:
        """Read a small blob, and verify its digest again. NotFound, Failed."""
        with self.open(digest) as blob:
            data = blob.read(limit + 1)
        if len(data) > limit or digest_of(data) != digest:
            raise Failed(f"blob {digest[:19]}… is damaged on disk", "remove the image, and pull or load it again")
        return data
