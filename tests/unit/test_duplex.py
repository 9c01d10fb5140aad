"""Attach and exec over HTTP: both directions at once, back-pressure, signals, detaching, exit statuses."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from insula.api.duplex import Duplex, Incoming
from insula.cli.terminal import DetachFilter, detach_keys
from insula.client.http import chunk, connect, head
from insula.model.errors import Conflict, Invalid, NotFound, Unavailable
from insula.model.stream import Kind, encode
from tests.support.wait import patiently, until
from tests.unit.conftest import StubDaemon

SOURCE = str(Path(__file__).parents[2] / "src")
LAUNCH = f"import sys; sys.path.append({SOURCE!r}); from insula.cli.main import main; sys.exit(main())"


def cli(stub: StubDaemon, *words: str) -> list[str]:
    return [sys.executable, "-ISE", "-c", LAUNCH, "--socket", str(stub.path), *words]


def run(stub: StubDaemon, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(cli(stub, *words), input=stdin, capture_output=True, timeout=patiently(30))


def test_both_directions_at_once(stub: StubDaemon) -> None:
    stub.client.instances.run("default", "x", ["cat"], name="web", start=False, stdin=True)
    with stub.client.instances.attach("default", "web", stdin=True, start=True) as attachment:
        frames = iter(attachment)
        for word in (b"one", b"two"):
            attachment.send(Kind.STDIN, word)
            assert next(frames) == (Kind.STDOUT, word)
        attachment.send(Kind.STDIN_EOF)
        kind, payload = next(frames)
    assert kind is Kind.EXIT
    assert json.loads(payload)["exit_status"] == 0


def test_one_request_makes_an_instance_attaches_and_starts_it(stub: StubDaemon) -> None:
    labels = {"large": "x" * 900_000}
    spec: dict[str, Any] = {"image": "x", "command": ["cat"], "name": "web", "stdin": True, "labels": labels}
    with stub.client.instances.run_attached("default", **spec) as attachment:
        assert attachment.name == "web"
        frames = iter(attachment)
        attachment.send(Kind.STDIN, b"hello")
        assert next(frames) == (Kind.STDOUT, b"hello")
        attachment.send(Kind.STDIN_EOF)
        kind, payload = next(frames)
    assert kind is Kind.EXIT and json.loads(payload)["exit_status"] == 0
    assert stub.client.instances.get("default", "web")["instance"]["spec"]["labels"] == labels
    with pytest.raises(Conflict, match="web"):
        stub.client.instances.run_attached("default", **spec)


def test_an_invalid_spec_is_refused(stub: StubDaemon) -> None:
    unknown, large = {"image": "x", "no_such_field": 1}, {"image": "x" * (1 << 20)}
    for spec, what in (({"image": 1}, "str"), (unknown, "no_such_field"), ({}, "image"), (large, "exceeds")):
        with pytest.raises(Invalid, match=what):
            stub.client.instances.run_attached("default", **spec)
    assert stub.client.instances.list("default") == []


def test_megabytes_both_ways_do_not_deadlock(stub: StubDaemon) -> None:
    data = os.urandom(6 << 20)
    done = run(stub, "run", "-i", "x", "tee", "/dev/stderr", stdin=data)
    assert done.returncode == 0
    assert done.stdout == data
    assert done.stderr == data


def test_a_process_that_reads_nothing_blocks_the_sender(stub: StubDaemon) -> None:
    stub.client.instances.run("default", "x", ["sleep", "60"], name="web", start=False, stdin=True)
    with stub.client.instances.attach("default", "web", stdin=True, start=True) as attachment:
        sent = 0
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            if attachment.pending:
                select.select([], [attachment], [], 0.05)
                attachment.flush()
            else:
                attachment.send(Kind.STDIN, b"x" * 65536)
                sent += 65536
    assert 65536 <= sent < 4 << 20, "a few buffers fill, and then it stops"


def test_unread_output_blocks_the_process(stub: StubDaemon) -> None:
    stub.client.instances.run("default", "x", ["cat", "/dev/zero"], name="web", start=False)
    with stub.client.instances.attach("default", "web", start=True):
        process = until(lambda: stub.plane.instances.processes_of["web"].process, "it has started")

        def stands_still() -> bool:
            before = written(process.pid)
            time.sleep(0.5)
            return 0 < before == written(process.pid)

        until(stands_still, "the buffers are full")
        process.kill()


def written(pid: int) -> int:
    """Bytes that the process has written, proc_pid_io(5)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))


