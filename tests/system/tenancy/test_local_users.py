"""Users of the host who are bound to a tenant use `insula` for it and nothing else: the kernel proves who they are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.api.peer import MAX_CONNECTIONS
from insula.control.tenants import FIRST_ID
from insula.model.errors import Conflict, Invalid
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.tenancy.conftest import Houses, People

STUDENT, STRANGER = 61001, 61002
CONNECT = """
import socket, sys, time
socks = []
for _ in range(int(sys.argv[2])):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    sock.sendall(b"GET /v1/whoami HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
    socks.append(sock)
answered = 0
for sock in socks:
    sock.settimeout(60)
    try:
        answered += sock.recv(12) == b"HTTP/1.1 200"
    except OSError:
        pass
print(answered, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def reachable(daemon: Daemon) -> Iterator[None]:
    """The directories of the tests can be entered by all, as /run/insula can."""
    modes = {}
    for path in (daemon.path, daemon.path.parent):
        modes[path] = path.stat().st_mode
        path.chmod(0o711)
    yield
    for path, mode in modes.items():
        path.chmod(mode & 0o7777)


@pytest.fixture(scope="module")
def student(people: People, houses: Houses) -> Iterator[str]:
    people.operator.identities.create_user("student", STUDENT)
    people.operator.identities.bind("student", "member", houses.acme.tenant)
    yield "student"
    people.operator.identities.remove_user("student")


def as_user(daemon: Daemon, uid: int, *words: str, tenant: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `insula` as another user of the host, without home and rights: it finds the socket by INSULA_RUN."""
    environment = {"PATH": os.environ["PATH"], "INSULA_RUN": str(daemon.run)}
    if tenant:
        environment["INSULA_TENANT"] = tenant
    program = [sys.executable, "-I", "-c", RUN, *words]
    return subprocess.run(
        program, env=environment, user=uid, group=uid, extra_groups=[], capture_output=True, text=True, timeout=120
    )


SOURCE = Path(__file__).parents[3] / "src"
RUN = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
from insula.cli.main import execute
execute()
"""


def test_a_student_uses_its_tenant(daemon: Daemon, houses: Houses, student: str) -> None:
    tenant, other = str(houses.acme.tenant), str(houses.globex.tenant)
    who = as_user(daemon, STUDENT, "whoami")
    assert who.stdout.strip() == f"student, by uid {STUDENT}: member of tenant {tenant}", who
    ran = as_user(daemon, STUDENT, "run", "--rm", "busybox", "id", "-u", tenant=tenant)
    assert ran.stdout.strip() == "0", ran
    assert "web" in as_user(daemon, STUDENT, "ps", tenant=tenant).stdout
    assert "there is no tenant" in as_user(daemon, STUDENT, "ps", tenant=other).stderr
    assert "host.read" in as_user(daemon, STUDENT, "status").stderr
    assert "tenant.create" in as_user(daemon, STUDENT, "tenant", "create", "mine").stderr


def test_a_user_of_the_host_that_nobody_knows_may_nothing(daemon: Daemon, houses: Houses, student: str) -> None:
    for words in (("whoami",), ("ps",), ("tenant", "ls")):
        refused = as_user(daemon, STRANGER, *words, tenant=str(houses.acme.tenant))
        assert refused.returncode == 1 and f"user {STRANGER} may not use insulad" in refused.stderr


def test_the_operators_socket_is_closed_to_them(daemon: Daemon, student: str) -> None:
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    for name, status in (("insulad.sock", 1), ("users.sock", 0)):
        command = [sys.executable, "-c", connect, str(daemon.run / name)]
        assert subprocess.run(command, user=STUDENT, group=STUDENT, stderr=subprocess.DEVNULL).returncode == status


def test_a_student_can_not_enter_the_state(daemon: Daemon, student: str) -> None:
    look = "import os, sys; os.stat(sys.argv[1] + '/state.db')"
    command = [sys.executable, "-c", look, str(daemon.root)]
    assert subprocess.run(command, user=STUDENT, group=STUDENT, stderr=subprocess.DEVNULL).returncode == 1
    assert subprocess.run(command).returncode == 0


def test_one_user_can_not_take_all_connections(daemon: Daemon, student: str) -> None:
    command = [sys.executable, "-c", CONNECT, str(daemon.run / "users.sock"), str(MAX_CONNECTIONS + 40)]
    with subprocess.Popen(
        command, user=STUDENT, group=STUDENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout and held.stdin
        assert int(held.stdout.readline()) == MAX_CONNECTIONS
        assert as_user(daemon, STUDENT, "whoami").returncode == 1
        assert daemon.cli.of("default").ok("ps") is not None, "the operator is served meanwhile"
        held.stdin.close()
    until(lambda: as_user(daemon, STUDENT, "whoami").returncode == 0, "connections that were closed are free again")


def test_user_ids_of_instances_are_nobody(people: People, student: str) -> None:
    with pytest.raises(Invalid, match="belongs to a tenant's instances"):
        people.operator.identities.create_user("root-inside", FIRST_ID)
    with pytest.raises(Conflict, match="another user"):
        people.operator.identities.create_user("second", STUDENT)


def test_a_user_of_the_host_may_send_a_token(daemon: Daemon, people: People, houses: Houses, student: str) -> None:
    """It then acts with the token's rights, also a stranger; a wrong one is refused although the user is known."""
    person = people.person("viewer", houses.globex.tenant)
    fetch = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
        "s.sendall(f'GET /v1/whoami HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n"
        "authorization: Bearer {sys.argv[2]}\\r\\n\\r\\n'.encode()); print(s.makefile().read())"
    )
    for uid in (STUDENT, STRANGER):
        for token, expected in ((person.secret, person.name), (person.secret[:-1] + "x", "Unauthenticated")):
            command = [sys.executable, "-c", fetch, str(daemon.run / "users.sock"), token]
            answer = subprocess.run(command, user=uid, group=uid, capture_output=True, text=True, check=True).stdout
            assert expected in answer, answer


def test_the_second_socket_is_there_again_after_a_kill(fresh: Daemon) -> None:
    fresh.kill("insulad")
    fresh.reap()
    fresh.start()
    mode = (fresh.run / "users.sock").stat().st_mode & 0o777
    assert mode == 0o666
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(fresh.run / "users.sock"))
