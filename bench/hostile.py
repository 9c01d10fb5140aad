"""Requests that are large, many, or never end: more cases of `bench/stalls.py`."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from bench.lib import Bench
from insula.client import Client
from insula.model.errors import InsulaError
from insula.model.stream import Kind
from tests.support.images import Layout, member, tar

Case = tuple[str, Callable[[], object]]
INSTANCES = 1000
LARGE = 50
NAMES = 100  # of images
TEXT = 120_000  # characters of one large argument


def cases(bench: Bench, client: Client, scale: int) -> Iterator[Case]:
    """Each is prepared when it is asked for."""
    yield from _requests(bench)
    yield from _crowd(client)
    yield from _instances(client, scale)
    yield from _images(client, scale)
    yield from _streams(bench, client, scale)


def together(count: int, act: Callable[[int], object]) -> None:
    """`act` of 0, 1, … from `count` threads at the same time; errors that Insula answers are answers."""

    def one(number: int) -> None:
        with suppress(InsulaError):
            act(number)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))


# -- requests ---------------------------------------------------------------------------------------------------------


def _requests(bench: Bench) -> Iterator[Case]:
    def post(body: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(bench.cli.socket))
            headers = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
            sock.sendall(
                f"POST /v1/tenants/hostile/instances?start=false HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body
            )
            while sock.recv(1 << 16):
                pass

    bodies = {
        "arrays in arrays": b'"command": ' + b"[" * 1_000_000,
        "250,000 arguments": b'"command": [' + b",".join([b'"a"'] * 250_000) + b"]",
        "90,000 variables": b'"env": {' + b",".join(b'"%05d":""' % n for n in range(90_000)) + b"}",
        "90,000 labels": b'"labels": {' + b",".join(b'"%05d":""' % n for n in range(90_000)) + b"}",
    }
    for name, body in bodies.items():
        yield f"a body of 1 MB: {name}", partial(post, b'{"image": "busybox", "network": null, ' + body + b"}")

    def silent() -> None:
        socks = [socket.socket(socket.AF_UNIX) for _ in range(200)]
        for number, sock in enumerate(socks):
            sock.connect(str(bench.cli.socket))
            sock.sendall(b"GET / HTTP/1.1\r\n"[: number % 16])
        time.sleep(1.0)
        for sock in socks:
            sock.close()

    yield "200 clients connect and send nothing", silent


# -- what is in one instance ------------------------------------------------------------------------------------------


def _crowd(client: Client) -> Iterator[Case]:
    instances = client.instances

    def top(_: int) -> None:
        instances.top("hostile", "processes")

    yield "20 times `top` of these at once", lambda: together(20, top)
    instances.run("hostile", "busybox", ["sleep", "3600"], name="target")

    def execute(_: int) -> None:
        with instances.exec("hostile", "target", ["true"]) as attachment:
            for _frame in attachment:
                pass

    yield "100 times `exec` at once", lambda: together(100, execute)

    def copy() -> None:
        with instances.archive_get("hostile", "names", "/") as response:
            for _ in response:
                pass

    yield "`cp` of these files", copy


def _instances(client: Client, scale: int) -> Iterator[Case]:
    instances, count, large = client.instances, INSTANCES // scale, LARGE // scale

    def make(number: int) -> None:
        instances.run("hostile", "busybox", ["true"], name=f"many{number}", start=False, networks=[])

    for first in range(0, count, 8):
        together(8, lambda n: make(first + n))  # noqa: B023
    yield f"`ps` of {count:,} instances", lambda: [instances.list("hostile") for _ in range(3)]

    def make_large() -> None:
        for number in range(large):
            words = ["x" * TEXT] * 8
            instances.run("hostile", "busybox", words, name=f"large{number}", start=False, networks=[])

    yield f"making {large} instances of 1 MB", make_large
    yield f"`ps` of {large} instances of 1 MB", lambda: instances.list("hostile")

    def remove() -> None:
        client.images.import_("hostile", "other", iter([tar(member("b", b"b"))]))
        client.images.remove("hostile", "other")

    yield "`image rm` beside them", remove
    yield "`stats` of them all", lambda: list(instances.stats("hostile"))


def _images(client: Client, scale: int) -> Iterator[Case]:
    count = NAMES // scale
    layout = Layout()
    layout.image([tar(member("a", b"a"))], name="large", process={"Env": [f"A{n}={'x' * TEXT}" for n in range(7)]})
    client.images.load("hostile", iter([layout.tar()]))
    for number in range(count):
        client.images.tag("hostile", "large", f"name{number}")
    yield f"`image ls` of {count} names of 1 MB", lambda: client.images.list("hostile")


# -- streams ----------------------------------------------------------------------------------------------------------


def _streams(bench: Bench, client: Client, scale: int) -> Iterator[Case]:
    instances = client.instances
    instances.run("hostile", "busybox", ["true"], name="wide")
    instances.wait("hostile", "wide")
    identity = instances.get("hostile", "wide")["instance"]["id"]
    path = Path(bench.daemon.root, "instances", identity, "log", "log")
    size = 64 << 10
    path.write_bytes((struct.pack(">BIQ", Kind.STDOUT, 8 + size, time.time_ns()) + b"x" * size) * (2000 // scale))
    yield "`logs` of 2,000 lines of 64 KiB", lambda: [None for _ in instances.logs("hostile", "wide")]

    def history(pause: float) -> None:
        with suppress(StopIteration), closing(client.host.events(0)) as events:  # type: ignore[type-var]
            for _ in range(INSTANCES // scale):
                next(events)
                time.sleep(pause)

    yield f"`events`: the first {INSTANCES // scale:,}", lambda: history(0.0)
    yield "the same with a reader that is slow", lambda: history(0.005)
