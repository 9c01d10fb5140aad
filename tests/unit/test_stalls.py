"""Work on what an instance left, however much that is, leaves the event loop free.

Nothing is timed: a *ticker* counts how often the loop goes round while the work is done. Work on the loop lets it go
round not once in between (the positive control); work in a thread lets it go round as often as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from insula.container import wire
from insula.container.attachment import Attachment
from insula.container.log import LogReader, LogWriter
from insula.control.instances import attachment
from insula.control.instances.attachment import follow, in_reader, merge
from insula.control.instances.drivers.container.driver import ContainerDriver
from insula.control.instances.drivers.container.request import Requests
from insula.control.instances.drivers.container.users import MAX_SIZE
from insula.control.instances.verbs import Instances, encode_records
from insula.kernel import process
from insula.kernel.process import Process
from insula.model.errors import Invalid
from insula.model.objects import ImageConfig, Instance, InstanceSpec, Tenant
from insula.model.stream import Decoder, Kind

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


def test_who_goes_away_waits_for_the_reader(tiny: Path) -> None:
    """The log is closed only when the thread is done with it: its descriptor's number is somebody else's then."""

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
        import socket

        sockets = [socket.socket(fileno=s.detach()) for s in (ours, theirs)]
        for sock in sockets:
            sock.setblocking(False)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while count < 200:
                sockets[1].send(bytes((Kind.STDOUT,)) + b"x")
                count += 1
        assert count > 2 * attachment._TURN
        sockets[1].close()
        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            got = [item async for item in Attachment(sockets[0])]
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
        supervisor: Any = SimpleNamespace(
            context=None, find=lambda tenant, name: member(), driver=lambda member: driver
        )
        unused: Any = None
        instances = Instances(unused, unused, supervisor)
        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            assert len(driver.processes(member().tenant, "0" * 32)) == MANY  # on the loop
            assert rounds() == 0, "the positive control"
            assert len(await instances.processes("acme", "web")) == MANY
            assert rounds() > 20

    asyncio.run(main())


def test_a_megabyte_of_etc_passwd(tmp_path: Path) -> None:
    """Of an image; who asks for a user that is not in it makes all of it be read, each time."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("a:x:1:1::/:\n" * (MAX_SIZE // 12))
    images: Any = SimpleNamespace(lower=lambda layers: [tmp_path])
    settings: Any = SimpleNamespace(prefix="insula")
    requests = Requests(settings, images)
    tenant = Tenant(name="acme", index=0, id_base=1 << 20, created=0.0)

    def asked(user: str) -> Instance:
        spec = InstanceSpec(image="x", command=["true"], user=user)
        return Instance(
            tenant="acme",
            name="web",
            id="0" * 32,
            spec=spec,
            image_digest="sha256:0",
            layers=[],
            config=ImageConfig(),
            port=None,
            wanted="running",
            created=0.0,
        )

    async def main() -> None:
        async with ticker() as rounds:
            await asyncio.sleep(0)
            rounds()
            with pytest.raises(Invalid, match="not in the image"):
                requests.oci(tenant, asked("nobody"), asked("nobody").spec)  # on the loop
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
