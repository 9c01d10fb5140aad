"""Names of images: ``registry.example:5000/team/app:1.2@sha256:…``, parsed strictly.

The grammar is that of the distribution project (reference/reference.go), as in Docker and Podman. The first component
is a registry if it has a dot or a colon, or is ``localhost``. The default registry is docker.io, where a repository of
one component is in ``library/``. The short form of ``docker.io/library/busybox:latest`` is ``busybox:latest``.
"""

from __future__ import annotations

import re

import msgspec

from insula.model.errors import Invalid
from insula.model.units import shorten

DEFAULT_REGISTRY = "docker.io"
MAX_NAME = 255

_HOST_PART = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_HOST_PART}(?:\.{_HOST_PART})*|\[[0-9a-fA-F:.]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_HINT = "write [registry[:port]/]repository[:tag], as in busybox:latest or registry.example:5000/team/app:1.2"


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A complete name: a registry, a repository, and a tag or a digest or both."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def locator(self) -> str:
        """The name for a registry client, with the digest if there is one, since a tag can change."""
        end = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.registry}/{self.repository}{end}"

    @property
    def familiar(self) -> str:
        """The short form for people, with a tag if there is one."""
        repository = self.repository
        if self.registry == DEFAULT_REGISTRY:
            repository = repository.removeprefix("library/")
        else:
            repository = f"{self.registry}/{repository}"
        return f"{repository}:{self.tag}" if self.tag else f"{repository}@{self.digest}"


def parse(text: str) -> Reference:
    """Parse a name; the default tag is ``latest``. Invalid."""
    if not isinstance(text, str) or len(text) > MAX_NAME + 1 + 128 + 1 + 71:
        raise Invalid(f"image name {shorten(text)} is too long", _HINT)
    rest, _, digest = text.partition("@")
    if "@" in text and not _DIGEST.fullmatch(digest):
        raise Invalid(f"image name {shorten(text)} has a bad digest", "a digest is sha256: and 64 hex digits")
    head, slash, tail = rest.rpartition("/")
    tail, colon, tag = tail.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise Invalid(f"image name {shorten(text)} has a bad tag", "a tag has 1 to 128 of A-Z a-z 0-9 _ . -")
    registry, repository = _split_registry(head + slash + tail)
    if not _REGISTRY.fullmatch(registry):
        raise Invalid(f"image name {shorten(text)} has a bad registry", _HINT)
    if not all(_COMPONENT.fullmatch(part) for part in repository.split("/")):
        raise Invalid(f"image name {shorten(text)} does not parse", _HINT)
    if len(registry) + 1 + len(repository) > MAX_NAME:
        raise Invalid(f"image name {shorten(text)} is too long", f"use at most {MAX_NAME} characters")
    if not colon and not digest:
        tag = "latest"
    return Reference(registry=registry, repository=repository, tag=tag or None, digest=digest or None)


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        if first in ("index.docker.io", "registry-1.docker.io"):
            first = DEFAULT_REGISTRY
        registry, repository = first, rest
    else:
        registry, repository = DEFAULT_REGISTRY, name
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    return registry, repository


def normalise_reference(name: str) -> str:
    """Return the name under which an image is stored: ``busybox:latest`` for ``busybox``. Invalid."""
    return parse(name).familiar


def check_digest(text: object) -> str:
    """Return `text` if it is a sha256 digest in the notation of the image-spec, else raise Invalid."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise Invalid(f"digest {shorten(text)} is not supported", "a digest is sha256: and 64 hex digits")
    return text
