"""Names of images: ``registry.example:5000/team/app:1.2@sha256:…``, parsed strictly.

The grammar is that of the distribution project (reference/reference.go), as in Docker and Podman. The first component
is a registry if it has a dot or a colon, or is ``localhost``. The default registry is docker.io, where a repository of
one component is in ``library/``. The short form of ``docker.io/library/busybox:latest`` is ``busybox:latest``.
"""

from __future__ import annotations

import re

import msgspec

from insula.model import rules
from insula.model.errors import Invalid
from insula.model.rules import MAX_REPOSITORY as MAX_NAME
from insula.model.units import shorten

DEFAULT_REGISTRY = "docker.io"

_REGISTRY = re.compile(rules.REGISTRY)
_COMPONENT = re.compile(rules.COMPONENT)
_TAG = re.compile(rules.TAG)
_DIGEST = re.compile(rules.DIGEST)
_USER = re.compile(r"^[^/]*@(?=[^/]*/)")  # user and password, which no name has

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
    """Parse a name; the default tag is ``latest``. Invalid, without the password that somebody wrote into it."""
    if not isinstance(text, str) or len(text) > rules.MAX_REFERENCE:
        raise Invalid(f"image name {shorten(text)} is too long", _HINT)
    if _USER.match(text):
        raise Invalid(f"image name {shorten(_USER.sub('…@', text))} has a user", "log in by --username instead")
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
