"""The SDK against the API over a real unix socket: objects, streams, processes, connections and errors."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from insula.api.app import create_app
from insula.api.narrowing import NARROW
from insula.api.peer import Peer
from insula.control.identities.authority import OPERATOR
from insula.model.errors import Conflict, Denied, Failed, Invalid, NotFound, Unavailable
from insula.model.objects import ConsoleSize, Tenant
from insula.model.stream import Kind
from insula.model.views import TenantView, Usage
from insula.sdk import (
    ASGITransport,
    AsyncInsula,
    AsyncUnixTransport,
    ConnectionLost,
    HTTPRequest,
    InstanceSpec,
    Insula,
    UnixTransport,
    answers,
    decoding,
)
from insula.sdk.messages import next_page
from insula.sdk.types import EventView
from tests.support.wait import patiently, until
from tests.unit.conftest import StubDaemon
from tests.unit.stub_plane import StubPlane

T = TypeVar("T")
SHELL = ["sh", "-c", "echo out; echo err >&2; cat; exit 3"]


@pytest.fixture
def cloud(stub: StubDaemon) -> Iterator[Insula]:
    with Insula(UnixTransport(str(stub.path), timeout=patiently(20))) as cloud:
        yield cloud


def in_loop(stub: StubDaemon, function: Any) -> Any:
    """Run a coroutine function with a client for asyncio."""

    async def run() -> Any:
        async with AsyncInsula(AsyncUnixTransport(str(stub.path), timeout=patiently(20))) as cloud:
            return await asyncio.wait_for(function(cloud), patiently(60))

    return asyncio.run(run())


def sleeping(name: str = "web") -> InstanceSpec:
    return InstanceSpec(image="busybox", name=name, command=["sleep", "600"])


# -- objects ---------------------------------------------------------------------------------------------------------


def test_objects_travel_both_ways(cloud: Insula) -> None:
    made = cloud.tenants.create("acme", labels={"team": "blue"}, cpus=1.5, memory=None)
    assert isinstance(made, TenantView) and (made.tenant.name, made.tenant.limits.cpus) == ("acme", 1.5)
    assert cloud.tenants.get("acme") == made
    assert [view.tenant.labels for view in cloud.tenants.list()] == [{"team": "blue"}]
    assert cloud.tenants.update("acme", cpus=None, pids=7).tenant.limits.pids == 7
    view = cloud.instances.run("acme", sleeping())
    assert (view.instance.spec.image, view.status.state) == ("busybox", "running")
    assert cloud.instances.update("acme", "web", memory=1 << 30).instance.spec.resources.memory == 1 << 30
    assert cloud.instances.pause("acme", "web").status.state == "paused"
    cloud.instances.remove("acme", "web", force=True)
    cloud.tenants.remove("acme")
    assert list(cloud.tenants.list()) == []


def test_objects_travel_both_ways_in_a_loop(stub: StubDaemon) -> None:
    async def work(cloud: AsyncInsula) -> None:
        made = await cloud.tenants.create("acme", cpus=2)
        assert await cloud.tenants.get("acme") == made
        assert [view async for view in cloud.tenants.list()] == [made]
        await asyncio.gather(*(cloud.instances.run("acme", sleeping(f"i{number}")) for number in range(10)))
        assert {view.instance.name async for view in cloud.instances.list("acme")} == {f"i{n}" for n in range(10)}

    in_loop(stub, work)


def test_errors_have_their_type_message_and_hint(cloud: Insula) -> None:
    cloud.tenants.create("acme")
    with pytest.raises(Conflict, match="a tenant acme already; hint: choose another name"):
        cloud.tenants.create("acme")
    with pytest.raises(NotFound, match="there is no tenant globex; hint: "):
        cloud.tenants.get("globex")
    with pytest.raises(Invalid, match="not a DNS label; hint: "):
        cloud.tenants.create("A/b c%")


def test_lists_follow_pages(cloud: Insula, stub: StubDaemon) -> None:
    for number in range(7):
        cloud.instances.run("acme", InstanceSpec(image="x", name=f"i{number}", command=["true"], labels={"n": "1"}))
    assert [view.instance.name for view in cloud.instances.list("acme", page=2)] == [f"i{n}" for n in range(7)]
    assert [view.instance.name for view in cloud.instances.list("acme", prefix="i3", labels=["n=1"])] == ["i3"]
    assert list(cloud.instances.list("acme", labels=["n=2"])) == []
    with pytest.raises(Invalid):
        next(cloud.instances.list("acme", page=100_000))

    async def names(cloud: AsyncInsula) -> list[str]:
        return [view.instance.name async for view in cloud.instances.list(page=3)]

    assert in_loop(stub, names) == [f"i{n}" for n in range(7)]


def test_only_the_next_page_of_this_server_is_followed() -> None:
    assert next_page('</v1/tenants?cursor=x>; rel="next"') == "/v1/tenants?cursor=x"
    for link in (None, "", '<https://other/v1/x>; rel="next"', '</v1/x>; rel="prev"', '<//other/v1>; rel="next"'):
        assert next_page(link) is None


# -- answers ---------------------------------------------------------------------------------------------------------


def test_members_that_only_a_newer_server_sends_are_left_out() -> None:
    view = TenantView(tenant=Tenant(name="acme", index=1, id_base=2, created=0.0), usage=Usage())
    sent = msgspec.to_builtins(view)
    sent["invented"] = 1
    sent["tenant"]["invented"] = {"a": 1}
    sent["usage"]["invented"] = [1]
    assert answers.TENANT(sent) == view
    with pytest.raises(Failed, match="not what this client knows"):
        answers.TENANT({"tenant": {"name": 1}})


def test_nested_members_of_a_newer_server_are_left_out() -> None:
    for kind in NARROW:
        fields = {field.name for field in msgspec.structs.fields(kind)}
        assert fields, kind
    entry = {"name": "x", "used": {"cpu": 1, "new": 2}, "new": 3}
    usage = {"since": 0, "until": 1, "used": {}, "other_cpu": 0, "reserved": {"x": 1}, "instances": [entry]}
    found = answers.TENANT_USAGE({"tenant": "acme", **usage})
    assert found.instances[0].used.cpu == 1


def test_an_answer_for_members_is_of_the_narrow_type() -> None:
    """Every type that has a narrow form, by what the server makes of it, and as the union."""
    wide = TenantView(tenant=Tenant(name="acme", index=1, id_base=2, created=0.0), usage=Usage())
    own = msgspec.convert(wide, NARROW[TenantView], from_attributes=True)
    assert answers.TENANT(msgspec.to_builtins(own)) == own
    assert answers.TENANT(msgspec.to_builtins(wide)) == wide


def test_events_have_fields_and_details() -> None:
    line = {"time": 1, "kind": "instance", "action": "exited", "tenant": "a", "name": "b", "exit_status": 3, "cpus": 2}
    assert decoding.event(line) == EventView(
        time=1.0, kind="instance", action="exited", tenant="a", name="b", exit_status=3, details={"cpus": 2}
    )


# -- streams ---------------------------------------------------------------------------------------------------------


def test_streams_have_typed_items(cloud: Insula, stub: StubDaemon) -> None:
    cloud.instances.run("acme", sleeping())
    stub.plane.instances.log = [(Kind.STDOUT, b"a\n"), (Kind.STDERR, b"b\n")]
    found = [(each.time, each.stream, each.data) for each in cloud.instances.logs("acme", "web")]
    assert found == [(0.0, "stdout", b"a\n"), (1.0, "stderr", b"b\n")]
    samples = list(cloud.tenants.stats("acme", names=["web"], interval=1))
    assert [sample.instances[0].cpu for sample in samples] == [0, 0.5, 1]
    assert stub.plane.stats.asked[-1] == ("acme", "web", 1.0)


def test_an_error_in_a_stream_is_raised_after_its_items(cloud: Insula, stub: StubDaemon) -> None:
    stub.plane.events.items = [{"time": 1.0, "kind": "tenant", "action": "created", "tenant": "a", "name": "a"}]
    with cloud.host.events() as events:
        assert next(events).name == "a"
        with pytest.raises(Failed, match="the rest is lost; hint: begin again"):
            next(events)
        assert list(events) == []
    with pytest.raises(NotFound), cloud.instances.logs("acme", "nobody"):
        pass


def test_archives_pass_in_both_directions(cloud: Insula, stub: StubDaemon) -> None:
    cloud.instances.run("acme", sleeping())
    pieces = [b"x" * 100_000 for _ in range(30)]
    stub.plane.instances.archives = {"/etc": pieces}
    assert b"".join(cloud.instances.archive_get("acme", "web", "/etc")) == b"".join(pieces)
    cloud.instances.archive_put("acme", "web", "/tmp", iter(pieces), copy="tree")
    assert stub.plane.instances.uploads["/tmp"] == b"".join(pieces)
    assert stub.plane.instances.copies["/tmp"] == "tree"
    with pytest.raises(NotFound):
        cloud.instances.archive_put("acme", "nobody", "/tmp", iter(pieces))

    async def work(cloud: AsyncInsula) -> bytes:
        async def given() -> AsyncIterator[bytes]:
            for piece in pieces:
                await asyncio.sleep(0)
                yield piece

        await cloud.instances.archive_put("acme", "web", "/var", given())
        return b"".join([piece async for piece in cloud.instances.archive_get("acme", "web", "/etc")])

    assert in_loop(stub, work) == b"".join(pieces) == stub.plane.instances.uploads["/var"]


def test_an_upload_that_fails_half_way_is_not_taken_for_a_whole_one(cloud: Insula, stub: StubDaemon) -> None:
    cloud.instances.run("acme", sleeping())

    def broken() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        cloud.instances.archive_put("acme", "web", "/tmp", broken())
    until(lambda: stub.plane.instances.broken_uploads == 1, "the server has seen that it is not whole")
    assert "/tmp" not in stub.plane.instances.uploads


# -- processes -------------------------------------------------------------------------------------------------------


def test_a_process_has_input_output_and_an_end(cloud: Insula) -> None:
    cloud.instances.run("acme", sleeping())
    big = b"x" * 3_000_000
    done = cloud.instances.exec("acme", "web", SHELL, stdin=True).communicate(big)
    assert done.stdout == b"out\n" + big and done.stderr == b"err\n"
    assert (done.exit.exit_status, done.exit.oom) == (3, False)
    with cloud.instances.exec("acme", "web", ["cat"], stdin=True) as process:
        process.write(b"hello")
        assert next(process).data == b"hello"
        process.end_input()
        assert process.wait().exit_status == 0
        assert list(process) == []
    with cloud.instances.exec("acme", "web", ["sleep", "600"]) as process:
        process.signal(signal.SIGTERM)
        assert process.wait().exit_status == 128 + signal.SIGTERM
    ignoring = cloud.instances.exec("acme", "web", ["sh", "-c", "exec <&-; echo done"], stdin=True)
    assert ignoring.communicate(big).stdout == b"done\n", "a process that takes no input"


def test_a_process_in_a_loop(stub: StubDaemon) -> None:
    async def work(cloud: AsyncInsula) -> None:
        await cloud.instances.run("acme", sleeping())
        big = b"x" * 3_000_000
        runs = (cloud.instances.exec("acme", "web", SHELL, stdin=True).communicate(big) for _ in range(1))
        for done in await asyncio.gather(*runs):
            assert done.stdout == b"out\n" + big and done.stderr == b"err\n" and done.exit.exit_status == 3
        async with cloud.instances.exec("acme", "web", ["cat"], stdin=True, tty=True) as process:
            await process.resize(30, 100)
            await process.write(b"hello\n")
            assert (await anext(process)).data.startswith(b"hello")
            await process.signal(signal.SIGKILL)
            assert (await process.wait()).exit_status == 128 + signal.SIGKILL
        ignoring = cloud.instances.exec("acme", "web", ["sh", "-c", "exec <&-; echo done"], stdin=True)
        assert (await ignoring.communicate(big)).stdout == b"done\n"

    in_loop(stub, work)


def test_run_attached_tells_the_name(cloud: Insula) -> None:
    spec = InstanceSpec(image="busybox", command=["echo", "hi"])
    with cloud.instances.run_attached("acme", spec, size=ConsoleSize(rows=24, columns=80)) as process:
        assert process.name
        assert process.communicate().stdout == b"hi\n"
    with pytest.raises(NotFound):
        cloud.instances.attach("acme", "nobody").communicate()


# -- connections -----------------------------------------------------------------------------------------------------


class Counting(UnixTransport):
    """Counts connections."""

    made = 0

    def connect(self) -> Any:
        self.made += 1
        return super().connect()


def test_connections_are_used_again(stub: StubDaemon) -> None:
    with Insula(Counting(str(stub.path))) as cloud:
        for _ in range(5):
            assert list(cloud.tenants.list()) == []
        with pytest.raises(NotFound):
            cloud.tenants.get("acme")
        cloud.tenants.create("acme")
        assert cloud.transport.made == 1  # type: ignore[attr-defined]
        events = cloud.host.events()
        with events, pytest.raises(Failed):
            list(events)
        with cloud.host.events():  # is left before its end
            pass
        assert len(list(cloud.tenants.list())) == 1
        assert cloud.transport.made in (2, 3)  # type: ignore[attr-defined]


class Server:
    """A server that gives one answer to each connection, or closes it, in a thread."""

    def __init__(self, directory: Path, answers: list[bytes]) -> None:
        self.path = str(directory / "server.sock")
        self.requests: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, args=(answers,))
        self._thread.start()

    def _serve(self, answers: list[bytes]) -> None:
        for answer in answers:
            with closing(self._socket.accept()[0]) as sock:
                sock.settimeout(patiently(20))
                data = b""
                while b"\r\n\r\n" not in data:
                    data += sock.recv(65536)
                self.requests.append(data)
                sock.sendall(answer)

    def close(self) -> None:
        self._thread.join()
        self._socket.close()


def answered(body: bytes, *fields: bytes, status: int = 200) -> bytes:
    """An answer after which the server closes the connection, and says so: else the client might use it again."""
    first = b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d" % (status, len(body))
    return b"\r\n".join([first, *fields, b"", body])


TENANT = msgspec.json.encode(TenantView(tenant=Tenant(name="a", index=1, id_base=2, created=0.0), usage=Usage()))
RUNS_STILL = b'{"error": "Conflict", "message": "the first one runs still", "hint": "wait"}'


def test_a_lost_connection_is_tried_again_where_that_is_right(tmp_path: Path) -> None:
    """A read, and a change with an idempotency key; another change is told to be lost."""
    retry = answered(RUNS_STILL, b"retry-after: 0", status=409)
    answers = [b"", answered(TENANT), b"", retry, answered(TENANT), b""]
    with closing(Server(tmp_path, answers)) as server, Insula(UnixTransport(server.path)) as cloud:
        assert cloud.tenants.get("a").tenant.name == "a"
        assert cloud.tenants.create("a", idempotency_key="k").tenant.name == "a"
        with pytest.raises(ConnectionLost, match="closed the connection before it responded"):
            cloud.tenants.create("a")
    assert [request.split()[0] for request in server.requests] == [b"GET"] * 2 + [b"POST"] * 4
    assert [b"idempotency-key: k\r\n" in request for request in server.requests] == [False] * 2 + [True] * 3 + [False]


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (b"SSH-2.0\r\n\r\n", Failed, "is not an HTTP response"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", Failed, "has no length"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, Failed, "no end of its header"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", Failed, "valid chunked body"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabc", ConnectionLost, "before the end"),
        (answered(b"not JSON"), Failed, "not JSON"),
        (answered(b"[]"), Failed, "not what this client knows"),
        (answered(b"<html>", status=502), Failed, "responded 502"),
    ],
)
def test_what_is_no_answer_of_insula(tmp_path: Path, answer: bytes, error: type[Exception], match: str) -> None:
    with (
        closing(Server(tmp_path, [answer])) as server,
        Insula(UnixTransport(server.path)) as cloud,
        pytest.raises(error, match=match),
    ):
        cloud.tenants.get("a")


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"does not answer at .*hint: start the daemon"):
        Insula(UnixTransport(str(tmp_path / "no.sock"))).tenants.get("a")
    with closing(socket.socket(socket.AF_UNIX)) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        cloud = Insula(UnixTransport(str(tmp_path / "silent.sock"), timeout=0.2))
        with pytest.raises(Unavailable, match=r"no answer within 0.2 s"):
            cloud.tenants.get("a")


def test_what_a_header_field_can_not_have_is_refused(cloud: Insula, stub: StubDaemon) -> None:
    for key in ("a\r\nx-evil: 1", "é", "a\x00"):
        with pytest.raises(Invalid, match="not printable ASCII"):
            cloud.tenants.create("acme", idempotency_key=key)
    assert list(cloud.tenants.list()) == []
    assert "secret" not in repr(HTTPRequest("GET", "/", (("authorization", "Bearer secret"),)))


def test_a_token_is_asked_for_at_each_request(tmp_path: Path) -> None:
    tokens = iter(["one", "two"])
    with (
        closing(Server(tmp_path, [answered(TENANT)] * 2)) as server,
        Insula(UnixTransport(server.path), token=lambda: next(tokens)) as cloud,
    ):
        cloud.tenants.get("a")
        cloud.tenants.get("a")
    assert [b"authorization: Bearer %b\r\n" % each in server.requests[n] for n, each in enumerate([b"one", b"two"])]


def test_a_cancelled_stream_closes_its_connection(stub: StubDaemon) -> None:
    """The server sees that its client has gone, and the client can go on."""
    connections = stub.server.server_state.connections
    before = set(connections)

    async def count(number: int) -> None:
        while len(connections - before) != number:
            await asyncio.sleep(0.02)

    async def work(cloud: AsyncInsula) -> None:
        await cloud.instances.run("acme", sleeping())
        await cloud.transport.aclose()
        await count(0)

        async def read() -> None:
            async with cloud.instances.attach("acme", "web") as process:
                await anext(process)

        reading = asyncio.ensure_future(read())
        waiting = asyncio.ensure_future(cloud.instances.wait("acme", "web"))
        await count(2)
        for task in (reading, waiting):
            task.cancel()
        ended = await asyncio.gather(reading, waiting, return_exceptions=True)
        assert {type(each) for each in ended} == {asyncio.CancelledError}
        await count(0)
        assert (await cloud.instances.get("acme", "web")).status.state == "running"

    in_loop(stub, work)


def test_a_stream_can_be_closed_from_elsewhere(cloud: Insula) -> None:
    """By another thread, while this one waits for an item."""
    cloud.instances.run("acme", sleeping())
    process = cloud.instances.attach("acme", "web")
    with process:
        closing_it = threading.Timer(0.2, process.close)
        closing_it.start()
        with pytest.raises(ConnectionLost):
            next(process)
        closing_it.join()


# -- another transport -----------------------------------------------------------------------------------------------


def test_an_application_in_this_process(tmp_path: Path) -> None:
    """The same client over ASGI: objects, errors, a process, an upload, a cancelled stream."""

    async def work() -> None:
        plane = StubPlane(tmp_path)
        state: dict[str, object] = {"stopping": asyncio.Event(), "peer": Peer(1, 0, 0), "group": None}
        async with AsyncInsula(ASGITransport(create_app(plane), state)) as cloud:
            await cloud.tenants.create("acme")
            with pytest.raises(Conflict):
                await cloud.tenants.create("acme")
            await cloud.instances.run("acme", sleeping())
            done = await cloud.instances.exec("acme", "web", SHELL, stdin=True).communicate(b"x" * 500_000)
            assert (len(done.stdout), done.exit.exit_status) == (500_004, 3)
            await cloud.instances.archive_put("acme", "web", "/tmp", [b"tar" * 1000] * 3)
            assert plane.instances.uploads["/tmp"] == b"tar" * 3000
            reading = asyncio.ensure_future(anext(cloud.instances.attach("acme", "web")))
            await asyncio.sleep(0.1)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        state["peer"] = None
        with pytest.raises(Denied, match="an unknown user"):
            await AsyncInsula(ASGITransport(create_app(plane), state)).tenants.get("acme")
        plane.kill()
        for process in plane.instances.processes_of.values():
            await process.drain()
        assert OPERATOR.sees_host

    asyncio.run(asyncio.wait_for(work(), patiently(60)))
