"""Images: names in the store, content in the image store. An image is a tenant's own, or shared by all.

A name is bound to content in one transaction, after the content is complete. Content is removed when no name and no
instance needs it any more (garbage collection). The content that is needed is computed from the store just before.
The image store itself keeps content that was added meanwhile and has no name yet.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

import msgspec

from insula.control.accounting.accounts import Accounts
from insula.control.allocation.quotas import change, check_fits, exchange, of_images
from insula.control.allocation.transaction import guard, guarded
from insula.control.context import Context
from insula.control.instances.specs import cli_command
from insula.control.keys import IMAGES, INSTANCES, NETWORKS, SHARED, TENANTS, USAGE
from insula.control.tenants import Tenants
from insula.control.turns import Turns
from insula.image.disk.convert import DiskFormat
from insula.image.egress import Egress
from insula.image.job import Job
from insula.image.limits import AT_ONCE, AT_ONCE_MORE, AT_ONCE_TENANT
from insula.image.reference import Reference, normalise_reference, parse
from insula.image.registry import Auth, Progress
from insula.model.disk_images import DevicesKind, Firmware
from insula.model.errors import Conflict, Denied, Failed, InsulaError, Invalid, NotFound
from insula.model.objects import Image, ImageConfig, Tenant
from insula.model.quotas import QUOTAS
from insula.model.units import check_label
from insula.model.views import Usage
from insula.store.protocol import Compare, Snapshot, TransactionConflict
from insula.store.typed import Found

T = TypeVar("T")
BUSYBOX = "busybox:latest"
_CHUNK = 1 << 18


class Login(Protocol):
    """User name and password for a registry."""

    @property
    def username(self) -> str: ...

    @property
    def password(self) -> str: ...


class Images:
    def __init__(self, context: Context, tenants: Tenants, accounts: Accounts) -> None:
        self.context = context
        self.tenants = tenants
        self._accounts = accounts
        self._live: list[set[str]] = []  # for each garbage collection under way, digests that it keeps
        self._turns = Turns(AT_ONCE_TENANT, AT_ONCE_MORE, AT_ONCE)
        self._threads = ThreadPoolExecutor(
            AT_ONCE, "insula-image"
        )  # slow pulls would take all of the default executor's

    async def _work(self, tenant: str, method: Callable[..., T], *, outside: bool = False, shared: bool = False) -> T:
        """Run `method` of the image store in a thread. When the caller is cancelled, the method is ended and undoes its
        changes.

        The number of works at a time is bounded (`limits.AT_ONCE`); others wait. The work's connections to registries
        are charged to the tenant: their processes are in its control group. `outside`: the method is given the tenant's
        way out (`_egress`). An import may have as much as all images of the tenant, unless it is for a `shared` one.
        """
        async with self._turns.turn(tenant), AsyncExitStack() as stack:
            owner = (await self.tenants.find(tenant)).value
            groups = await asyncio.to_thread(self.context.groups.of_images, owner.name)
            job = Job(groups, None if shared else owner.limits.image_bytes)
            stack.enter_context(self._accounts.pulling(tenant))
            if outside:
                method = partial(method, egress=await stack.enter_async_context(self._egress(owner)))
            run = asyncio.get_running_loop().run_in_executor
            thread = asyncio.ensure_future(run(self._threads, partial(method, job=job)))
            try:
                return await asyncio.shield(thread)
            except asyncio.CancelledError:
                job.cancel()
                thread.add_done_callback(self._drop)
                await asyncio.wait((thread,))  # until then it may use objects of the caller
                raise

    @asynccontextmanager
    async def _egress(self, tenant: Tenant) -> AsyncIterator[Egress]:
        """A network namespace with the tenant's way out, and the resolver at its networks' gateways. Conflict if it
        has no network."""
        networks = await NETWORKS.readable(self.context.store, tenant.name)
        if not networks:
            hint = cli_command(tenant.name, "network create default --subnet 10.0.0.0/24")
            raise Conflict(f"tenant {tenant.name} has no network, and images are fetched and sent through one", hint)
        making = asyncio.ensure_future(self.context.fabric_turn(tenant.name, self.context.fabric.egress, tenant))
        try:
            netns = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_close)
            raise
        try:
            yield Egress(netns, [network.gateway for network in networks[:3]])
        finally:
            os.close(netns)

    async def _own(self, tenant: str) -> set[str]:
        """The digests of the images that the tenant has, or that all have."""
        own, shared = await asyncio.gather(
            IMAGES.readable(self.context.store, tenant), IMAGES.readable(self.context.store, SHARED)
        )
        return {image.digest for image in (*own, *shared)}

    def _drop(self, thread: asyncio.Future[Any]) -> None:
        """Release the images that a method returned although it was cancelled: no name will be bound to them."""
        if thread.cancelled() or thread.exception() is not None:
            return
        result = thread.result()
        for image in result if isinstance(result, list) else [result]:
            if isinstance(image, Image):
                self.context.images.release(image.digest)

    async def complete(self) -> None:
        """Add to images that an earlier version has stored what is stored for them (`Image.content`)."""
        for entry in (await self.context.store.list(IMAGES.prefix_all())).entries:
            if b'"content":' in entry.value:
                continue
            image = IMAGES.decode(entry)
            with suppress(NotFound):  # of content that was removed by hand
                content = await asyncio.to_thread(self.context.images.content, image.digest)
                put = IMAGES.put(msgspec.structs.replace(image, content=content), *IMAGES.parts(entry.key))
                with suppress(TransactionConflict):
                    await self.context.store.transact([Compare(entry.key, entry.revision)], [put])

    # -- looking ---------------------------------------------------------------------------------------------------

    async def find(self, tenant: str, name: str) -> Found[Image]:
        """The tenant's own image of that name, else the shared one; with a tag and a digest only one that has the
        digest. NotFound."""
        wanted = parse(name)
        shown, names = wanted.familiar, [wanted.familiar]
        pinned = wanted.digest if wanted.tag else None
        if pinned:
            shown = f"{wanted.familiar}@{pinned}"
            names.append(_by_digest(wanted).familiar)
        for each in names:
            found = await asyncio.gather(
                IMAGES.get(self.context.store, check_label("tenant", tenant), each),
                IMAGES.get(self.context.store, SHARED, each),
            )
            for image in found:
                if image and (pinned is None or each != wanted.familiar or image.value.digest == pinned):
                    return image
        await self.tenants.find(tenant)
        raise NotFound(
            f"there is no image {shown}",
            f"{cli_command(tenant, f'image pull {shown}')} fetches it, {cli_command(tenant, 'image ls')} lists them",
        )

    async def get(self, tenant: str, name: str) -> Image:
        await self.tenants.find(tenant)
        return (await self.find(tenant, name)).value

    async def list(self, tenant: str) -> list[Image]:
        """The tenant's own images, and the shared ones that have none of the tenant's names."""
        await self.tenants.find(tenant)
        own, shared = await asyncio.gather(
            IMAGES.readable(self.context.store, tenant), IMAGES.readable(self.context.store, SHARED)
        )
        names = {image.name for image in own}
        return sorted([*own, *(i for i in shared if i.name not in names)], key=lambda image: image.name)

    # -- adding ----------------------------------------------------------------------------------------------------

    async def import_(
        self, tenant: str, rootfs: Path | BinaryIO, *, name: str, config: ImageConfig | None = None
    ) -> Image:
        """Make an image from the tar of a root file system."""
        await self._check_room(tenant)
        name = normalise_reference(name)
        own = await self._own(tenant)
        make = partial(self.context.images.import_rootfs, rootfs, name=name, tenant=tenant, config=config, own=own)
        [image] = await self._name(tenant, [await self._work(tenant, make)])
        return image

    async def import_disk(
        self,
        tenant: str,
        disk: Path | BinaryIO,
        *,
        name: str,
        kind: DiskFormat,
        firmware: Firmware | None = None,
        devices: DevicesKind = "para",
    ) -> Image:
        """Make an image from a disk image of any operating system, for virtual machines."""
        await self._check_room(tenant)
        name = normalise_reference(name)
        make = partial(
            self.context.images.import_disk,
            disk,
            name=name,
            tenant=tenant,
            kind=kind,
            firmware=firmware,
            devices=devices,
        )
        [image] = await self._name(tenant, [await self._work(tenant, make)])
        return image

    async def load(self, tenant: str, path: Path, *, name: str | None = None) -> Sequence[Image]:
        """Load the images of an OCI layout (directory or tar) or docker-archive. `name` is allowed for one image."""
        await self._check_room(tenant)
        own = await self._own(tenant)
        images = await self._work(tenant, partial(self.context.images.load, path, tenant=tenant, name=name, own=own))
        return await self._name(tenant, images)

    async def tag(self, tenant: str, source: str, name: str) -> Image:
        """Give an image one more name. That is the tenant's own image, even if `source` is shared."""
        await self.tenants.find(tenant)
        image = (await self.find(tenant, source)).value
        [named] = await self._name(
            tenant, [msgspec.structs.replace(image, name=normalise_reference(name))], check=image
        )
        return named

    async def pull(
        self,
        tenant: str,
        reference: str,
        *,
        name: str | None = None,
        auth: Login | None = None,
        insecure: bool = False,
        of_host: bool = False,
        progress: Progress | None = None,
    ) -> Image:
        """Fetch an image from a registry, through the tenant's network or that `of_host`. `progress` is called with
        lines of text, from another thread."""
        await self._check_room(tenant)
        pull = partial(
            self.context.images.pull,
            reference,
            tenant=tenant,
            name=name,
            auth=_login(auth),
            insecure=insecure,
            progress=progress,
            own=await self._own(tenant),
        )
        image, wanted = await self._work(tenant, pull, outside=not of_host), parse(reference)
        images = [image]
        if name is None and wanted.tag and wanted.digest not in (None, image.digest):  # that of an index
            images.append(msgspec.structs.replace(image, name=_by_digest(wanted).familiar))
        return (await self._name(tenant, images, pulled=wanted.digest))[0]

    async def build_base(
        self, tenant: str, distribution: str, release: str | None = None, *, progress: Progress | None = None
    ) -> Image:
        """Build an image of a distribution with the distribution's own tool. It is shared, since it holds nothing of
        the tenant. Its tag is the release; without `release` it is tagged ``latest`` as well.
        """
        await self.tenants.find(tenant)
        build = partial(self.context.images.build_base, distribution, release, progress)
        [image] = await self._name("", [await self._work(tenant, build, shared=True)])
        if release is None:
            await self._name("", [msgspec.structs.replace(image, name=f"{distribution}:latest")])
        return image

    async def ensure_busybox(self) -> None:
        """Make the shared image `busybox:latest` from the host's busybox, unless it is there."""
        found = await IMAGES.get(self.context.store, SHARED, BUSYBOX)
        if found is not None:
            try:
                await asyncio.to_thread(self.context.images.lower, found.value)
                return
            except NotFound:
                pass  # the content was lost: make it again
        await self._name("", [await asyncio.to_thread(self.context.images.build_busybox)])

    async def _check_room(self, tenant: str) -> None:
        """Raise QuotaExceeded if nothing is left of the tenant's quota for content, before any work is done."""
        owner, usage = await self.tenants.find(tenant), await guard(self.context.store, tenant)
        check_fits(owner.value, QUOTAS["image_bytes"], usage.value.image_bytes, 1)

    async def _name(
        self, tenant: str, images: Sequence[Image], *, check: Image | None = None, pulled: str | None = None
    ) -> Sequence[Image]:
        """Bind the images' names to their content, all or none; a name may have been bound to other content before.
        QuotaExceeded; Invalid for a name with a digest that is neither the content's nor that it was `pulled` by.

        The content is new, and the image store has kept it for the caller until now. Or it is the content of the image
        `check`, which must still exist; else Conflict.
        """
        store, owner = self.context.store, tenant or SHARED
        images = [msgspec.structs.replace(image, tenant=tenant) for image in images]
        puts = [IMAGES.put(image, owner, image.name) for image in images]

        async def attempt(guard: Found[Usage]) -> None:
            found = await self.tenants.find(tenant)
            same = []
            if check is not None:
                source = await self.find(tenant, check.name)
                if source.value.digest != check.digest:
                    raise Conflict(f"image {check.name} was changed at the same time", "try again")
                same = [IMAGES.unchanged(source, source.value.tenant or SHARED, check.name)]
            before = await IMAGES.readable(store, tenant)
            kept = await self._still_used(tenant, before, images)
            after = {image.name: image for image in (*before, *kept, *images)}.values()
            usage = change(found.value, guard.value, of_images(before), of_images(after))
            await store.transact(
                [TENANTS.unchanged(found, tenant), USAGE.unchanged(guard, tenant), *same],
                [*puts, *(IMAGES.put(image, owner, image.name) for image in kept), USAGE.put(usage, tenant)],
            )

        try:
            for image in images:
                if parse(image.name).digest not in (None, image.digest, pulled):
                    raise Invalid(f"{image.name} is not the digest of the image", "leave the digest out")
            if tenant:
                await guarded(store, tenant, attempt)
            else:
                await store.transact([], puts)
        except InsulaError:
            self._recorded(images, check)
            await self.collect()
            raise
        except BaseException:
            self._recorded(images, check)
            raise
        self._recorded(images, check)
        return images

    def _recorded(self, images: Iterable[Image], check: Image | None) -> None:
        """Note that these names are in the store, or won't be."""
        for image in images:
            for live in self._live:  # that collection may have listed the names before this one existed
                live.add(image.digest)
            if check is None:
                self.context.images.release(image.digest)

    async def _still_used(self, tenant: str, before: Iterable[Image], new: Sequence[Image]) -> Sequence[Image]:
        """Images whose names are bound anew, and whose content instances use: they stay, under names with digests, so
        that somebody pays for the content."""
        names, digests = {image.name for image in new}, {image.digest for image in new}
        others = {image.digest for image in before if image.name not in names} | digests
        left = [image for image in before if image.name in names and image.digest not in others]
        if not left:
            return []
        used = {image for each in await INSTANCES.readable(self.context.store, tenant) for image in each.images}
        return [
            msgspec.structs.replace(image, name=f"{image.name.partition('@')[0].rpartition(':')[0]}@{image.digest}")
            for image in left
            if image.digest in used
        ]

    # -- going out -------------------------------------------------------------------------------------------------

    async def push(
        self,
        tenant: str,
        name: str,
        reference: str | None = None,
        *,
        auth: Login | None = None,
        insecure: bool = False,
        of_host: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Send an image to a registry, under its own name or as `reference`, through a network as for `pull`."""
        image = await self.get(tenant, name)
        push = partial(
            self.context.images.push,
            image,
            reference or name,
            auth=_login(auth),
            insecure=insecure,
            progress=progress,
        )
        await self._work(tenant, push, outside=not of_host)

    async def save(
        self,
        tenant: str,
        names: Sequence[str],
        *,
        format: Literal["oci", "docker"] = "oci",  # noqa: A002
    ) -> AsyncIterator[bytes]:
        """The images as one archive: the pieces of a tar."""
        images = [await self.get(tenant, name) for name in names]
        with tempfile.TemporaryDirectory(prefix="save-", dir=self.context.settings.root) as directory:
            path = Path(directory) / "images.tar"
            await self._work(tenant, partial(self.context.images.save, images, path, format=format))
            with path.open("rb") as file:
                while piece := await asyncio.to_thread(file.read, _CHUNK):
                    yield piece

    # -- removing --------------------------------------------------------------------------------------------------

    async def remove(self, tenant: str, name: str) -> None:
        """Remove an image, and the content that no other image needs. Denied for shared images, Conflict while an
        instance uses it."""
        store = self.context.store
        await self.tenants.find(tenant)
        found = await self.find(tenant, name)
        image = found.value
        if not image.tenant:
            raise Denied(f"image {image.name} is shared by all tenants", "only images of your own can be removed")

        async def attempt(guard: Found[Usage]) -> None:
            instances = await INSTANCES.list(store, tenant)
            if users := [instance.name for instance in instances if image.digest in instance.images]:
                raise Conflict(f"image {image.name} is used by {', '.join(users[:3])}", "remove these instances first")
            before = await IMAGES.readable(store, tenant)
            rest = [each for each in before if each.name != image.name]
            usage = exchange(guard.value, of_images(before), of_images(rest))
            await store.transact(
                [IMAGES.unchanged(found, tenant, image.name), USAGE.unchanged(guard, tenant)],
                [IMAGES.delete(tenant, image.name), USAGE.put(usage, tenant)],
            )

        try:
            await guarded(store, tenant, attempt)
        except TransactionConflict:
            raise Conflict(f"image {image.name} was changed at the same time", "try again") from None
        await self.collect(image)

    async def collect(self, gone: Image | None = None) -> int:
        """Remove content that no name and no instance needs, and return the number of bytes. `gone` was just removed.

        Nothing is removed while a record is damaged, since it is not known which content that record needs.
        """
        live: set[str] = set()
        self._live.append(live)
        try:
            return await self._collect(live, gone)
        finally:
            self._live = [other for other in self._live if other is not live]

    async def _collect(self, live: set[str], gone: Image | None) -> int:
        """Do the work of `collect`; content whose digests are in `live` is kept as well."""
        store, problems = self.context.store, self.context.problems
        snapshots = await asyncio.gather(store.list(IMAGES.prefix_all()), store.list(INSTANCES.prefix_all()))
        try:
            needed, layers = await _alive(*snapshots)
        except Failed as error:
            problems["unused images"] = f"stay on the disk: {error}"
            return 0
        problems.solved("unused images")
        live |= needed
        for layer in set(gone.layers) - layers if gone else ():
            try:
                for path in self.context.images.lower([layer]):
                    await self.context.release_layer(path)
            except InsulaError as error:  # then its space on the disk is free only when the zygote releases it
                self.context.problems[f"layer {layer[:19]}"] = error.message
        return await asyncio.to_thread(self.context.images.collect, live)


async def _alive(images: Snapshot, instances: Snapshot) -> tuple[set[str], set[str]]:
    """The digests of manifests, and the layers, that names and instances need."""
    named, running = await IMAGES.decode_all(images.entries), await INSTANCES.decode_all(instances.entries)
    digests = {image.digest for image in named} | {digest for instance in running for digest in instance.images}
    return digests, {layer for image in named for layer in image.layers} | {
        layer for instance in running for layer in instance.root.layers
    }


def _close(making: asyncio.Future[int]) -> None:
    """Close the descriptor that a call returned after its caller was cancelled."""
    if not making.cancelled() and making.exception() is None:
        os.close(making.result())


def _login(auth: Login | None) -> Auth | None:
    return Auth(username=auth.username, password=auth.password) if auth else None


def _by_digest(reference: Reference) -> Reference:
    """The name of an image by its digest alone."""
    return msgspec.structs.replace(reference, tag=None)
