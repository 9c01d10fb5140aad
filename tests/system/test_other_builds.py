"""A new build takes over from an old one: monitor and zygote are replaced, and containers go on running."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.container import wire
from insula.container.service.build import build
from insula.container.service.client import Exec, Launch, ProcessStreams, Runtime
from insula.container.service.protocol import MONITOR_SOCKET, ZYGOTE_SOCKET
from insula.model.stream import Kind
from tests.support.cli import REPOSITORY
from tests.support.daemon import start_time
from tests.support.host import Host, opened, started
from tests.support.wait import eventually, patiently, until

COUNTER = "i=0; while [ $i -lt 100000 ] && [ ! -e /stop ]; do i=$((i+1)); echo $i; sleep 0.001; done; echo end; exit 3"
OLD = """
import asyncio, sys
from pathlib import Path
from insula.container.service.client import Runtime

async def main():
    runtime = Runtime(Path(sys.argv[1]), 1)
    runtime._zygote._replaced = True
    await runtime.open()
    await runtime.close()

asyncio.run(main())
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.close()


def old_build(path: Path, *, silent: bool) -> Path:
    """A copy of the sources that differs; `silent` knows no requests about builds, as 0.1.0."""
    shutil.copytree(REPOSITORY / "src", path)
    service = path / "insula/container/service"
    (service / "build.py").open("a").write("# another build\n")
    if silent:
        for name in ("monitor.py", "zygote.py"):
            text = (service / name).read_text()
            for request in ("hello", "replace"):
                assert f'"{request}"' in text
                text = text.replace(f'"{request}"', f'"no {request}"')
            (service / name).write_text(text)
    return path


def start_old(host: Host, library: Path) -> None:
    """Have a monitor and a zygote of the build in `library` started, by a daemon of that build that ends at once."""
    subprocess.run([sys.executable, "-c", OLD, host.run], env={**os.environ, "PYTHONPATH": str(library)}, check=True)


def hello(host: Host, name: str) -> wire.Message | None:
    """The first message of the process behind a socket; None if it closes the connection instead."""
    with wire.connect(f"{host.run}/{name}") as sock:
        wire.send(sock, {"op": "hello"})
        received = wire.receive(sock)
        return received[0] if received else None


def attach(host: Host, container: str) -> ProcessStreams:
    """Attach like a client of the old build: over a connection of its own."""
    sock = wire.connect(f"{host.run}/{MONITOR_SOCKET}")
    wire.send(sock, {"op": "attach", "id": container, "exec": None, "stdin": True})
    answer = wire.receive(sock)
    assert answer and answer[0] == {"tty": False}
    sock.setblocking(False)
    return ProcessStreams(sock)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("builds")
    return {"old": old_build(top / "old", silent=False), "0.1.0": old_build(top / "0.1.0", silent=True)}


