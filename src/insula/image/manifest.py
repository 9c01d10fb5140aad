"""The documents of an image, read strictly and written reproducibly.

A *manifest* has the digests of one configuration and of the layers. An *index* (Docker: manifest list) has the digests
of manifests, one for each platform. The *configuration* has the settings for running the image, and the DiffIDs, the
digests of the uncompressed layers. So the manifest's digest determines every byte. See the OCI image-spec (manifest.md,
image-index.md, config.md) and Docker's "Image Manifest Version 2, Schema 2".

A document that is both manifest and index is refused, and one whose media type contradicts its fields: readers that
interpret a digest differently were the cause of CVE-2021-41190.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from insula.image.limits import MAX_DOCUMENT, MAX_LAYERS
from insula.image.platform import architecture, fitness
from insula.image.reference import check_digest
from insula.model.errors import Invalid
from insula.model.health import LEAST, plan
from insula.model.objects import Healthcheck, ImageConfig
from insula.model.units import parse_signal, shorten

_T = TypeVar("_T")

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DISK_LAYER = "application/vnd.insula.disk.v1"
"""The only layer of a disk image of a virtual machine: its digest is that of `disk.convert`."""

INDEXES = {OCI_INDEX, DOCKER_LIST}
MANIFESTS = {OCI_MANIFEST, DOCKER_MANIFEST}
CONFIGS = {OCI_CONFIG, DOCKER_CONFIG}
LAYERS = {
    *(OCI_LAYER + end for end in ("", "+gzip", "+zstd")),
    *(DOCKER_LAYER + end for end in ("", ".gzip", ".zstd")),
}


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    architecture: str
    os: str
    variant: str | None = None


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A reference to another blob (descriptor.md)."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] | None = None
    platform: Platform | None = None
    urls: list[str] | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    schema_version: int
    media_type: str | None = None
    config: Descriptor
    layers: list[Descriptor]
    annotations: dict[str, str] | None = None

    @property
    def is_disk(self) -> bool:
        """Whether it is of a disk image of a virtual machine."""
        return self.layers[0].media_type == DISK_LAYER


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    schema_version: int
    media_type: str | None = None
    manifests: list[Descriptor]
    annotations: dict[str, str] | None = None


class _ImageHealthcheck(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """The health check, Docker's extension of config.md; durations are in nanoseconds, and 0 is the default."""

    test: list[str] | None = None
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class _ConfigObject(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """The `config` object of config.md; Docker writes null for absent values."""

    user: str | None = None
    exposed_ports: dict[str, Any] | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    volumes: dict[str, Any] | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None
    healthcheck: _ImageHealthcheck | None = None


class _Rootfs(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    diff_ids: list[str]


class _History(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    created: str | None = None
    created_by: str | None = None


class _Document(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    architecture: str
    os: str
    created: str | None = None
    variant: str | None = None
    config: _ConfigObject | None = None
    rootfs: _Rootfs
    history: list[Any] | None = None


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """An image configuration: its settings, its platform, and the DiffIDs of its layers, lowest first."""

    architecture: str
    os: str
    diff_ids: list[str]
    config: ImageConfig
    variant: str | None = None
    notes: list[str] = []  # on ignored parts, for people


# -- reading ---------------------------------------------------------------------------------------


def read_document(data: bytes) -> Manifest | Index:
    """Decode and check an image manifest or an index from JSON. Invalid."""
    head = _decode(data, dict[str, Any], "manifest")
    if head.get("schemaVersion") != 2:
        raise Invalid("the manifest is not of schema version 2", "push the image again with a current tool")
    if "manifests" in head and ("layers" in head or "config" in head):
        raise Invalid("the manifest is also an index", "don't use this image: tools interpret it differently")
    if "manifests" in head:
        index = _decode(data, Index, "image index")
        _expect_type(index.media_type, INDEXES)
        for entry in index.manifests:
            check_digest(entry.digest)
        return index
    manifest = _decode(data, Manifest, "manifest")
    _expect_type(manifest.media_type, MANIFESTS)
    _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    if manifest.config.media_type not in CONFIGS:
        raise Invalid(
            f"{shorten(manifest.config.media_type)} is not an image configuration",
            "it may be a Helm chart or another artifact: use a container image",
        )
    if not manifest.layers:
        raise Invalid("the image has no layers", "an image needs at least one layer")
    if len(manifest.layers) > MAX_LAYERS:
        raise Invalid(f"the image has {len(manifest.layers)} layers", f"at most {MAX_LAYERS} are possible: squash it")
    for layer in manifest.layers:
        kind = layer.media_type
        if "foreign" in kind or "nondistributable" in kind or layer.urls:
            raise Invalid(
                "the image has a foreign layer, whose content is stored elsewhere",
                "use an image that has all its layers",
            )
        if kind not in LAYERS and not (kind == DISK_LAYER and len(manifest.layers) == 1):
            raise Invalid(
                f"layers of type {shorten(kind)} are not supported", "use tar layers, plain or with gzip or zstd"
            )
    for part in (manifest.config, *manifest.layers):
        check_digest(part.digest)
        if not 0 <= part.size < 1 << 63:
            raise Invalid(f"the manifest gives {part.digest[:19]}… an invalid size", "the manifest is damaged")
    if manifest.config.size > MAX_DOCUMENT:
        raise Invalid("the image's configuration is too large", f"at most {MAX_DOCUMENT} bytes are read")


def read_configuration(data: bytes) -> Configuration:
    """Decode and check the configuration of an image from JSON. Invalid."""
    document = _decode(data, _Document, "image configuration")
    if document.rootfs.type != "layers":
        raise Invalid(f"root file systems of type {shorten(document.rootfs.type)} are not supported", "use layers")
    process = document.config or _ConfigObject()
    env, notes = _read_env(process.env or [])
    config = ImageConfig(
        env=env,
        entrypoint=process.entrypoint if process.entrypoint not in (None, [""]) else [],  # Docker's notation for none
        cmd=process.cmd or [],
        user=process.user or "",
        working_dir="/" + (process.working_dir or "").lstrip("/"),
        stop_signal=process.stop_signal or "SIGTERM",
        labels=process.labels or {},
        volumes=sorted(process.volumes or {}),
        exposed_ports=sorted(process.exposed_ports or {}),
        healthcheck=_read_healthcheck(process.healthcheck),
    )
    check_config(config)
    return Configuration(
        architecture=document.architecture,
        os=document.os,
        diff_ids=[check_digest(d) for d in document.rootfs.diff_ids],
        config=config,
        variant=document.variant,
        notes=notes,
    )


def _read_env(found: list[str]) -> tuple[list[str], list[str]]:
    """Return the variables with name and value, and a note about others, which are ignored as in other engines."""
    env = [variable for variable in found if variable.find("=") > 0]
    odd = [variable for variable in found if variable.find("=") < 1]
    return env, [f"variable {shorten(odd[0])} without a value left out"] if odd else []


def _read_healthcheck(found: _ImageHealthcheck | None) -> Healthcheck | None:
    """Convert a health check; None for an unknown kind of test, as in Docker."""
    if found is None or not found.test or found.test[0] not in ("NONE", "CMD", "CMD-SHELL"):
        return None
    return Healthcheck(
        test=found.test,
        interval=_seconds(found.interval),
        timeout=_seconds(found.timeout),
        retries=found.retries or None,
        start_period=_seconds(found.start_period),
        start_interval=_seconds(found.start_interval),
    )


def _seconds(nanoseconds: int) -> float | None:
    """Convert nanoseconds to seconds, at least 1: each check starts a process on the host. Docker allows less."""
    return max(LEAST, nanoseconds / 1e9) if nanoseconds > 0 else nanoseconds / 1e9 or None


def _write_healthcheck(healthcheck: Healthcheck | None) -> _ImageHealthcheck | None:
    if healthcheck is None:
        return None
    return _ImageHealthcheck(
        test=healthcheck.test,
        interval=int((healthcheck.interval or 0) * 1e9),
        timeout=int((healthcheck.timeout or 0) * 1e9),
        retries=healthcheck.retries or 0,
        start_period=int((healthcheck.start_period or 0) * 1e9),
        start_interval=int((healthcheck.start_interval or 0) * 1e9),
    )


def check_config(config: ImageConfig) -> None:
    """Check that a launch can use `config`. Invalid for NUL bytes, broken text, variables without '='."""
    labels = [text for pair in config.labels.items() for text in pair]
    for text in (
        *config.env,
        *config.entrypoint,
        *config.cmd,
        config.user,
        config.working_dir,
        *config.volumes,
        *((config.healthcheck and config.healthcheck.test) or ()),
        *labels,
    ):
        if "\0" in text or not _is_utf8(text):
            raise Invalid("the image's configuration has a NUL or broken character", "don't use this image")
    for variable in config.env:
        if variable.find("=") < 1:
            raise Invalid(f"the image's variable {shorten(variable)} is not NAME=value", "build the image without it")
    plan(None, config.healthcheck)
    try:
        parse_signal(config.stop_signal)
    except Invalid as e:
        raise Invalid(f"the image's stop signal {shorten(config.stop_signal)} is not a signal", e.hint) from None


def check_platform(configuration: Configuration) -> None:
    """Check that this machine can run the image. Invalid."""
    if configuration.os != "linux" or configuration.architecture != architecture():
        has = f"{configuration.os}/{configuration.architecture}"
        raise Invalid(
            f"the image is for {shorten(has)}, and this machine is linux/{architecture()}",
            "use an image built for this machine",
        )
    if configuration.architecture == "amd64" and fitness(configuration.variant) is None:
        raise Invalid(
            f"the image is for amd64/{configuration.variant}, which this machine's processor is not",
            "use an image built for this machine",
        )


def matches(platform: Platform | None) -> bool:
    """Whether an index's entry is for this machine; without a platform its configuration is checked later."""
    if platform is None:
        return True
    fits = platform.architecture != "amd64" or fitness(platform.variant) is not None
    return platform.os == "linux" and platform.architecture == architecture() and fits


def by_preference(entries: list[Descriptor]) -> list[Descriptor]:
    """Sort an index's entries by their use of this machine's processor, the best first; the sort is stable."""

    def rank(entry: Descriptor) -> int:
        found = entry.platform
        return -(fitness(found.variant) or 0) if found and found.architecture == "amd64" else 0

    return sorted(entries, key=rank)


def _decode(data: bytes, kind: type[_T], what: str) -> _T:
    if len(data) > MAX_DOCUMENT:
        raise Invalid(f"the {what} is too large", f"at most {MAX_DOCUMENT} bytes are read")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise Invalid(
            f"the {what} does not parse: {shorten(str(e), 120)}", "this is not an image, or it is damaged"
        ) from None


def _expect_type(media_type: str | None, allowed: set[str]) -> None:
    if media_type is not None and media_type not in allowed:
        raise Invalid(
            f"the manifest's media type {shorten(media_type)} contradicts its content", "don't use this image"
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


# -- writing ---------------------------------------------------------------------------------------


def write_document(document: Manifest | Index) -> bytes:
    """Encode a document as canonical JSON, so that equal documents have equal digests."""
    return msgspec.json.encode(document, order="sorted")


def write_configuration(config: ImageConfig, diff_ids: list[str], created: float, comment: str) -> bytes:
    """Encode an OCI image configuration for this machine as JSON."""
    check_config(config)
    when = datetime.fromtimestamp(int(created), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    process = _ConfigObject(
        user=config.user or None,
        exposed_ports={port: {} for port in config.exposed_ports} or None,
        env=config.env or None,
        entrypoint=config.entrypoint or None,
        cmd=config.cmd or None,
        volumes={path: {} for path in config.volumes} or None,
        working_dir=config.working_dir if config.working_dir != "/" else None,
        labels=config.labels or None,
        stop_signal=config.stop_signal if config.stop_signal != "SIGTERM" else None,
        healthcheck=_write_healthcheck(config.healthcheck),
    )
    document = _Document(
        architecture=architecture(),
        os="linux",
        created=when,
        config=process,
        rootfs=_Rootfs(type="layers", diff_ids=diff_ids),
        history=[_History(created=when, created_by=comment)] * len(diff_ids),
    )
    return msgspec.json.encode(document, order="sorted")
