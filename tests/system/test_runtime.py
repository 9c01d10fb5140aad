"""The container runtime on its own, without tenants, networks or a daemon: real namespaces, real crashes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from insula.container.service.client import Exec, Launch, Runtime
from insula.container.service.failures import StartFailed
from insula.kernel import process
from insula.kernel.cgroups import Cgroup
from insula.model.errors import Failed, NotFound
from insula.model.stream import RESIZE, Kind
from tests.support.host import Host, started, with_runtime
from tests.support.logs import read_log
from tests.support.wait import eventually, patiently, until


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.close()


def test_pid_1_inside_and_another_outside(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("sh", "-c", "echo $$; readlink /proc/self; exit 3")
        state = await runtime.create(launch)
        assert state.pid > 1
        seen = process.read(state.pid)
        assert seen is not None
        assert seen.pids == [state.pid, 1]
        await runtime.start(launch.id)
        record = await runtime.wait(launch.id)
        assert (record.exit_status, record.signal, record.error) == (3, None, None)
        assert host.output(launch).split() == ["1", "2"]
        await runtime.delete(launch.id)
        assert not Cgroup(launch.cgroup).exists()
        assert runtime.ids() == []

    with_runtime(host, body)


def test_attach_before_the_start_misses_no_output(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("cat", stdin=True)
        await runtime.create(launch)
        attached = await runtime.attach(launch.id, stdin=True)
        await runtime.start(launch.id)
        data = os.urandom(300_000)
        sending = asyncio.create_task(_send(attached, data))
        waiting = asyncio.create_task(runtime.wait(launch.id))
        received = bytearray()
        async for kind, payload in attached:
            assert kind is Kind.STDOUT
            received += payload
            if len(received) == len(data):
                break
        await sending
        assert bytes(received) == data
        assert (await waiting).exit_status == 0
        attached.close()

    async def _send(attached: Any, data: bytes) -> None:
        await attached.send(Kind.STDIN, data)
        await attached.send(Kind.STDIN_EOF)

    with_runtime(host, body)


def test_terminal(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("sh", "-c", "tty; read line; stty size; ls /dev/console", tty=True)
        await runtime.create(launch)
        attached = await _attach_when_open(runtime, launch.id)
        await runtime.start(launch.id)
        await attached.send(Kind.RESIZE, RESIZE.pack(33, 99))
        await attached.send(Kind.STDIN, b"\n")
        assert (await runtime.wait(launch.id)).exit_status == 0
        await attached.finish()
        text = b"".join([payload async for _, payload in attached]).decode()
        assert text.split() == ["/dev/pts/0", "33", "99", "/dev/console"]
        attached.close()

    with_runtime(host, body)


async def _attach_when_open(runtime: Runtime, container: str) -> Any:
    return await runtime.attach(container, stdin=True)


def is_running(runtime: Runtime, container: str) -> bool:
    """Whether PID 1 lives, whatever it runs."""
    state = runtime.state(container)
    return state is not None and process.is_alive(state.pid, state.start_time)


@pytest.mark.parametrize(("program", "status"), [("/nope", 127), ("nope", 127), ("/dev", 126), ("/bin/data", 126)])
def test_a_program_that_cannot_be_executed(host: Host, program: str, status: int) -> None:
    (host.layer / "bin/data").write_text("no program")

    async def body(runtime: Runtime) -> None:
        launch = host.launch(program)
        await runtime.create(launch)
        with pytest.raises(StartFailed, match="cannot execute") as caught:
            await runtime.start(launch.id)
        assert caught.value.exit_status == status
        record = await runtime.wait(launch.id)
        assert record.exit_status is None
        assert record.error
        await runtime.delete(launch.id)
        assert not Cgroup(launch.cgroup).exists()

    with_runtime(host, body)


def test_its_own_interpreter_is_not_executed(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("/proc/self/exe", "-c", "print('escaped')")
        await runtime.create(launch)
        with pytest.raises(StartFailed, match="runtime's own program"):
            await runtime.start(launch.id)

    with_runtime(host, body)


@pytest.mark.parametrize("trap", ["proc", "dev"])
def test_links_in_an_image_redirect_no_mount(host: Host, trap: str) -> None:
    """CVE-2019-19921 and CVE-2021-30465: a link where a mount goes. None is followed to /proc, others in the root."""
    hostile = host.path / "hostile"
    hostile.mkdir()
    outside = host.path / "outside"
    outside.mkdir()
    (hostile / trap).symlink_to(f"/../../../..{outside}")

    async def body(runtime: Runtime) -> None:
        launch = host.launch("sh", "-c", f"test -c {outside}/null && echo inside", layers=[hostile, host.layer])
        if trap == "proc":
            with pytest.raises(Failed, match="/proc"):
                await started(runtime, launch)
        else:
            await started(runtime, launch)
            assert (await runtime.wait(launch.id)).exit_status == 0
            assert host.output(launch) == "inside\n"
        await runtime.delete(launch.id)

    with_runtime(host, body)
    assert list(outside.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(host: Host) -> None:
    host.spares = 0  # each holds two descriptors

    async def body(runtime: Runtime) -> None:
        await started(runtime, warm := host.launch("true"))
        await runtime.wait(warm.id)
        await runtime.delete(warm.id)
        descriptors = f"/proc/{host.pid('zygote')}/fd"
        before = len(os.listdir(descriptors))
        for broken in (
            host.launch("true")._replace(upper="/nowhere"),
            host.launch("true")._replace(lower=["/nowhere"]),
        ):
            with pytest.raises(Failed, match="cannot prepare"):
                await runtime.create(broken)
            assert not Cgroup(broken.cgroup).exists()
        assert runtime.ids() == []
        until(lambda: len(os.listdir(descriptors)) <= before, "as many descriptors as before")

    with_runtime(host, body)


def test_exec_joins_and_is_waited_for(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("sleep", "60")
        await started(runtime, launch)
        exec_id = await runtime.exec(launch.id, Exec(host.process("sh", "-c", "echo $$; readlink /proc/1/exe; exit 7")))
        attached = await runtime.attach(launch.id, exec_id)
        assert (await runtime.wait(launch.id, exec_id)).exit_status == 7
        await attached.finish()
        text = b"".join([payload async for _, payload in attached]).decode().split()
        attached.close()
        assert int(text[0]) > 1
        assert text[1] == "/bin/busybox"
        with pytest.raises(StartFailed):
            await runtime.exec(launch.id, Exec(host.process("nope")))
        runtime.signal(launch.id, signal.SIGTERM)  # PID 1 has no handler for it: nothing happens
        await asyncio.sleep(0.1)
        assert is_running(runtime, launch.id)
        runtime.signal(launch.id, signal.SIGKILL)
        record = await runtime.wait(launch.id)
        assert (record.exit_status, record.signal) == (137, 9)
        with pytest.raises(NotFound):
            await runtime.exec(launch.id, Exec(host.process("true")))

    with_runtime(host, body)


def test_no_descriptor_of_the_host_leaks(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("sh", "-c", "ls -l /proc/self/fd; ls /proc/1/fd | grep -c .")
        await started(runtime, launch)
        await runtime.wait(launch.id)
        lines = host.output(launch).splitlines()
        targets = [line.partition(" -> ")[2] for line in lines if " -> " in line]
        assert len(targets) == 3
        assert targets[0] == "/dev/null"
        assert all(t.startswith("pipe:") for t in targets[1:])

    with_runtime(host, body)


def test_descriptors_are_passed_to_the_program_and_to_nobody_else(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        read, write = os.pipe()
        held = [os.memfd_create(str(number)) for number in range(3)]
        for number, fd in enumerate(held):
            os.write(fd, f"contents {number}\n".encode())
            os.lseek(fd, 0, os.SEEK_SET)
        launch = host.launch("sh", "-c", "cat <&3; cat <&4; cat <&5; echo to the pipe >&6; ls /proc/self/fd")
        try:
            await runtime.create(launch, [*held, write])
            os.close(write)
            await runtime.start(launch.id)
            await runtime.wait(launch.id)
            seen = host.output(launch).split("\n")
            assert seen[:3] == ["contents 0", "contents 1", "contents 2"]
            assert set(seen[3:]) <= {"", *map(str, range(8))}, "7 is the directory that ls reads"
            with os.fdopen(os.dup(read), "rb") as file:
                assert file.read() == b"to the pipe\n", "which ends: the zygote keeps no copy"
        finally:
            for fd in (read, *held):
                os.close(fd)
            await runtime.delete(launch.id)

    with_runtime(host, body)


@pytest.mark.parametrize("order", [("zygote",), ("monitor",), ("zygote", "monitor", "zygote"), ("monitor", "zygote")])
def test_killed_helpers_cost_no_output_and_no_exit_status(host: Host, order: tuple[str, ...]) -> None:
    script = "trap stop=1 USR1; i=0; while [ -z $stop ]; do echo line$i; i=$((i+1)); usleep 10000; done; exit 5"

    def lines(launch: Launch) -> list[str]:
        assert launch.log
        return b"".join(record.data for record in read_log(launch.log)).decode().split()

    async def body(runtime: Runtime) -> None:
        launches = [host.launch("sh", "-c", script) for _ in range(3)]
        for launch in launches:
            await started(runtime, launch)
        waiting = [asyncio.create_task(runtime.wait(launch.id)) for launch in launches]
        for launch in launches:
            await eventually(lambda launch=launch: lines(launch), "it writes")  # type: ignore[misc]
        for name in order:
            await asyncio.sleep(0.2)
            pid = host.pid(name)
            host.kill(name)
            for _ in range(round(patiently(500))):
                with contextlib.suppress(OSError, IndexError, ValueError):
                    if host.pid(name) != pid:
                        break
                await asyncio.sleep(0.01)
            assert all(is_running(runtime, launch.id) for launch in launches)
            await started(runtime, another := host.launch("true"))
            assert (await runtime.wait(another.id)).exit_status == 0
        before = [len(lines(launch)) for launch in launches]
        for launch in launches:
            runtime.signal(launch.id, signal.SIGUSR1)
        records = await asyncio.gather(*waiting)
        assert [record.exit_status for record in records] == [5, 5, 5]
        for launch, least in zip(launches, before, strict=True):
            written = host.output(launch).split()
            assert len(written) >= least > 0
            assert written == [f"line{i}" for i in range(len(written))]
            await runtime.delete(launch.id)

    with_runtime(host, body)


def test_created_containers_die_with_the_zygote(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("sleep", "60")
        await runtime.create(launch)
        assert is_running(runtime, launch.id)
        host.kill("zygote")
        record = await runtime.wait(launch.id)
        assert record.exit_status is None
        assert "interrupted" in (record.error or "")
        await runtime.delete(launch.id)
        assert not Cgroup(launch.cgroup).exists()

    with_runtime(host, body)


def test_another_runtime_object_finds_running_containers(host: Host) -> None:
    launch = host.launch("sh", "-c", "read line; exit 9", stdin=True)
    with_runtime(host, lambda runtime: started(runtime, launch))

    async def later(runtime: Runtime) -> None:
        assert [state.id for state in runtime.states()] == [launch.id]
        attached = await runtime.attach(launch.id, stdin=True)
        await attached.send(Kind.STDIN, b"go\n")
        assert (await runtime.wait(launch.id)).exit_status == 9
        attached.close()

    with_runtime(host, later)


def test_limits_hold(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("sh", "-c", "x=$(cat /dev/zero | busybox tr '\\0' x | busybox head -c 200000000); echo no")
        launch.config["linux"]["resources"] = {"memory": {"limit": 16 << 20, "swap": 16 << 20}, "pids": {"limit": 20}}
        await started(runtime, launch)
        record = await runtime.wait(launch.id)
        assert record.oom or record.exit_status != 0
        assert "no" not in host.output(launch)

    with_runtime(host, body)


def test_exec_processes_without_a_client_leave_no_descriptor(host: Host) -> None:
    """Processes that joined, whose client never came or went away: no descriptor stays."""

    host.spares = 0  # each holds some

    def held() -> list[int]:
        return [len(os.listdir(f"/proc/{host.pid(name)}/fd")) for name in ("monitor", "zygote")]

    async def settled() -> list[int]:
        """The number of open descriptors, once it stays the same for a while."""
        seen = [held()]
        while len(seen) < 5 or any(each != seen[-1] for each in seen[-5:]):
            await asyncio.sleep(0.1)
            seen.append(held())
        return seen[-1]

    async def body(runtime: Runtime) -> None:
        launch = host.launch("sleep", "60")
        await started(runtime, launch)
        before = await settled()
        for args in (("true",), ("sh", "-c", "echo never read"), ("cat",)):
            exec_id = await runtime.exec(launch.id, Exec(host.process(*args), stdin=args == ("cat",)))
            if args == ("cat",):
                attached = await runtime.attach(launch.id, exec_id, stdin=True)
                await attached.send(Kind.STDIN, b"data\n")
                attached.close()
                runtime.signal(launch.id, signal.SIGKILL, exec_id)
            await runtime.wait(launch.id, exec_id)
        assert held() > before
        await eventually(lambda: held() == before, "nothing is held any more", timeout=20)
        await runtime.delete(launch.id)

    with_runtime(host, body)