def test_a_build_is_identified_by_its_sources(libraries: dict[str, Path]) -> None:
    code = "from insula.container.service.build import build; print(build())"

    def of(library: Path) -> str:
        env = {**os.environ, "PYTHONPATH": str(library)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip()

    assert of(REPOSITORY / "src") == build()
    assert of(libraries["old"]) not in (build(), of(libraries["0.1.0"]), "")


async def launched(host: Host, *launches: Launch) -> None:
    """Launch through what runs, whatever build it is of, as a daemon that ends then."""
    runtime = Runtime(host.run, host.spares)
    runtime._zygote._replaced = True
    await runtime.open()
    try:
        for launch in launches:
            await started(runtime, launch)
    finally:
        await runtime.close()


async def collect(client: ProcessStreams, into: bytearray) -> None:
    async for kind, data in client:
        assert kind is Kind.STDOUT
        into.extend(data)


def test_another_build_hands_everything_over(host: Host, libraries: dict[str, Path]) -> None:
    start_old(host, libraries["old"])
    first = hello(host, MONITOR_SOCKET)
    assert first and first["protocol"] == 1 and first["build"] != build(), "the old one runs"
    monitor, zygote = host.pid("monitor"), until(lambda: host.pid("zygote"), "the zygote runs, and has written its PID")
    counter, echo = host.launch("sh", "-c", COUNTER), host.launch("cat", stdin=True)

    async def main() -> None:
        await launched(host, counter, echo)
        assert hello(host, MONITOR_SOCKET) == first, "the control: nothing was replaced"
        clients = [attach(host, launch.id) for launch in (counter, echo)]
        seen = [bytearray(), bytearray()]
        reading = [asyncio.ensure_future(collect(*pair)) for pair in zip(clients, seen, strict=True)]
        await eventually(lambda: len(seen[0]) > 200, "output arrives")
        await clients[1].send(Kind.STDIN, b"before ")
        async with opened(host) as runtime:
            for socket in (MONITOR_SOCKET, ZYGOTE_SOCKET):
                answer = hello(host, socket)
                assert answer and answer["build"] == build(), socket
            assert host.pid("monitor") == monitor, "it is the same process, with another program"
            assert host.pid("zygote") != zygote
            before = len(seen[0])
            await eventually(lambda: len(seen[0]) > before + 200, "the client is attached still")
            await clients[1].send(Kind.STDIN, b"after")
            await clients[1].send(Kind.STDIN_EOF)
            assert (await runtime.wait(echo.id)).exit_status == 0
            await runtime.exec(counter.id, Exec(host.process("sh", "-c", ": > /stop")))
            assert (await runtime.wait(counter.id)).exit_status == 3, "the monitor is its parent now"
            for client in clients:
                await client.finish()
            await asyncio.wait_for(asyncio.gather(*reading), patiently(20))
            assert all(client.complete for client in clients)
            await started(runtime, again := host.launch("sh", "-c", "exit 4"))
            assert (await runtime.wait(again.id)).exit_status == 4
        assert seen[1] == b"before after"
        numbers = host.output(counter).split()
        assert numbers == [*(str(i + 1) for i in range(len(numbers) - 1)), "end"], "the log has each line once"
        assert seen[0].decode().split() == numbers[-len(seen[0].split()) :]

    asyncio.run(main())


def test_0_1_0_is_replaced_by_a_kill(host: Host, libraries: dict[str, Path]) -> None:
    start_old(host, libraries["0.1.0"])
    assert hello(host, MONITOR_SOCKET) is None, "it doesn't know the request"
    monitor, counter = host.pid("monitor"), host.launch("sh", "-c", COUNTER)

    async def main() -> None:
        await launched(host, counter)
        async with opened(host) as runtime:
            for socket in (MONITOR_SOCKET, ZYGOTE_SOCKET):
                answer = hello(host, socket)
                assert answer and answer["build"] == build(), socket
            assert host.pid("monitor") != monitor
            state = runtime.state(counter.id)
            assert state and start_time(state.pid) == state.start_time, "it runs on"
            await runtime.exec(counter.id, Exec(host.process("sh", "-c", ": > /stop")))
            await runtime.wait(counter.id)
            await runtime.flushed(counter.id)
        numbers = host.output(counter).split()
        assert numbers == [*(str(i + 1) for i in range(len(numbers) - 1)), "end"], "the log has each line once"

    asyncio.run(main())


def test_the_same_build_is_left_alone(host: Host) -> None:
    async def main() -> None:
        async with opened(host):
            pids = host.pid("monitor"), host.pid("zygote")
        async with opened(host):
            assert (host.pid("monitor"), host.pid("zygote")) == pids

    asyncio.run(main())


def test_a_monitor_that_cannot_be_replaced_goes_on(host: Host) -> None:
    """The file that it is told to execute is no program."""

    async def main() -> None:
        async with opened(host) as runtime:
            await started(runtime, launch := host.launch("cat", stdin=True))
            client = await runtime.attach(launch.id, stdin=True)
            file = os.memfd_create("none")
            request = {"op": "replace", "arguments": ["python3"], "environment": {}}
            with wire.connect(f"{host.run}/{MONITOR_SOCKET}") as sock:
                wire.send(sock, request, [file])
                received = wire.receive(sock)
            os.close(file)
            assert received and re.search("Exec format|Permission", received[0]["error"])
            seen = bytearray()
            reading = asyncio.ensure_future(collect(client, seen))
            await client.send(Kind.STDIN, b"still here")
            await client.send(Kind.STDIN_EOF)
            assert (await runtime.wait(launch.id)).exit_status == 0
            await client.finish()
            await reading
            assert seen == b"still here"

    asyncio.run(main())
