"""What users see beyond each limit of requests, connections, streams and failed proofs: one line that says what to do.

By the command line on the users' socket and by HTTPS, and the field Retry-After (RFC 9110, 10.2.3).
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from insula.api.peer import MAX_CONNECTIONS
from insula.api.tls.certificates import Certificates
from insula.api.tls.gate import OF_ADDRESS
from insula.kernel import syscalls
from insula.kernel.netns import call_in
from tests.support.cli import ERROR
from tests.support.cloud import API, PORT
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces, Run
from tests.support.wait import patiently, until
from tests.system.tenancy.conftest import People
from tests.system.tenancy.http import HttpAnswer, parsed
from tests.system.tenancy.test_local_users import RUN

STUDENT = 61021
LIMITS = "[quotas]\nuser_requests = 5\nuser_streams = 1\n"
WAIT = re.compile(r"try again in \d+ s")


@pytest.fixture(scope="module")
def served(run_: Run) -> Iterator[Daemon]:
    """A daemon with HTTPS and low limits, whose sockets a student and the gate can reach."""
    daemon = Daemon(run_)
    mode = daemon.path.parent.stat().st_mode & 0o7777
    try:
        for path in (daemon.path.parent, daemon.path):
            path.chmod(0o711)
        daemon.configure(LIMITS + API)
        daemon.start()
        daemon.cli.ok("user", "create", "student", "--uid", str(STUDENT))
        daemon.cli.of("default").ok("user", "bind", "student", "member")
        yield daemon
    finally:
        daemon.remove()
        daemon.path.parent.chmod(mode)


class Way(NamedTuple):
    """How a user without any rights on the host reaches the daemon, with the token in `file` if there is one."""

    daemon: Daemon
    home: Path
    https: bool
    uid: int | None = None
    file: Path | None = None

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "INSULA_TENANT": "default"}
        if self.file:
            environment["INSULA_TOKEN_FILE"] = str(self.file)
        if self.https:
            command = Namespaces.wrap(self.daemon.namespaces.host, *self.daemon.cli.command(*words))
        else:
            command = [sys.executable, "-I", "-c", RUN, *words]
            environment["INSULA_SOCKET"] = str(self.daemon.run / "users.sock")
        return subprocess.run(
            command, env=environment, user=self.uid, group=self.uid, capture_output=True, text=True, timeout=120
        )

    def error(self, *words: str) -> tuple[str, str]:
        """What a command that fails says: (what, hint), which is one line."""
        done = self.run(*words)
        match = ERROR.fullmatch(done.stderr)
        assert done.returncode == 1 and match, f"not one line `error: …; hint: …`: {done}"
        return match["what"], match["hint"]

    def connected(self) -> socket.socket:
        if self.https:
            return tls(self.daemon)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(patiently(60))
        syscalls.set_thread_users(-1, self.uid or 0, -1)  # which SO_PEERCRED has
        try:
            sock.connect(str(self.daemon.run / "users.sock"))
        finally:
            syscalls.set_thread_users(-1, 0, -1)
        return sock

    def head(self, path: str, token: str | None = None) -> bytes:
        """A request, by another token or by one's own."""
        assert token or self.file
        proof = token or self.file.read_text().strip()  # type: ignore[union-attr]
        return f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {proof}\r\n\r\n".encode()

    def ask(self, token: str | None = None) -> HttpAnswer:
        with self.connected() as sock:
            sock.sendall(self.head("/v1/whoami", token))
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
        return parsed(answer)


