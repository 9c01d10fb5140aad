"""The kinds of quotas as tests make them: objects that count, and requests that hold something while they are open."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from insula.client import Client
from insula.client.http import chunk
from insula.model.errors import Conflict
from insula.model.stream import Kind, encode

MOST = 5
EVERYBODY = {"direction": "in", "peers": [{"type": "any"}]}
"""The limit that requests meet."""
MIB = 1 << 20


class StoredKind(NamedTuple):
    """A quota that is stored: its limit, and how to make the object with a number; `objects` counts what is there."""

    limit: int | float
    make: Callable[[Client, str, int], object]
    objects: Callable[[Client, str], int | float]


def an_instance(**spec: Any) -> Callable[[Client, str, int], object]:
    def make(client: Client, tenant: str, number: int) -> object:
        return client.instances.run(tenant, "busybox", ["true"], start=False, networks=[], name=f"i{number}", **spec)

    return make


def on_a_network(client: Client, tenant: str, number: int, **spec: Any) -> object:
    """An instance with one port."""
    with suppress(Conflict):  # it is there
        client.networks.create(tenant, "default", "10.0.0.0/24")
    return client.instances.run(tenant, "busybox", ["true"], start=False, name=f"i{number}", **spec)


def of_instances(each: Callable[[dict[str, Any]], int | float]) -> Callable[[Client, str], int | float]:
    return lambda client, tenant: sum(each(view["instance"]["spec"]) for view in client.instances.list(tenant))


def record_size(view: dict[str, Any]) -> int:
    """The bytes of an instance's spec and of its image's settings as JSON, without its name."""
    parts = (view["instance"]["spec"], view["instance"]["config"])
    return sum(map(len, map(compact, parts))) - len(view["instance"]["name"])


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def rootfs(number: int) -> bytes:
    """The tar of a root file system with 64 KiB of its own, which don't compress."""
    data = bytes(range(256)) + os.urandom(64 * 1024 - 256)
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            info = tarfile.TarInfo(f"file-{number:03}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()


IMAGE = len(rootfs(0)) + 67_000
"""About the bytes that such an image counts: tar, compressed layer, configuration and manifest."""


RECORD = 950
"""About the bytes of the record of another name for busybox."""


def own_images(client: Client, tenant: str) -> list[dict[str, Any]]:
    return [image for image in client.images.list(tenant) if image["tenant"] == tenant]


def content(client: Client, tenant: str) -> int:
    parts: dict[str, int] = {}
    for image in own_images(client, tenant):
        parts.update(image["content"])
    return sum(parts.values())


KINDS = {
    "instances": StoredKind(MOST, an_instance(), of_instances(lambda _: 1)),
    "cpus": StoredKind(MOST / 4, an_instance(resources={"cpus": 0.25}), of_instances(lambda s: s["resources"]["cpus"])),
    "memory": StoredKind(
        MOST * 64 * MIB, an_instance(resources={"memory": 64 * MIB}), of_instances(lambda s: s["resources"]["memory"])
    ),
    "disk": StoredKind(
        MOST * 64 * MIB,
        an_instance(resources={"disk": 64 * MIB, "inodes": 1000}),
        of_instances(lambda s: s["resources"]["disk"]),
    ),
    "inodes": StoredKind(
        MOST * 1000,
        an_instance(resources={"disk": 64 * MIB, "inodes": 1000}),
        of_instances(lambda s: s["resources"]["inodes"]),
    ),
    "config_bytes": StoredKind(
        MOST * RECORD + RECORD // 2,
        lambda client, tenant, n: client.images.tag(tenant, "busybox", f"i{n:02}"),
        lambda client, tenant: sum(len(compact(image)) for image in own_images(client, tenant)),
    ),
    "spec_bytes": StoredKind(
        MOST * 12_000 + 6000,
        an_instance(env={"LONG": "x" * 10_500}),  # with the rest about 12,000 bytes
        lambda client, tenant: sum(map(record_size, client.instances.list(tenant))),
    ),
    "log_bytes": StoredKind(
        MOST * 2 * MIB,
        an_instance(log_size=MIB, log_files=2),
        of_instances(lambda s: s["log_size"] * s["log_files"]),
    ),
    "networks": StoredKind(
        MOST,
        lambda client, tenant, n: client.networks.create(tenant, f"n{n}", f"10.{n}.0.0/24"),
        lambda client, tenant: len(client.networks.list(tenant)),
    ),
    "ports": StoredKind(MOST, on_a_network, of_instances(lambda spec: len(spec["networks"]))),
    "routers": StoredKind(
        MOST,
        lambda client, tenant, n: client.routers.create(tenant, f"r{n}"),
        lambda client, tenant: len(client.routers.list(tenant)),
    ),
    "policies": StoredKind(
        MOST,
        lambda client, tenant, n: client.policies.create(tenant, f"p{n}", {}, ["in"], [EVERYBODY]),
        lambda client, tenant: len(client.policies.list(tenant)),
    ),
    "address_groups": StoredKind(
        MOST,
        lambda client, tenant, n: client.address_groups.create(tenant, f"g{n}", ["10.0.0.0/8"]),
        lambda client, tenant: len(client.address_groups.list(tenant)),
    ),
    "published_ports": StoredKind(
        MOST,
        lambda client, tenant, n: on_a_network(client, tenant, n, published=[{"port": 20_000 + n, "target": 80}]),
        of_instances(lambda spec: sum(each["count"] for each in spec["published"])),
    ),
    "floating_ips": StoredKind(
        MOST,
        lambda client, tenant, n: client.floating_ips.allocate(tenant),
        lambda client, tenant: len(client.floating_ips.list(tenant)),
    ),
    "load_balancers": StoredKind(
        MOST,
        lambda client, tenant, n: client.load_balancers.create(
            tenant, f"lb{n}", [{"protocol": "tcp", "port": 30_000 + n}], [{}]
        ),
        lambda client, tenant: len(client.load_balancers.list(tenant)),
    ),
    "images": StoredKind(
        MOST,
        lambda client, tenant, n: client.images.tag(tenant, "busybox", f"i{n}"),
        lambda client, tenant: len(own_images(client, tenant)),
    ),
    "image_bytes": StoredKind(
        MOST * IMAGE + IMAGE // 2,
        lambda client, tenant, n: client.images.import_(tenant, f"i{n}", [rootfs(n)]),
        content,
    ),
    "service_accounts": StoredKind(
        MOST,
        lambda client, tenant, n: client.identities.create_service_account(tenant, f"s{n}"),
        lambda client, tenant: len(client.identities.service_accounts(tenant)),
    ),
    "tokens": StoredKind(
        MOST,
        lambda client, tenant, n: client.identities.create_token(f"{tenant}/ci"),
        lambda client, tenant: sum(
            token["user"] == f"{tenant}/ci" for token in client.identities.tokens(everybody=True)
        ),
    ),
}


def post(path: str, *fields: str, body: bytes = b"") -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "host: x", *fields, "", "")).encode() + body


EXEC = chunk(encode(Kind.OPEN, json.dumps({"command": ["sleep", "600"]}).encode()))
OPENINGS = {
    "exec_sessions": post("/v1/tenants/exec-sessions/instances/web/exec", "transfer-encoding: chunked", body=EXEC),
    "streams": b"GET /v1/tenants/streams/instances/web/logs?follow=true HTTP/1.1\r\nhost: x\r\n\r\n",
    "upload_bytes": post("/v1/tenants/upload-bytes/images/import?name=x", "content-length: 1000", body=b"x" * 10),
}
