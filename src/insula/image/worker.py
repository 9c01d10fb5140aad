"""The child process that decompresses and extracts one archive.

It is a process of its own so that it doesn't use the daemon's interpreter lock and memory, so that it can be killed,
and so that a crash affects only one import. It is killed with the thread that started it (PR_SET_PDEATHSIG). Before it
reads the archive it drops the privileges that extraction doesn't need (`insula.image.confine`).

The job is JSON on the standard input, with open descriptors; the result or the error is JSON on the standard output. It
runs as ``python -m insula.image.worker``; `run` is the parent's side.
"""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from insula.image import confine
from insula.image.layer import extract, set_opaque
from insula.image.limits import MEMORY, ExtractionLimits
from insula.image.tar import Reader
from insula.kernel import syscalls
from insula.model.errors import Failed, InsulaError, Invalid, from_dict

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

    from insula.image.job import Job

ZSTD_MEMORY = "--memory=512MB"
_SIGXCPU = 24


class ExtractionResult(NamedTuple):
    """The result of an extraction. `size` counts the bytes of the tar, `files` those of the files; `cpu` is in seconds.

    `blob_digest` and `blob_size` are of the repacked archive, if any. `notes` list what was left out.
    """

    diff_id: str
    size: int
    files: int
    entries: int
    opaque: list[str]
    notes: list[str]
    cpu: float
    blob_digest: str | None
    blob_size: int


class _ByteSource(Protocol):
    def read(self, n: int, /) -> bytes: ...


# -- the parent's side -----------------------------------------------------------------------------


def run(
    archive: BinaryIO,
    target: int,
    limits: ExtractionLimits,
    work: Job,
    *,
    plain: bool = False,
    whole: bool = False,
    repack: BinaryIO | None = None,
) -> ExtractionResult:
    """Extract `archive` into the empty directory `target` (a descriptor), in a child process of `work`.

    `plain`: an ordinary archive and not a layer. `whole`: the archive's end marker is required. The archive is written
    to `repack`, compressed with gzip. Invalid, Failed.
    """
    fds = [archive.fileno(), target, *([repack.fileno()] if repack else [])]
    job = {
        "archive": archive.fileno(),
        "target": target,
        "repack": repack.fileno() if repack else None,
        "limits": limits,
        "plain": plain,
        "whole": whole,
        "filter": base64.b64encode(confine.system_calls()).decode() if os.geteuid() == 0 else None,
    }
    child = start("insula.image.worker", fds)
    found = answer(child, *work.communicate(child, json.dumps(job).encode()), "extracts layers")
    result = ExtractionResult(**found)
    set_opaque(target, result.opaque)
    syscalls.syncfs(target)
    return result