def joined(way: Way, user: str) -> Way:
    """The same, after `insula remote add` with an invitation of a user."""
    word = way.daemon.cli.ok("remote", "invite", user)
    command = Namespaces.wrap(way.daemon.namespaces.host, *way.daemon.cli.command("remote", "add", "lab"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(way.home)}
    subprocess.run(command, env=environment, input=f"{word}\n", check=True, capture_output=True, text=True, timeout=120)
    return way


def tls(daemon: Daemon) -> ssl.SSLSocket:
    context = ssl.create_default_context(cadata=Certificates(daemon.root / "pki").trusted("server").decode())
    fd = os.open(daemon.namespaces.host, os.O_RDONLY | os.O_CLOEXEC)
    try:
        plain = call_in(fd, lambda: socket.create_connection(("127.0.0.1", PORT), patiently(30)))
    finally:
        os.close(fd)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.fixture(scope="module")
def people(served: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    people = People(served, tmp_path_factory.mktemp("tokens"))
    yield people
    people.remove()


@pytest.fixture(params=["socket", "https"])
def way(request: pytest.FixtureRequest, served: Daemon, people: People, tmp_path: Path) -> Way:
    """A member of the default tenant, by a token of its own."""
    person = people.person("member", "default")
    way = Way(served, tmp_path, request.param == "https", file=person.token)
    return joined(way, person.name) if way.https else way


@contextmanager
def kept_up(act: Callable[[], object]) -> Iterator[None]:
    """Do something again and again in a thread while the block runs."""
    ended, begun = threading.Event(), threading.Event()

    def run() -> None:
        while not ended.is_set():
            act()
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(patiently(30))
        yield
    finally:
        ended.set()
        thread.join()


def refused(way: Way, what: str, *words: str) -> None:
    """A command is refused with this text, and told how long to wait; now and then one passes."""

    def once() -> bool:
        done = way.run(*words)
        match = ERROR.fullmatch(done.stderr)
        assert done.returncode == 0 or match, f"not one line `error: …; hint: …`: {done}"
        if match and match["what"] == what:
            assert WAIT.fullmatch(match["hint"]), done
            return True
        return False

    until(once, f"it is refused: {what}", 60)


def test_too_many_requests_of_a_user(way: Way) -> None:
    assert way.run("whoami").returncode == 0
    with kept_up(way.ask):
        refused(way, "you send more than 5 requests a second", "whoami")
    answer = next(found for _ in range(1000) if (found := way.ask()).status == 429)
    assert int(answer.headers["retry-after"]) >= 1 and answer.json["code"] == "TooManyRequests"
    until(lambda: way.run("whoami").returncode == 0, "it passes again", 60)


def test_too_many_streams_of_a_user(way: Way) -> None:
    """That is a quota, and no rate: 422, and no time after which it would pass."""
    with way.connected() as sock:
        sock.sendall(way.head("/v1/events"))
        assert sock.recv(12) == b"HTTP/1.1 200"
        what, hint = way.error("events")
        assert "may have 1 open streams and has 1: 0 left" in what and "user_streams in [quotas]" in hint


def test_too_many_connections_to_the_users_socket(served: Daemon, tmp_path: Path) -> None:
    student = Way(served, tmp_path, False, STUDENT)
    assert student.run("whoami").returncode == 0
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(student.connected())
        what, hint = student.error("whoami")
        assert what == f"you have {MAX_CONNECTIONS} connections open already" and WAIT.fullmatch(hint)
        assert served.cli.run("status").status == 0
    until(lambda: student.run("whoami").returncode == 0, "closed ones are free again")


def test_too_many_connections_by_https(served: Daemon, people: People, tmp_path: Path) -> None:
    """They are closed before TLS, which is where the line comes from; there is no answer of HTTP."""
    member = joined(Way(served, tmp_path, True), people.person("member", "default").name)
    assert member.run("whoami").returncode == 0
    with ExitStack() as stack:
        for _ in range(OF_ADDRESS):
            stack.enter_context(tls(served))
        what, hint = member.error("whoami")
        assert what == f"127.0.0.1:{PORT} has closed the connection before TLS began"
        assert "close some, or try again in a few seconds" in hint
    until(lambda: member.run("whoami").returncode == 0, "closed ones are free again")


@pytest.mark.parametrize("https", [False, True], ids=["socket", "https"])
def test_too_many_failed_proofs(https: bool, served: Daemon, people: People, tmp_path: Path) -> None:
    """The last test of this daemon: whoever comes from here is refused for a while."""
    wrong = served.path / "wrong"
    wrong.write_text(f"insula_{'0' * 16}_{'a' * 43}_00000000\n")
    wrong.chmod(0o600)
    way = Way(served, tmp_path, https, STUDENT, wrong)
    if https:
        way = joined(way._replace(uid=None), people.person("member", "default").name)
    else:
        os.chown(wrong, STUDENT, STUDENT)
    assert way.ask("insula_x").status == 401
    with kept_up(lambda: way.ask("insula_x")):
        refused(way, "too many failed attempts come from where you are", "whoami")
    answer = next(found for _ in range(1000) if (found := way.ask("insula_x")).status == 429)
    assert int(answer.headers["retry-after"]) >= 1
