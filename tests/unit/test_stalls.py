"""Work on data of an instance, of any size, leaves the event loop free.

Nothing is timed: a *ticker* counts how often the loop goes round while the work is done. Work on the loop lets it go
round not once in between (the positive control); work in a thread lets it go round as often as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from litestar import Request

from insula.api.answers import PIECE, Answer, parts
from insula.container import wire
from insula.container.log import LogReader, LogWriter
from insula.container.service.process_streams import ProcessStreams
from insula.control.events import Events
from insula.control.identities.authority import OPERATOR
from insula.control.instances import attach_session
from insula.control.instances.attach_session import follow, in_reader, merge
from insula.control.instances.drivers.container.driver import ContainerDriver
from insula.control.instances.drivers.container.request import Requests
from insula.control.instances.drivers.container.users import MAX_SIZE
from insula.control.instances.io import InstanceIo, encode_records
from insula.control.keys import INSTANCES
from insula.control.workers import Workers
from insula.kernel import process
from insula.kernel.process import Process
from insula.model.errors import Failed, Invalid
from insula.model.objects import Instance, InstanceSpec, InstanceStatus, Tenant
from insula.model.stream import Decoder, Kind
from insula.model.views import Explanation, InstanceView, ProcessView
from insula.store.protocol import Entry, Event, Snapshot
from insula.store.typed import Keyspace
from insula.volume.quota import ReservationOnly
from tests.support import objects
from tests.support.wait import patiently
from tests.unit.conftest import StubDaemon

RECORDS = 200_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of records of a byte each, every tenth of them the end of a line."""
    directory = tmp_path_factory.mktemp("tiny")
    line = b"".join(struct.pack(">BIQ", Kind.STDOUT, 9, 1) + (b"\n" if n == 9 else b"x") for n in range(10))
    (directory / "log").write_bytes(line * (RECORDS // 10))
    return directory


@asynccontextmanager
async def ticker() -> AsyncIterator[Callable[[], int]]:
    """How often the loop went round since it was asked last."""
    rounds = 0

    async def tick() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    def since() -> int:
        nonlocal rounds
        seen, rounds = rounds, 0
        return seen

    task = asyncio.ensure_future(tick())
    try:
        yield since
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_the_tail_of_a_log_of_tiny_records(tiny: Path) -> None:
    async def main() -> None:
        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            with LogReader(str(tiny), tail=2) as reader:
                found = reader.poll()  # on the loop
            assert rounds() == 0, "the positive control"
            assert b"".join(record.data for record in found) == b"xxxxxxxxx\n" * 2
            with LogReader(str(tiny), tail=2) as reader:
                batches = [batch async for batch in follow(reader, lambda: True)]
            assert rounds() > 20
            assert [record for batch in batches for record in batch] == found

    asyncio.run(main())


def test_all_of_a_log_of_tiny_records(tiny: Path) -> None:
    """Each batch is small, and is put into frames in a thread."""

    async def main() -> None:
        async with ticker() as rounds:
            decoder, count, batches = Decoder(), 0, 0
            with LogReader(str(tiny)) as reader:
                async for batch in follow(reader, lambda: True):
                    data = await in_reader(lambda batch=batch: encode_records(batch))  # type: ignore[misc]
                    batches += 1
                    assert rounds() > 0
                    assert len(batch) < 5000
                    count += sum(1 for _ in decoder.feed(data))
            assert (count, batches > RECORDS // 5000) == (RECORDS, True)

    asyncio.run(main())


def test_a_cancelled_caller_waits_for_the_reader(tiny: Path) -> None:
    """The log is closed only when the thread has finished: its descriptor's number may mean another file then."""

    async def main() -> None:
        reader, over = LogReader(str(tiny), tail=5), []

        def work() -> None:
            reader.poll()
            over.append(True)

        task = asyncio.ensure_future(in_reader(work))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert over == [True]
        reader.close()

    asyncio.run(main())


def test_pieces_of_one_kind_become_one(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path), 1 << 20, 2)
    for kind, data in ((Kind.STDOUT, b"a"), (Kind.STDOUT, b"b"), (Kind.STDERR, b"c"), (Kind.STDOUT, b"d")):
        writer.write(kind, data)
    writer.close()
    with LogReader(str(tmp_path)) as reader:
        assert [*merge(reader.poll())] == [(Kind.STDOUT, b"ab"), (Kind.STDERR, b"c"), (Kind.STDOUT, b"d")]


def test_a_stream_that_never_pauses_lets_others_have_their_turn() -> None:
    """A socket that has more answers at once, without a round of the loop."""

    async def main() -> None:
        ours, theirs = wire.pair()
        sockets = [socket.socket(fileno=s.detach()) for s in (ours, theirs)]
        for sock in sockets:
            sock.setblocking(False)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while count < 200:
                sockets[1].send(bytes((Kind.STDOUT,)) + b"x")
                count += 1
        assert count > 2 * attach_session._TURN
        sockets[1].close()
        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            got = [item async for item in ProcessStreams(sockets[0])]
            assert len(got) == count
            assert rounds() >= count // 32 - 1
        sockets[0].close()

    asyncio.run(main())


# -- what is asked about an instance ---------------------------------------------------------------------------------

MANY = 1500


class Crowd:
    """A runtime whose container has many processes: this one, again and again, as /proc shows it."""

    def processes(self, _: str) -> list[Process]:
        return [found for _ in range(MANY) if (found := process.read(os.getpid()))]


def member() -> Any:
    return SimpleNamespace(
        active=True,
        reconciled=SimpleNamespace(is_set=lambda: True),
        tenant=SimpleNamespace(id_base=0),
        instance=SimpleNamespace(id="0" * 32, tenant="acme", name="web"),
    )


def test_thousands_of_processes() -> None:
    async def main() -> None:
        driver = object.__new__(ContainerDriver)
        runtime: Any = Crowd()
        driver.runtime = runtime
        context = SimpleNamespace(surveys=Workers(1), driver=lambda instance: driver)
        managed = SimpleNamespace(find=lambda tenant, name: member())
        controller: Any = SimpleNamespace(context=context, managed=managed, lifecycle=SimpleNamespace(ports=None))
        unused: Any = None
        instances = InstanceIo(unused, controller, unused)
        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            assert len(driver.processes(member().tenant, "0" * 32)) == MANY  # on the loop
            assert rounds() == 0, "the positive control"
            assert len(await instances.processes("acme", "web")) == MANY
            assert rounds() > 20

    asyncio.run(main())


def test_a_megabyte_of_etc_passwd(tmp_path: Path) -> None:
    """/etc/passwd of an image; a request for a user that is not in it reads all of it, each time."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("a:x:1:1::/:\n" * (MAX_SIZE // 12))
    images: Any = SimpleNamespace(lower=lambda layers: [tmp_path])
    settings: Any = SimpleNamespace(prefix="insula", root=tmp_path, instances=tmp_path)
    requests = Requests(settings, images, ReservationOnly(tmp_path, "none here"))
    tenant = Tenant(name="acme", index=0, id_base=1 << 20, created=0.0)

    def asked(user: str) -> Instance:
        return objects.instance(spec=InstanceSpec(image="x", command=["true"], user=user))

    async def main() -> None:
        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            with pytest.raises(Invalid, match="not in the image"):
                requests.oci(tenant, asked("nobody"), asked("nobody").spec, requests.directory("x"))  # on the loop
            assert rounds() == 0, "the positive control"
            for _ in range(2):
                with pytest.raises(Invalid, match="not in the image"):
                    await requests.check(tenant, asked("nobody"))
                assert rounds() > 20
            await requests.check(tenant, asked("a"))
            rounds()
            await requests.check(tenant, asked("a"))
            assert rounds() <= 1, "one who is known is not looked up again, and costs no thread"

    asyncio.run(main())


def test_many_concurrent_requests(tmp_path: Path) -> None:
    """A tenant's second question waits for its first; another tenant's does not, as long as there is a thread."""

    async def main() -> None:
        workers, order = Workers(2), list[str]()
        begun, hold = threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            assert hold.wait(patiently(20))
            order.append("hostile 1")

        first = asyncio.ensure_future(workers.do("hostile", slow))
        more = [asyncio.ensure_future(workers.do("hostile", lambda n=n: order.append(f"hostile {n}"))) for n in (2, 3)]  # type: ignore[misc]
        assert await asyncio.to_thread(begun.wait, 20), "the positive control: it is under way"
        await workers.do("calm", lambda: order.append("calm"))
        assert order == ["calm"]
        hold.set()
        await asyncio.gather(first, *more)
        assert order == ["calm", "hostile 1", "hostile 2", "hostile 3"]

    asyncio.run(main())


def test_a_cancelled_request_holds_its_lock_until_the_thread_ends() -> None:
    """Else a thousand cancelled requests would have a thousand threads."""

    async def main() -> None:
        workers, order = Workers(2), list[str]()
        begun, hold = threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            assert hold.wait(patiently(20))
            order.append("slow")

        first = asyncio.ensure_future(workers.do("hostile", slow))
        assert await asyncio.to_thread(begun.wait, 20)
        first.cancel()
        second = asyncio.ensure_future(workers.do("hostile", lambda: order.append("second")))
        await workers.do("calm", lambda: order.append("calm"))
        assert not first.done() and order == ["calm"]
        hold.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second
        assert order == ["calm", "slow", "second"]

    asyncio.run(main())


# -- what a tenant has many of ---------------------------------------------------------------------------------------

LARGE = "x" * 60_000


def view(number: int) -> InstanceView:
    spec = InstanceSpec(image="x", command=[LARGE])
    instance = objects.instance(name=f"web{number}", spec=spec, wanted="stopped")
    return InstanceView(instance=instance, status=InstanceStatus(state="created"))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_an_answer_of_any_size_is_the_same_json(count: int) -> None:
    """Short ones are whole, with their length; the others come in pieces."""
    views, sent = [view(number) for number in range(count)], list[Any]()

    async def main() -> None:
        over = asyncio.Event()
        scope: Any = {"type": "http", "method": "GET", "headers": [], "path": "/", "query_string": b""}
        scope["state"] = {"authority": OPERATOR}

        async def send(message: Any) -> None:
            sent.append((message, rounds()))
            if message["type"] == "http.response.body" and not message["more_body"]:
                over.set()

        async def receive() -> Any:
            await over.wait()
            return {"type": "http.disconnect"}

        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            msgspec.json.encode(views)  # as a whole
            assert rounds() == 0, "the positive control"
            await Answer(views, media_type="application/json").to_asgi_response(None, Request(scope))(
                scope, receive, send
            )

    asyncio.run(main())
    head, *bodies = [message for message, _ in sent]
    assert b"".join(message["body"] for message in bodies) == msgspec.json.encode(views)
    assert (b"content-length" in dict(head["headers"])) == (count < 3)
    full = [(message["body"], turns) for message, turns in sent[2:] if message["body"]]
    assert all(turns > 0 and len(body) < 3 * PIECE for body, turns in full)
    assert len(full) >= count * len(LARGE) // (2 * PIECE) - 1


def test_an_answer_that_is_an_object_is_the_same_json() -> None:
    """Its lists are encoded item by item."""
    explanation = Explanation(
        instance=view(1).instance,
        status=InstanceStatus(state="created"),
        processes=[ProcessView(pid=n, inside=n, pids=[n], parent=0, uid=0, user=0, state="S", cpu=0.5, command="é\"")
                   for n in range(3)],
        namespaces=[],
        uid_map=None,
        cgroups={"pids": "/x"},
        limits={},
        security={},
        layers=[],
        upper="/u",
        installed=[{"a": [1]}],
        rules=None,
    )  # fmt: skip
    assert b"".join(parts(explanation)) == msgspec.json.encode(explanation)


class Recorded:
    """A store with the same large record under many names."""

    def __init__(self, keyspace: Keyspace[Instance], count: int) -> None:
        puts = [keyspace.put(view(n).instance, "acme", f"web{n:03}") for n in range(count)]
        self.entries = [Entry(put.key, put.value, 1, 1) for put in puts]

    async def list(self, _: str) -> Snapshot:
        return Snapshot(self.entries, 1)

    async def watch(self, _: str, __: int) -> AsyncIterator[Event]:
        for entry in self.entries:
            yield Event("put", entry, None, entry.revision)


def test_the_records_of_a_thousand_large_instances() -> None:
    async def main() -> None:
        store: Any = Recorded(INSTANCES, 200)
        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            assert len(INSTANCES.sort_out(store.entries)[0]) == 200  # on the loop
            assert rounds() == 0, "the positive control"
            for work in (INSTANCES.list, INSTANCES.readable):
                assert [found.name for found in await work(store, "acme")] == [f"web{n}" for n in range(200)]
                assert rounds() > 20
            told = [story["name"] async for story in Events(SimpleNamespace(store=store)).watch(0)]  # type: ignore[arg-type]
            assert told == [f"web{n:03}" for n in range(200)]
            assert rounds() > 20

    asyncio.run(main())


def test_a_damaged_record_among_many() -> None:
    async def main() -> None:
        store: Any = Recorded(INSTANCES, 5)
        store.entries[2] = Entry(store.entries[2].key, b"{", 1, 1)
        assert [found.name for found in await INSTANCES.readable(store, "acme")] == ["web0", "web1", "web3", "web4"]
        with pytest.raises(Failed, match="damaged"):
            await INSTANCES.list(store, "acme")

    asyncio.run(main())


def test_a_crowd_of_clients_that_say_nothing(stub: StubDaemon) -> None:
    """Connections are accepted a few at a time, and wait in the kernel until then."""
    from insula.api import server

    rows = list[int]()

    async def count() -> None:
        """How many of them are accepted, each time that the loop goes round."""
        while not rows or rows[-1] < 200:
            rows.append(len(stub.server.server_state.connections - before))
            await asyncio.sleep(0)

    before = set(stub.server.server_state.connections)
    stopped = threading.Event()
    stub._loop.call_soon_threadsafe(stopped.wait, 20)  # the loop is busy while they come
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)  # EAGAIN if they could not wait
            sock.connect(str(stub.path))
        counted = asyncio.run_coroutine_threadsafe(count(), stub._loop)
        stopped.set()
        counted.result(20)
        assert max(b - a for a, b in itertools.pairwise(rows)) <= 2 * server._ACCEPTED
        assert stub.client.tenants.list() == []
