"""`ImageOperations`: /v1/tenants/{tenant}/images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from insula.model.disk_images import DevicesKind, Firmware
from insula.model.objects import Image
from insula.model.views import Credentials
from insula.sdk import answers
from insula.sdk._sync.calls import Caller, request
from insula.sdk._sync.items import Items, as_sent, lines
from insula.sdk._sync.network import Pieces
from insula.sdk.types import ImageProgress


class ImageOperations:
    """A tenant's images, and the shared ones. An archive is a tar in pieces."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(self, tenant: str, *, prefix: str | None = None, page: int | None = None) -> Iterator[Image]:
        """Yield the tenant's images and the shared ones."""
        return self._caller.pages(answers.IMAGES, "tenants", tenant, "images", query={"prefix": prefix}, page=page)

    def get(self, tenant: str, name: str) -> Image:
        return self._caller.get(answers.IMAGE, "tenants", tenant, "images", name)

    def remove(self, tenant: str, name: str, *, idempotency_key: str | None = None) -> None:
        self._caller.do("DELETE", "tenants", tenant, "images", name, key=idempotency_key)

    def pull(
        self,
        tenant: str,
        reference: str,
        *,
        name: str | None = None,
        credentials: Credentials | None = None,
        insecure: bool = False,
    ) -> Items[ImageProgress]:
        """Fetch an image from a registry; the last item has it."""
        body = {"reference": reference, "name": name, "auth": credentials, "insecure": insecure}
        return self._progress(tenant, "pull", body)

    def push(
        self,
        tenant: str,
        name: str,
        reference: str,
        *,
        credentials: Credentials | None = None,
        insecure: bool = False,
    ) -> Items[ImageProgress]:
        """Send an image to a registry."""
        body = {"name": name, "reference": reference, "auth": credentials, "insecure": insecure}
        return self._progress(tenant, "push", body)

    def build_base(
        self, tenant: str, *, distribution: Literal["debian"] = "debian", release: str | None = None
    ) -> Items[ImageProgress]:
        """Build an image of a distribution's user land; the last item has it."""
        return self._progress(tenant, "build-base", {"distribution": distribution, "release": release})

    def load(self, tenant: str, archive: Pieces, *, name: str | None = None) -> Sequence[Image]:
        """Import the images of an OCI layout or docker-archive; `name` is for one image."""
        where = ("tenants", tenant, "images", "load")
        return self._caller.upload(answers.IMAGES, "POST", *where, pieces=archive, query={"name": name})

    def import_rootfs(self, tenant: str, name: str, rootfs: Pieces) -> Image:
        """Make an image from the archive of a root file system."""
        where = ("tenants", tenant, "images", "import")
        return self._caller.upload(answers.IMAGE, "POST", *where, pieces=rootfs, query={"name": name})

    def import_disk(
        self,
        tenant: str,
        name: str,
        disk: Pieces,
        *,
        format: Literal["raw", "qcow2", "iso"],  # noqa: A002
        firmware: Firmware | None = None,
        devices: DevicesKind = "para",
    ) -> Image:
        """Make an image from a disk image of any operating system, for virtual machines."""
        where = ("tenants", tenant, "images", "import-disk")
        query = {"name": name, "format": format, "firmware": firmware, "devices": devices}
        return self._caller.upload(answers.IMAGE, "POST", *where, pieces=disk, query=query)

    def tag(self, tenant: str, source: str, name: str, *, idempotency_key: str | None = None) -> Image:
        """Give the image `source` another name in addition."""
        body = {"source": source, "name": name}
        where = ("tenants", tenant, "images", "tag")
        return self._caller.change(answers.IMAGE, "POST", *where, body=body, key=idempotency_key)

    def save(self, tenant: str, names: Sequence[str], *, layout: Literal["oci", "docker"] = "oci") -> Items[bytes]:
        """Yield an archive with images, as OCI layout or docker-archive."""
        body = {"names": [*names], "format": layout}
        return Items(self._caller, request("POST", "tenants", tenant, "images", "save", body=body), as_sent)

    def _progress(self, tenant: str, verb: str, body: object) -> Items[ImageProgress]:
        sent = request("POST", "tenants", tenant, "images", verb, body=body)
        return Items(self._caller, sent, lines(answers.IMAGE_PROGRESS))
