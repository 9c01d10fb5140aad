"""A user's program, once for threads and once for asyncio: a day of a tenant's member. mypy checks it strictly.

Both return what they have seen, which the test compares.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import tarfile
from typing import NamedTuple

from insula.sdk import AsyncInsula, InstanceSpec, Insula, NotFound

BIG = b"x" * 300_000
SHOUTING = ["sh", "-c", "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.1; done"]


class Seen(NamedTuple):
    """What a member has seen of the cloud."""

    tenants: list[str]
    limits: float | int | None
    attached: bytes
    counted: bytes
    status: int | None
    lines: list[bytes]
    copied: bytes
    pages: list[str]
    foreign: str
    owners: set[str]
    left: list[str]


def tar(name: str, content: bytes) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


def content(archive: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        file = opened.extractfile(opened.getmembers()[0])
        assert file is not None
        return file.read()


def shouting(number: int) -> InstanceSpec:
    return InstanceSpec(image="busybox", name=f"shouting-{number}", command=SHOUTING, labels={"kind": "shouting"})


def day(cloud: Insula, tenant: str, other: str) -> Seen:
    """For threads."""
    with cloud:
        view = cloud.tenants.get(tenant)
        spec = InstanceSpec(image="busybox", command=["echo", "from afar"], remove=True)
        attached = cloud.instances.run_attached(tenant, spec).communicate().stdout
        key = secrets.token_hex()
        for number in [*range(5), *range(5)]:
            cloud.instances.run(tenant, shouting(number), idempotency_key=f"{key}-{number}")
        done = cloud.instances.exec(tenant, "shouting-0", ["sh", "-c", "wc -c; exit 7"], stdin=True).communicate(BIG)
        lines = []
        with cloud.instances.logs(tenant, "shouting-1", follow=True) as output:
            for piece in output:
                lines += piece.data.splitlines()
                if len(lines) >= 3:
                    break
        cloud.instances.archive_put(tenant, "shouting-0", "/tmp", [tar("greeting", BIG)])
        copied = content(b"".join(cloud.instances.archive_get(tenant, "shouting-0", "/tmp/greeting")))
        pages = [each.instance.name for each in cloud.instances.list(tenant, page=2, labels=["kind=shouting"])]
        try:
            cloud.instances.get(other, "shouting-0")
            foreign = "seen"
        except NotFound as error:
            foreign = error.message
        owners = {each.instance.tenant for each in cloud.instances.list()}
        for name in pages:
            cloud.instances.remove(tenant, name, force=True)
        left = [each.instance.name for each in cloud.instances.list(tenant, prefix="shouting")]
        return Seen(
            tenants=[each.tenant.name for each in cloud.tenants.list()],
            limits=view.tenant.limits.cpus,
            attached=attached,
            counted=done.stdout,
            status=done.exit.exit_status,
            lines=lines[:3],
            copied=copied,
            pages=pages,
            foreign=foreign,
            owners=owners,
            left=left,
        )


async def async_day(cloud: AsyncInsula, tenant: str, other: str) -> Seen:
    """The same for asyncio, several things at a time."""
    async with cloud:
        view = await cloud.tenants.get(tenant)
        spec = InstanceSpec(image="busybox", command=["echo", "from afar"], remove=True)
        attached = (await cloud.instances.run_attached(tenant, spec).communicate()).stdout
        key = secrets.token_hex()
        for _ in range(2):
            runs = (
                cloud.instances.run(tenant, shouting(number), idempotency_key=f"{key}-{number}") for number in range(5)
            )
            await asyncio.gather(*runs)
        exec_ = cloud.instances.exec(tenant, "shouting-0", ["sh", "-c", "wc -c; exit 7"], stdin=True)

        async def follow() -> list[bytes]:
            lines = []
            async with cloud.instances.logs(tenant, "shouting-1", follow=True) as output:
                async for piece in output:
                    lines += piece.data.splitlines()
                    if len(lines) >= 3:
                        break
            return lines

        done, lines = await asyncio.gather(exec_.communicate(BIG), follow())
        await cloud.instances.archive_put(tenant, "shouting-0", "/tmp", [tar("greeting", BIG)])
        pieces = [piece async for piece in cloud.instances.archive_get(tenant, "shouting-0", "/tmp/greeting")]
        pages = [each.instance.name async for each in cloud.instances.list(tenant, page=2, labels=["kind=shouting"])]
        try:
            await cloud.instances.get(other, "shouting-0")
            foreign = "seen"
        except NotFound as error:
            foreign = error.message
        owners = {each.instance.tenant async for each in cloud.instances.list()}
        await asyncio.gather(*(cloud.instances.remove(tenant, name, force=True) for name in pages))
        left = [each.instance.name async for each in cloud.instances.list(tenant, prefix="shouting")]
        return Seen(
            tenants=[each.tenant.name async for each in cloud.tenants.list()],
            limits=view.tenant.limits.cpus,
            attached=attached,
            counted=done.stdout,
            status=done.exit.exit_status,
            lines=lines[:3],
            copied=content(b"".join(pieces)),
            pages=pages,
            foreign=foreign,
            owners=owners,
            left=left,
        )