def start(module: str, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a module that reads data from outside, with these descriptors, in namespaces of its own. Unavailable."""
    import subprocess

    try:
        return subprocess.Popen(
            [*(confine.NAMESPACES if os.geteuid() == 0 else ()), sys.executable, "-s", "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=fds,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    except FileNotFoundError as e:
        raise confine.missing(e) from None


def answer(child: subprocess.Popen[bytes], out: bytes, err: bytes, does: str) -> dict[str, Any]:
    """The result that a child has printed; `does` is its work. Raises the child's error; Failed if it has ended
    without an answer."""
    try:
        found: dict[str, Any] = json.loads(out)
        if "error" not in found:
            return found
    except (ValueError, TypeError):
        if child.returncode < 0:
            why = f"was killed by signal {-child.returncode}"
        elif err.startswith(b"unshare: sigprocmask"):  # its exit status if SIGKILL killed its child
            why = "was killed"
        else:
            why = f"ended with status {child.returncode}: {err.decode(errors='replace').strip()[-200:]!r}"
        raise Failed(f"the process that {does} {why}", "try again; see the log of insulad") from None
    raise from_dict(found)


# -- the child's side ------------------------------------------------------------------------------


class Meter:
    """A reader that hashes and counts, and raises Invalid beyond `limit` bytes."""

    def __init__(self, source: _ByteSource, limit: int, copy: gzip.GzipFile | None = None) -> None:
        self._source, self._limit, self._copy = source, limit, copy
        self._hash = hashlib.sha256()
        self.size = 0

    def read(self, n: int) -> bytes:
        """Return `n` bytes, fewer only at the end of the stream."""
        pieces, missing = [], n
        while missing and (piece := self._piece(missing)):
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, n: int) -> bytes:
        try:
            piece = self._source.read(n)
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as e:
            raise Invalid(f"the archive does not decompress: {e}", "it is damaged: fetch or make it again") from None
        self.size += len(piece)
        if self.size > self._limit:
            raise Invalid(f"the archive expands to more than {self._limit} bytes", "this may be a decompression bomb")
        self._hash.update(piece)
        if self._copy is not None:
            self._copy.write(piece)
        return piece

    def drain(self) -> None:
        """Read to the end: bytes after the archive's end marker are part of its digest."""
        while self.read(1 << 18):
            pass

    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


class _HashingFile:
    """A file for the repacked archive, which hashes its content."""

    def __init__(self, fd: int) -> None:
        self._file = open(fd, "wb", closefd=False)  # noqa: SIM115
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        return f"sha256:{self._hash.hexdigest()}"


def compression(head: bytes) -> str | None:
    """Return "gzip", "zstd" or "xz" by the first bytes of a file; None for others, which are uncompressed."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
    return "xz" if head.startswith(b"\xfd7zXZ\0") else None


class _Gzip(io.RawIOBase):
    """The content of a gzip file of any number of members (RFC 1952), with zeros after a member as padding.

    Python's GzipFile reads padding byte by byte, which is slow.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._input = b""
        self._member: Any = None
        self._members = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while self._member is not None or self._next_member():
            data = self._member.decompress(self._input, len(target))
            self._input = self._member.unconsumed_tail or self._member.unused_data
            if self._member.eof:
                self._member = None
            elif not data and not self._input:
                self._input = self._file.read(_CHUNK)
                if not self._input:
                    raise EOFError("it is cut off")
            if data:
                target[: len(data)] = data
                return len(data)
        return 0

    def _next_member(self) -> bool:
        while True:
            self._input = self._input.lstrip(b"\0") if self._members else self._input
            if self._input:
                break
            self._input = self._file.read(_CHUNK)
            if not self._input:
                return False
        self._members += 1
        self._member = zlib.decompressobj(31)
        return True


_CHUNK = 1 << 16


def _open(fd: int) -> tuple[_ByteSource, subprocess.Popen[bytes] | None]:
    """Open the uncompressed stream of the archive `fd`; zstd(1) decompresses zstd, which Python 3.11 lacks."""
    kind = compression(os.pread(fd, 6, 0))
    file = open(fd, "rb", closefd=False)  # noqa: SIM115
    if kind == "gzip":
        return io.BufferedReader(_Gzip(file), 1 << 18), None
    if kind == "xz":
        return lzma.LZMAFile(file), None
    if kind == "zstd":
        tool = confine.start(["zstd", "-dcq", ZSTD_MEMORY], fd)
        assert tool.stdout is not None
        return tool.stdout, tool
    return file, None


def _extract(job: dict[str, Any]) -> ExtractionResult:
    limits, archive, target = ExtractionLimits(*job["limits"]), job["archive"], job["target"]
    os.lseek(archive, 0, os.SEEK_SET)
    source, tool = _open(archive)
    repacked = packer = None
    if job["repack"] is not None:
        repacked = _HashingFile(job["repack"])
        packer = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=repacked, mtime=0)
    meter = Meter(source, limits.tar, packer)
    if job["filter"] is not None:
        confine.enter(target, base64.b64decode(job["filter"]))
    reader = Reader(meter.read)
    try:
        made = extract(reader, target, limits, plain=job["plain"])
        if job["whole"] and not reader.finished:
            raise Invalid("the archive is empty or cut off", "fetch or make it again, with tar")
        meter.drain()
        if tool is not None and (status := tool.wait()) != 0:
            if status == -_SIGXCPU:
                _out_of_time()
            raise Invalid("the archive does not decompress", "it is damaged: fetch or make it again")
        if packer is not None:
            packer.close()
        blob = repacked.finish() if repacked is not None else None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed("the disk is full while extracting a layer", "free some space: insula image rm") from e
        raise Failed(f"extracting a layer failed: {e.strerror}", "see the log of insulad") from e
    return ExtractionResult(
        meter.digest(),
        meter.size,
        made.bytes,
        made.entries,
        made.opaque,
        made.notes,
        sum(os.times()[:4]),
        blob,
        repacked.size if repacked is not None else 0,
    )


def _out_of_time(*_: object) -> None:
    raise Invalid("the archive takes too much processor time", "it is too large, or hostile")


def main() -> None:
    """Read the job, run it, and print the result."""
    import signal

    job = json.load(sys.stdin)
    confine.end_with_parent()
    signal.signal(signal.SIGXCPU, _out_of_time)
    confine.limit(ExtractionLimits(*job["limits"]))
    os.umask(0)
    try:
        result: dict[str, Any] = _extract(job)._asdict()
    except InsulaError as e:
        result = dict(e.to_dict())
    except MemoryError:
        result = dict(
            Invalid(f"the archive needs more than {MEMORY} bytes of memory", "this is not allowed here").to_dict()
        )
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