def test_errors_before_the_first_byte_have_a_status(stub: StubDaemon) -> None:
    with pytest.raises(NotFound, match="no instance nope"):
        stub.client.instances.attach("default", "nope")
    with pytest.raises(NotFound, match="no instance nope"):
        stub.client.instances.exec("default", "nope", ["true"])


def test_errors_afterwards_come_as_frames(stub: StubDaemon) -> None:
    done = run(stub, "run", "x", "/no/such/program")
    assert done.returncode == 127
    assert done.stderr == b"error: cannot execute /no/such/program; hint: name a program that is there\n"


@pytest.mark.parametrize("body", [b"", encode(Kind.STDIN, b"x"), b"\xff\xff\xff\xff\xff", encode(Kind.OPEN, b"{}")])
def test_an_exec_with_an_invalid_body_is_refused(stub: StubDaemon, body: bytes) -> None:
    stub.client.instances.run("default", "x", ["sleep", "60"], name="web", start=False)
    with closing(connect(str(stub.path), 10)) as sock:
        sock.sendall(head("POST", "/v1/tenants/default/instances/web/exec", "transfer-encoding: chunked") + chunk(body))
        with suppress(BrokenPipeError):  # it has seen enough
            sock.sendall(b"0\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("evil", [encode(Kind.EXIT, b"{}"), b"\x63\x00\x00\x00\x00", b"\x00\xff\xff\xff\xff"])
def test_frames_of_a_wrong_kind_end_the_exchange(stub: StubDaemon, evil: bytes) -> None:
    stub.client.instances.run("default", "x", ["sleep", "60"], name="web", start=False, stdin=True)
    with stub.client.instances.attach("default", "web", stdin=True, start=True) as attachment:
        attachment.pending += chunk(evil)
        frames = list(attachment)
        process = stub.plane.instances.processes_of["web"].process
        assert process.returncode is None, "the process keeps running"
        process.kill()
    assert [kind for kind, _ in frames] == [Kind.ERROR]
    assert json.loads(frames[0][1])["error"] == "Invalid"


def test_a_client_that_goes_away_has_detached(stub: StubDaemon) -> None:
    stub.client.instances.run("default", "x", ["cat"], name="web", start=False, stdin=True)
    with stub.client.instances.attach("default", "web", stdin=True, start=True) as attachment:
        attachment.send(Kind.STDIN, b"x")
        next(iter(attachment))
    with stub.client.instances.attach("default", "web", stdin=True) as attachment:
        attachment.send(Kind.STDIN, b"again")
        assert next(iter(attachment)) == (Kind.STDOUT, b"again")
        attachment.send(Kind.STDIN_EOF)
        assert next(iter(attachment))[0] is Kind.EXIT


def test_a_stopping_server_says_so(tmp_path: Path) -> None:
    stub = StubDaemon(tmp_path)
    stub.start()
    stub.client.instances.run("default", "x", ["sleep", "60"], name="web", start=False)
    with stub.client.instances.attach("default", "web", start=True) as attachment:
        threading.Timer(0.2, stub.stop).start()
        kind, payload = list(attachment)[-1]
    assert kind is Kind.ERROR
    assert json.loads(payload)["error"] == "Unavailable"
    stub.plane.kill()


# -- the command line ------------------------------------------------------------------------------------------------


def test_exit_statuses_and_streams(stub: StubDaemon) -> None:
    done = run(stub, "run", "x", "sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"err\n")


def test_detached_prints_the_name(stub: StubDaemon) -> None:
    done = run(stub, "run", "-d", "--name", "web", "x", "sleep", "0")
    assert (done.returncode, done.stdout) == (0, b"web\n")


def test_exec_and_its_input(stub: StubDaemon) -> None:
    stub.client.instances.run("default", "x", ["sleep", "60"], name="web", start=False)
    done = run(stub, "exec", "-i", "web", "sh", "-c", "cat; exit 3", stdin=b"typed")
    assert (done.returncode, done.stdout) == (3, b"typed")
    assert run(stub, "exec", "web", "/no/such").returncode == 127


def test_signals_are_forwarded(stub: StubDaemon) -> None:
    script = "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(cli(stub, "run", "x", "sh", "-c", script), stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(signal.SIGTERM)
        assert client.stdout.readline() == b"got it\n"
        assert client.wait(patiently(10)) == 9


def test_a_closed_output_ends_it_quietly(stub: StubDaemon) -> None:
    with subprocess.Popen(cli(stub, "run", "x", "yes"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stderr is not None
        assert client.stdout.readline() == b"y\n"
        client.stdout.close()
        assert client.wait(patiently(10)) == -signal.SIGPIPE
        assert client.stderr.read() == b""
    stub.plane.instances.processes_of["i0"].process.kill()


def test_a_terminal_without_one_on_stdin_is_refused(stub: StubDaemon) -> None:
    done = run(stub, "run", "-it", "x", "sh")
    assert done.returncode == 125
    assert done.stderr.startswith(b"error: the input is not a terminal; hint: ")
    assert stub.client.instances.list() == []


# -- a real terminal -------------------------------------------------------------------------------------------------


class Person:
    """Somebody at a terminal, in which a command runs."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self.seen = b""

    def flags(self) -> int:
        return int(termios.tcgetattr(self.fd)[3])

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + patiently(10)
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 4096)
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.fd, (rows, columns))

    def wait(self) -> int:
        flags = self.flags
        _, status = os.waitpid(self.pid, 0)
        assert flags() & COOKED == COOKED, "the terminal is as it was"
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


COOKED = termios.ICANON | termios.ECHO | termios.ISIG
SHELL = "echo ready; while read line; do [ $line = size ] && stty size || echo got:$line; done; exit 5"


def test_raw_mode_resize_and_the_end_of_input(stub: StubDaemon) -> None:
    person = Person(cli(stub, "run", "-it", "--name", "web", "x", "sh", "-c", SHELL))
    person.expect(b"ready")
    assert not person.flags() & COOKED
    person.type(b"hello\r")
    person.expect(b"got:hello")
    person.resize(33, 111)
    time.sleep(0.2)
    person.type(b"size\r")
    person.expect(b"33 111")
    person.type(b"\x04")
    assert person.wait() == 5


def test_detach_keys_leave_it_running(stub: StubDaemon) -> None:
    person = Person(cli(stub, "run", "-it", "--name", "web", "x", "sh", "-c", SHELL))
    person.expect(b"ready")
    person.type(b"a\x10")
    person.type(b"\x11")
    assert person.wait() == 0
    process = stub.plane.instances.processes_of["web"].process
    assert process.returncode is None
    process.kill()


def test_a_signal_to_the_command_line_restores_the_terminal(stub: StubDaemon) -> None:
    person = Person(cli(stub, "run", "-it", "--name", "web", "x", "sh", "-c", SHELL))
    person.expect(b"ready")
    os.kill(person.pid, signal.SIGTERM)
    assert person.wait() == 143
    stub.plane.instances.processes_of["web"].process.kill()


# -- detach keys ------------------------------------------------------------------------------------------------------


def test_detach_keys_are_parsed() -> None:
    """As Docker has it: a printable character, or ctrl- with one of @ to _, which is 0 to 31 (ascii(7))."""
    assert detach_keys("ctrl-p,ctrl-q") == b"\x10\x11"
    assert detach_keys("ctrl-x,q") == b"\x18q"
    assert detach_keys("") == b""
    for number, key in enumerate("@abcdefghijklmnopqrstuvwxyz[\\]^_"):
        assert detach_keys(f"ctrl-{key}") == detach_keys(f"ctrl-{key.upper()}") == bytes([number])
        if key != ",":
            assert detach_keys(key) == key.encode()
    assert detach_keys(" ,~") == b" ~"


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ("ctrl-", "ctrl-"),
        ("ctrl-p,", ""),
        (",ctrl-p", ""),
        ("ctrl-p,,q", ""),
        ("alt-x", "alt-x"),
        ("ctrl-é", "ctrl-é"),
        ("ctrl-?", "ctrl-?"),
        ("ctrl-`", "ctrl-`"),
        ("ctrl-{", "ctrl-{"),
        ("ctrl-1", "ctrl-1"),
        ("ctrl-pq", "ctrl-pq"),
        ("Ctrl-p", "Ctrl-p"),
        ("ab", "ab"),
        ("a, b", " b"),
        ("é", "é"),
        ("\x1b", "\\x1b"),
    ],
)
def test_an_invalid_key_is_named(wrong: str, key: str) -> None:
    with pytest.raises(Invalid) as error:
        detach_keys(wrong)
    assert error.value.message == f"'{key}' is not a key"


@pytest.mark.parametrize(
    ("typed", "passed", "detached"),
    [
        ([b"abc"], b"abc", False),
        ([b"ab\x10\x11cd"], b"ab", True),
        ([b"\x10", b"\x11"], b"", True),
        ([b"\x10", b"x"], b"\x10x", False),
        ([b"\x10\x10", b"\x11"], b"\x10", True),
        ([b"\x10", b"\x10", b"x\x11"], b"\x10\x10x\x11", False),
    ],
)
def test_input_passes_unless_it_is_the_detach_sequence(typed: list[bytes], passed: bytes, detached: bool) -> None:
    keys = DetachFilter(b"\x10\x11")
    assert b"".join(map(keys.feed, typed)) == passed
    assert keys.detached is detached


def test_the_death_of_the_server_is_an_error(stub: StubDaemon, tmp_path: Path) -> None:
    """A daemon killed in the middle: the connection just ends."""
    path = tmp_path / "dying"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def die() -> None:
            served, _ = server.accept()
            served.recv(65536)
            served.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            served.close()

        thread = threading.Thread(target=die)
        thread.start()
        from insula.client.attachment import Attachment
        from insula.client.http import Remote

        with (
            Attachment(Remote(str(path)), "/v1/x") as attachment,
            pytest.raises(Unavailable, match="closed the connection"),
        ):
            list(attachment)
        thread.join()


class Sink:
    """A process that takes whatever it is sent."""

    def __init__(self) -> None:
        self.taken = 0

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        self.taken += 1


@pytest.mark.parametrize("kind", [Kind.IDLE, Kind.STDIN])
def test_a_flood_of_empty_frames_leaves_others_their_turn(kind: Kind) -> None:
    count = 5000

    async def main() -> None:
        messages = iter([{"type": "http.request", "body": encode(kind) * count, "more_body": True}])

        async def receive() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def signal(_: int) -> None:
            raise AssertionError

        sink, turns = Sink(), 0
        duplex = Duplex(lambda: cast(Any, None), signal=signal)
        passing = asyncio.ensure_future(duplex._up(cast(Any, sink), Incoming(receive)))
        while not passing.done():
            turns += 1
            await asyncio.sleep(0)
        await passing
        assert sink.taken == (count if kind is Kind.STDIN else 0)
        assert turns > count // 100

    asyncio.run(main())
