"""Images for tests, also broken and hostile ones, made byte by byte; and descriptions of file trees."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from insula.image.job import Job
from tests.support.wait import until

OCI = "application/vnd.oci.image."
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def member(
    name: str, data: bytes | None = None, *, kind: bytes | None = None, **fields: Any
) -> tuple[tarfile.TarInfo, bytes]:
    """A member of an archive; a file with `data`, a link with `linkname`, else a directory."""
    info = tarfile.TarInfo(name)
    info.type = kind or (
        tarfile.REGTYPE if data is not None else tarfile.SYMTYPE if "linkname" in fields else tarfile.DIRTYPE
    )
    info.mode = 0o755 if info.type == tarfile.DIRTYPE else 0o644
    info.size = len(data or b"")
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data or b""


def tar(*members: tuple[tarfile.TarInfo, bytes], end: bool = True, format: Literal[0, 1, 2] = 2) -> bytes:  # noqa: A002
    """An archive of exactly these members, whatever their names are."""
    pieces = (info.tobuf(format, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512) for info, data in members)
    return b"".join(pieces) + (bytes(1024) if end else b"")


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def descriptor(data: bytes, kind: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest(data), "size": len(data), **more}


class Layout:
    """An OCI layout under construction: `blobs` by digest, and the `index`."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.index: dict[str, Any] = {"schemaVersion": 2, "manifests": []}

    def blob(self, data: bytes, kind: str, **more: Any) -> dict[str, Any]:
        """Adds a blob; its descriptor."""
        self.blobs[digest(data)] = data
        return descriptor(data, kind, **more)

    def document(self, value: Any, kind: str, **more: Any) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), kind, **more)

    def image(
        self,
        layers: Sequence[bytes],
        *,
        config: dict[str, Any] | None = None,
        manifest: dict[str, Any] | None = None,
        process: dict[str, Any] | None = None,
        name: str | None = "test:latest",
        listed: bool = True,
        **more: Any,
    ) -> dict[str, Any]:
        """Adds an image of gzipped layer tars; `config` and `manifest` override fields. Its descriptor."""
        document = {
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": process or {},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
            **(config or {}),
        }
        body = {
            "schemaVersion": 2,
            "mediaType": OCI + "manifest.v1+json",
            "config": self.document(document, OCI + "config.v1+json"),
            "layers": [self.blob(gzip.compress(layer, 1, mtime=0), OCI + "layer.v1.tar+gzip") for layer in layers],
            **(manifest or {}),
        }
        if name is not None:
            more["annotations"] = {"org.opencontainers.image.ref.name": name}
        entry = self.document(body, OCI + "manifest.v1+json", **more)
        if listed:
            self.index["manifests"].append(entry)
        return entry

    def write(self, path: Path) -> Path:
        """The layout as a directory."""
        blobs = path / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (path / "index.json").write_text(json.dumps(self.index))
        for name, data in self.blobs.items():
            (blobs / name.removeprefix("sha256:")).write_bytes(data)
        return path

    def tar(self) -> bytes:
        """The layout as an archive."""
        files = {"oci-layout": b"{}", "index.json": json.dumps(self.index).encode()}
        files |= {f"blobs/sha256/{name.removeprefix('sha256:')}": data for name, data in self.blobs.items()}
        return tar(*(member(name, data) for name, data in files.items()))


def docker_archive(entries: Iterable[dict[str, Any]], files: dict[str, bytes]) -> bytes:
    """A docker-archive with this manifest.json."""
    everything = {"manifest.json": json.dumps(list(entries)).encode(), **files}
    return tar(*(member(name, data) for name, data in everything.items()))


def tree(path: Path) -> dict[str, tuple[object, ...]]:
    """Everything about everything below `path`: kinds, modes, owners, times, contents, links, attributes."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(os.fsencode(path)):
        for name in [b".", *names, *files] if directory == os.fsencode(path) else [*names, *files]:
            full = os.path.join(directory, name)
            status = os.lstat(full)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = digest(Path(os.fsdecode(full)).read_bytes())
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(full)
            names_ = os.listxattr(full, follow_symlinks=False)
            found[os.fsdecode(os.path.relpath(full, os.fsencode(path)))] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns,
                content,
                tuple((n, os.getxattr(full, n, follow_symlinks=False)) for n in sorted(names_)),
            )
    return found


def opaque_layer(number: int) -> bytes:
    """The tar of a layer of so many opaque directories, whose names are in the answer of the extracting process."""
    names = [f"{n:040}" for n in range(number)]
    return tar(*(each for name in names for each in (member(name), member(f"{name}/.wh..wh..opq", b""))))


class Killing(Job):
    """Kills an extracting process in the middle of its work, which is then surely not over.

    The process can't end before, because its answer is more than a pipe holds (see `opaque_layer`), and nobody reads it
    until it is killed. `directory` is the root of its store. `outer` kills the process that made its namespaces.
    """

    def __init__(self, directory: Path, *, outer: bool) -> None:
        super().__init__()
        self.killed = 0
        self._directory, self._outer = directory, outer

    def communicate(self, process: subprocess.Popen[bytes], data: bytes = b"") -> tuple[bytes, bytes]:
        assert process.stdin
        process.stdin.write(data)
        process.stdin.close()
        process.stdin = None
        until(lambda: any(self._directory.glob("tmp/*/*/tree/*")), "it extracts")
        self.killed = process.pid
        if not self._outer:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            [self.killed] = [int(word) for word in until(lambda: children.read_text().split(), "there is a child")]
        os.kill(self.killed, signal.SIGKILL)
        return super().communicate(process)


def skopeo(*arguments: str) -> str:
    """The output of skopeo(1), which leaves nothing in root's caches."""
    with tempfile.TemporaryDirectory(prefix="insula-skopeo-") as home:
        environment = {**os.environ, "HOME": home, "XDG_DATA_HOME": home, "_CONTAINERS_ROOTLESS_UID": "1"}
        done = subprocess.run(["skopeo", *arguments], check=True, capture_output=True, text=True, env=environment)
        return done.stdout
