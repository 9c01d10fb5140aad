"""/v1/tenants/{tenant}/images: a tenant's images and the shared ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal

from litestar import Controller, Request, delete, get, post
from litestar.params import FromQuery, JSONBody
from litestar.response import Stream

from insula.api.audit import note, without_secret
from insula.api.pages import Paged
from insula.api.parameters import ImageName, NewImage, OptionalImage, Plane, Sender, TenantName
from insula.api.streams import BYTES, NDJSON, TAR, archive, json_lines, primed, spooled, while_connected
from insula.control.identities.authority import Authority
from insula.image.disk.convert import DiskFormat
from insula.image.registry import Progress
from insula.model import fields
from insula.model.disk_images import DevicesKind, Firmware
from insula.model.objects import Image, Struct
from insula.model.views import Credentials


class PullSpec(Struct):
    """What to fetch from a registry."""

    reference: fields.ImageReference
    name: fields.ImageReference | None = None
    auth: Credentials | None = None
    insecure: bool = False


class PushSpec(Struct):
    """What to send to a registry."""

    name: fields.ImageReference
    reference: fields.ImageReference
    auth: Credentials | None = None
    insecure: bool = False


class BaseSpec(Struct):
    """A distribution, and the code name of its release; None is that of the host."""

    distribution: Literal["debian"] = "debian"
    release: fields.Release | None = None


class TagSpec(Struct):
    """Another name for an image."""

    source: fields.ImageReference
    name: fields.ImageReference


class SaveSpec(Struct):
    """The images to save, and the form of the archive."""

    names: Annotated[list[fields.ImageReference], fields.at_most(1000, least=1)]
    format: Literal["oci", "docker"] = "oci"


class ImageRoutes(Controller):
    path = "/tenants/{tenant:str}/images"
    tags = ("images",)

    @get(summary="List a tenant's images and the shared ones", permission="image.read")
    async def list_images(self, plane: Plane, tenant: TenantName, page: Paged) -> list[Image]:
        return page.of(await plane.images.list(tenant), lambda image: image.name)

    @get("/{name:path}", summary="Show an image", permission="image.read")
    async def get_image(self, plane: Plane, tenant: TenantName, name: ImageName) -> Image:
        return await plane.images.get(tenant, name.lstrip("/"))

    @delete("/{name:path}", summary="Remove an image", permission="image.write")
    async def remove_image(self, plane: Plane, tenant: TenantName, name: ImageName) -> None:
        await plane.images.remove(tenant, name.lstrip("/"))

    @post(
        "/pull",
        summary="Fetch an image from a registry; JSON lines {progress}, at last {image}",
        permission="image.pull",
        sends=NDJSON,
        line="Progress",
    )
    async def pull(self, plane: Plane, tenant: TenantName, sender: Sender, data: JSONBody[PullSpec]) -> Stream:
        note(name=without_secret(data.name or data.reference))
        return json_lines(
            with_progress(
                lambda progress: plane.images.pull(
                    tenant,
                    data.reference,
                    name=data.name,
                    auth=data.auth,
                    insecure=data.insecure,
                    of_host=_of_host(sender, tenant),
                    progress=progress,
                )
            ),
            sender,
        )

    @post(
        "/push",
        summary="Send an image to a registry; JSON lines {progress}",
        permission="image.push",
        sends=NDJSON,
        line="Progress",
    )
    async def push(self, plane: Plane, tenant: TenantName, sender: Sender, data: JSONBody[PushSpec]) -> Stream:
        note(name=data.name, to=without_secret(data.reference))
        return json_lines(
            with_progress(
                lambda progress: plane.images.push(
                    tenant,
                    data.name,
                    data.reference,
                    auth=data.auth,
                    insecure=data.insecure,
                    of_host=_of_host(sender, tenant),
                    progress=progress,
                )
            ),
            sender,
        )

    @post(
        "/build-base",
        summary="Build an image of a distribution's user land; JSON lines {progress}, at last {image}",
        permission="image.registry",
        sends=NDJSON,
        line="Progress",
    )
    async def build_base(self, plane: Plane, tenant: TenantName, sender: Sender, data: JSONBody[BaseSpec]) -> Stream:
        note(name=data.distribution)
        return json_lines(
            with_progress(
                lambda progress: plane.images.build_base(tenant, data.distribution, data.release, progress=progress)
            ),
            sender,
        )

    @post(
        "/load",
        request_max_body_size=None,
        summary="Import the images of an OCI layout or docker-archive, a tar",
        permission="image.write",
        takes=TAR,
    )
    async def load(
        self, plane: Plane, tenant: TenantName, request: Request[Any, Any, Any], name: OptionalImage = None
    ) -> Sequence[Image]:
        async with spooled(request, plane.settings.root) as path:
            images = await while_connected(request, plane.images.load(tenant, path, name=name))
        note(name=" ".join(image.name for image in images))
        return images

    @post(
        "/import",
        request_max_body_size=None,
        summary="Make an image from the tar of a root file system",
        permission="image.write",
        takes=TAR,
    )
    async def import_rootfs(
        self, plane: Plane, tenant: TenantName, name: NewImage, request: Request[Any, Any, Any]
    ) -> Image:
        note(name=name)
        async with spooled(request, plane.settings.root) as path:
            return await while_connected(request, plane.images.import_(tenant, path, name=name))

    @post(
        "/import-disk",
        request_max_body_size=None,
        summary="Make an image from a disk image of any operating system, for virtual machines",
        permission="image.write",
        takes=BYTES,
    )
    async def import_disk(
        self,
        plane: Plane,
        tenant: TenantName,
        name: NewImage,
        format: FromQuery[DiskFormat],  # noqa: A002
        request: Request[Any, Any, Any],
        firmware: FromQuery[Firmware | None] = None,
        devices: FromQuery[DevicesKind] = "para",
    ) -> Image:
        note(name=name)
        async with spooled(request, plane.settings.root) as path:
            work = plane.images.import_disk(tenant, path, name=name, kind=format, firmware=firmware, devices=devices)
            return await while_connected(request, work)

    @post("/tag", summary="Give an image another name in addition", permission="image.write")
    async def tag(self, plane: Plane, tenant: TenantName, data: JSONBody[TagSpec]) -> Image:
        note(name=data.source, to=data.name)
        return await plane.images.tag(tenant, data.source, data.name)

    @post(
        "/save",
        status_code=200,
        summary="Images as one archive, a tar",
        permission="image.export",
        quota="streams",
        sends=TAR,
    )
    async def save(
        self, plane: Plane, tenant: TenantName, data: JSONBody[SaveSpec], request: Request[Any, Any, Any]
    ) -> Stream:
        note(name=" ".join(data.names))
        pieces = primed(plane.images.save(tenant, data.names, format=data.format))
        return archive(await while_connected(request, pieces))


def _of_host(sender: Authority, tenant: str) -> bool:
    """Whether registries are reached through the network of the host, for this sender, and not through the tenant's."""
    return "image.registry" in sender.held(tenant)


async def with_progress(work: Callable[[Progress], Awaitable[Image | None]]) -> AsyncIterator[dict[str, object]]:
    """Yield the progress of `work` as {progress}, and its image at the end as {image}.

    `work` may report progress from any thread.
    """
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str | None] = asyncio.Queue()

    def report(line: str | None) -> None:
        loop.call_soon_threadsafe(lines.put_nowait, line)

    async def run() -> Image | None:
        try:
            return await work(report)
        finally:
            report(None)

    task = asyncio.ensure_future(run())
    try:
        while (line := await lines.get()) is not None:
            yield {"progress": line}
        image = await task
        if image is not None:
            yield {"image": image}
    finally:
        task.cancel()
